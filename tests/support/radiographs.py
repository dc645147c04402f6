"""A small run directory with measured neurons and real image files, for tests of naming and scoring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from medsae.artifacts import EXEMPLAR_SCHEMA, RAW, RunDir

LABELS = ["No Finding", "Cardiomegaly", "Edema"]


def draw(rng: np.random.Generator, size: int = 64) -> Image.Image:
    """A grey disc on noise."""
    y, x = np.mgrid[:size, :size]
    cy, cx, r = (*rng.uniform(0.3, 0.7, 2).tolist(), rng.uniform(0.1, 0.3))
    disc = ((y / size - cy) ** 2 + (x / size - cx) ** 2) < r**2
    return Image.fromarray((rng.integers(0, 60, (size, size)) + 150 * disc).astype(np.uint8))


def write_measured(root: Path, neurons: int, sae: str = "standard", images: int = 24, per_neuron: int = 4, seed: int = 0) -> tuple[str, str]:
    """Writes images and the `measure/` artifacts of `neurons` neurons; returns (data root, run directory)."""
    rng = np.random.default_rng(seed)
    data, run = root / "data", RunDir(str(root / "run"))
    data.mkdir(parents=True)
    for i in range(images):
        draw(rng).save(data / f"{i:03d}.png")
    run.write_manifest({"schema": 1, "stages": {}, "labels": LABELS})
    for name in (sae, RAW):
        r = rng.uniform(-0.9, 0.9, (neurons, len(LABELS)))
        top = r.argmax(1)
        columns = {
            "neuron": pa.array(range(neurons), pa.int32()),
            "frequency": pa.array(rng.uniform(0.05, 0.5, neurons)),
            "n_active": pa.array(rng.integers(1, 20, neurons)),
            "dead": pa.array([False] * neurons),
            **{f"r_{label}": pa.array(r[:, c]) for c, label in enumerate(LABELS)},
            "alive": pa.array((np.abs(r).max(1) > 0.2).tolist()),
            "entropy": pa.array(rng.uniform(0, 1, neurons)),
            "top_label": pa.array([LABELS[t] for t in top]),
            "top_r": pa.array(r.max(1)),
        }
        run.write_table(f"measure/{name}/neurons.parquet", pa.table(columns))
        rows = []
        for neuron in range(neurons):
            for rank, image in enumerate(rng.choice(images, per_neuron, replace=False)):
                row = {"neuron": neuron, "image_id": f"{image:016x}", "path": f"{image:03d}.png", "activation": 1.0 / (rank + 1)}
                rows.append({**row, "role": "name", "rank": rank, "quantile": 1.0})
        run.write_table(f"measure/{name}/exemplars.parquet", pa.Table.from_pylist(rows, schema=EXEMPLAR_SCHEMA))
    return str(data), run.uri
