"""Zero-shot AUROC of phantom-clip: images whose embeddings are the texts themselves must be told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from medsae.artifacts import EMBEDDING_SCHEMA, RunDir, embedding_parts
from medsae.config import validate_config
from medsae.encoders import load_encoder
from medsae.metrics.features import LinearFeatures
from medsae.pipeline import measure
from medsae.pipeline.measure_tasks import Second, second_look


def test_texts_as_images_are_told_apart(tmp_path: Path) -> None:
    encoder = load_encoder("phantom-clip", "untrained")
    prompts = encoder.zero_shot_prompts()["Cardiomegaly"]
    x = np.concatenate([encoder.encode_text(prompts[0]), encoder.encode_text(prompts[1])])
    positive = np.r_[np.ones(len(prompts[0]), int), np.zeros(len(prompts[1]), int)]
    run, n = RunDir(str(tmp_path)), len(x)
    columns = {f.name: [""] * n for f in EMBEDDING_SCHEMA}
    columns |= {"image_id": [f"{i:016x}" for i in range(n)], "patient_id": [str(i) for i in range(n)], "age": [1.0] * n, "split": ["eval"] * n}
    columns |= {"labels": [[int(p), 0] for p in positive], "embedding": list(x)}
    run.write_table("embeddings/part-00000.parquet", pa.table(columns, schema=EMBEDDING_SCHEMA))
    run.write_manifest({"schema": 1, "stages": {}, "labels": ["Cardiomegaly", "Pneumonia"], "encoder": {"name": "phantom-clip", "dim": x.shape[1]}})
    config = validate_config({"run": str(tmp_path), "encoder": {"name": "phantom-clip", "weights": "untrained"}})
    plan, side = measure.prepare(config, run)
    images = measure.read_images(plan, side)
    axes = measure.zero_shot_axes(plan)
    assert axes is not None
    assert axes.labels == [0]
    # A dictionary that reconstructs perfectly, and one that mirrors embeddings along the text direction.
    keep = np.eye(x.shape[1])
    flip = keep - 2 * np.outer(axes.axes[0], axes.axes[0]) / np.square(axes.axes[0]).sum()
    second = Second(np.array([0]), np.ones(x.shape[1], np.float32), images.offsets, axes.axes)
    areas = []
    for back in (keep, flip):
        features = LinearFeatures(keep, np.zeros(x.shape[1]), back)
        [found], _ = second_look(plan, "standard", features, second, None, embedding_parts(run))
        before = measure.zero_shot(axes, found.texts, images.targets, plan.labels)
        after = measure.zero_shot(axes, found.texts_after, images.targets, plan.labels)
        assert before is not None
        assert after is not None
        assert before["Pneumonia"] is None
        areas.append((before["Cardiomegaly"], after["Cardiomegaly"]))
    assert areas[0][0] > 0.9
    assert areas[0][1] == areas[0][0]
    assert areas[1] == (areas[0][0], pytest.approx(1 - areas[0][0]))
    [raw], _ = second_look(plan, "raw", None, second, None, embedding_parts(run))
    assert raw.texts_after is None
