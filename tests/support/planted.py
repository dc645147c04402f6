"""A small run whose neurons are known: embeddings with planted label directions, and an SAE whose first neurons are those directions."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from medsae.artifacts import EMBEDDING_SCHEMA, RunDir
from medsae.config import RunConfig, validate_config
from medsae.sae import SAE, save

LABELS = ["Cardiomegaly", "Edema", "Pleural Effusion", "Support Devices"]
DIM, NEURONS = 16, 12
BRIEF: dict[str, object] = {"baselines": [], "permutations": 0, "bootstrap": 100, "draws": 1}
"""Section `measure` of runs whose tests need the neurons' own figures and no comparison."""


def write_planted(root: Path, images: int = 480, seed: int = 0, neurons: int = NEURONS, **sections: dict[str, object]) -> tuple[RunConfig, RunDir]:
    """Writes embeddings, SAE and image files; measure, name and score can follow. Neuron j < 4 fires where label j is present."""
    rng = np.random.default_rng(seed)
    run, data = RunDir(str(root / "run")), root / "data"
    data.mkdir(parents=True)
    present = rng.random((images, len(LABELS))) < 0.3
    x = 0.15 * rng.normal(size=(images, DIM)) + 1.0
    x[:, : len(LABELS)] += present
    rows = []
    for i in range(images):
        path = f"{i:04d}.png"
        # The file shows its labels as bright quarters, so a judge of images can know the truth.
        pixels = rng.integers(0, 60, (32, 32))
        for c in np.flatnonzero(present[i]):
            pixels[16 * (c // 2) : 16 * (c // 2) + 16, 16 * (c % 2) : 16 * (c % 2) + 16] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(data / path)
        rows.append(
            {
                "image_id": hashlib.sha256(path.encode()).hexdigest()[:16],
                "path": path,
                "patient_id": f"p{i // 2}",
                "study_id": "s1",
                "view": "frontal",
                "projection": "AP",
                "sex": "F" if i % 3 else "M",
                "age": 50.0,
                "split": "eval",
                "pixel_hash": f"{i:016x}",
                "labels": present[i].astype(int).tolist(),
                "embedding": x[i].tolist(),
            }
        )
    half = len(rows) // 2
    for part, chunk in enumerate((rows[:half], rows[half:])):
        run.write_table(f"embeddings/part-{part:05d}.parquet", pa.Table.from_pylist(chunk, schema=EMBEDDING_SCHEMA))
    run.write_manifest({"schema": 1, "stages": {}, "labels": LABELS})
    w = torch.zeros(DIM, neurons)
    for j in range(neurons):
        # Beyond the first four, neurons are weaker mixtures of the planted directions: alive, but less clean.
        w[j % len(LABELS), j] = 1.0
        if j >= len(LABELS):
            w[4 + j % (DIM - 4), j] = float(rng.uniform(0.5, 2.0))
    bias = -(w.sum(0) + 0.5)
    save(SAE("standard", {"W_enc": w, "b_enc": bias, "W_dec": w.T.contiguous(), "b_dec": torch.zeros(DIM)}), run, "sae/standard")
    tree = {"run": run.uri, "data": {"root": str(data)}, "sae": [{"name": "standard", "dict_size": neurons}], **sections}
    return validate_config(tree), run


class PlantedEncoder:
    """A text tower in the space of the planted embeddings, as an encoder that a configuration names by `module:Class`."""

    name, dim, trained, input_size = "planted", DIM, False, (32, 32)

    def __init__(self, **options: object) -> None:
        pass

    def concept_vocabulary(self) -> list[str]:
        """The planted labels and two things that no image shows."""
        return [*LABELS, "rotation", "noise"]

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """Label c is the mean of all images plus axis c; anything else, an axis that no neuron reads."""
        out = np.ones((len(texts), DIM), np.float32)
        for i, text in enumerate(texts):
            out[i, LABELS.index(text) if text in LABELS else 14 + len(text) % 2] += 2
        return out / np.linalg.norm(out, axis=1, keepdims=True)


class WordlessEncoder(PlantedEncoder):
    """An encoder without a text tower."""

    encode_text = property()  # type: ignore[assignment]
