"""Zero-shot AUROC of phantom-clip: images whose embeddings are the texts themselves must be told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from medsae.artifacts import EMBEDDING_SCHEMA, RunDir
from medsae.config import validate_config
from medsae.encoders import load_encoder
from medsae.pipeline import measure


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
    got = measure.zero_shot(plan, measure.read_images(plan, side))
    assert got is not None
    assert got["Cardiomegaly"] is not None
    assert got["Cardiomegaly"] > 0.9
    assert got["Pneumonia"] is None
