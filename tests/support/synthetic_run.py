"""A small valid run directory with plausible random artifacts, for the tests of the report and of the feature service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFilter

from medsae.artifacts import EXEMPLAR_SCHEMA, NAME_SCHEMA, REJECT_SCHEMA, RunDir, fingerprint

LABELS = [
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
]
NOTICE = "The encoder is untrained: its weights are random (seed 0). The figures say nothing about any real model."


def draw_image(path: Path, seed: int, size: int = 128) -> None:
    """A drawing that is recognisably a chest: a bright body, two dark lungs, a heart."""
    rng = np.random.default_rng(seed)
    image = Image.new("L", (size, size), 18)
    pen = ImageDraw.Draw(image)
    pen.ellipse((6, 8, size - 6, size + 40), fill=150)
    lung = int(45 + rng.integers(0, 30))
    pen.ellipse((20, 22, 58, 106), fill=lung)
    pen.ellipse((70, 22, 108, 106), fill=lung)
    heart = int(rng.integers(10, 30))
    pen.ellipse((62 - heart // 2, 66, 66 + heart, 108), fill=190)
    noise = Image.fromarray(rng.integers(0, 60, (size, size), dtype=np.uint8))
    image = Image.blend(image.filter(ImageFilter.GaussianBlur(2)), noise, 0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=85)


def _correlations(activations: np.ndarray, labels: np.ndarray) -> np.ndarray:
    a = activations - activations.mean(0)
    y = labels - labels.mean(0)
    scale = np.sqrt((a**2).sum(0))[:, None] * np.sqrt((y**2).sum(0))[None]
    return np.divide(a.T @ y, scale, out=np.full((a.shape[1], y.shape[1]), np.nan), where=scale > 0)


def _measure(run: RunDir, name: str, z: np.ndarray, y: np.ndarray, paths: list[str], encoder: dict[str, Any], labels: list[str]) -> pa.Table:
    r = _correlations(z, y)
    size = np.abs(np.nan_to_num(r))
    p = size / np.maximum(size.sum(1, keepdims=True), 1e-12)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    active = (z > 0).sum(0)
    best = np.nan_to_num(r, nan=-2).argmax(1)
    alive = size.max(1) > 0.2
    m = z.shape[1]
    columns: dict[str, Any] = {
        "neuron": pa.array(np.arange(m), pa.int32()),
        "frequency": active / len(z),
        "n_active": active.astype(np.int64),
        "mean": z.mean(0),
        "max": z.max(0),
        "dead": active == 0,
        **{f"r_{label}": r[:, c] for c, label in enumerate(labels)},
        "alive": alive,
        "entropy": np.where(active > 0, entropy, np.nan),
        "top_label": [labels[b] for b in best],
        "top_r": r[np.arange(m), best],
        "monosemanticity": np.full(m, np.nan),
    }
    table = pa.table(columns)
    run.write_table(f"measure/{name}/neurons.parquet", table)
    winners = np.nan_to_num(r, nan=-2).argmax(0)
    paper = {
        label: {"neuron": int(w), "r": float(r[w, c]), "entropy": float(entropy[w])} for c, (label, w) in enumerate(zip(labels, winners, strict=True))
    }
    summary = {
        "name": name,
        "split": "eval",
        "n_images": len(z),
        "n_neurons": m,
        "labels": labels,
        "paper_table": paper,
        "paper_mean": {k: float(np.mean([row[k] for row in paper.values()])) for k in ("r", "entropy")},
        "n_alive": int(alive.sum()),
        "dead_share": float((active == 0).mean()),
        "l0": float((z > 0).sum(1).mean()),
        "fvu": None if name == "raw" else 0.21,
        "mean_entropy_alive": float(entropy[alive].mean()) if alive.any() else None,
        "label_counts": {
            label: {"positive": int(y[:, c].sum()), "negative": int((1 - y[:, c]).sum()), "ignored": 0} for c, label in enumerate(labels)
        },
        "zero_shot": None,
        "encoder": encoder,
    }
    run.write_json(f"measure/{name}/summary.json", summary)
    rows: dict[str, list[Any]] = {field.name: [] for field in EXEMPLAR_SCHEMA}
    for neuron in range(m):
        order = np.argsort(-z[:, neuron], kind="stable")
        for rank, image in enumerate(order[:8]):
            if z[image, neuron] <= 0:
                break
            values = (neuron, f"{image:016x}", paths[image], float(z[image, neuron]), "name", rank, 1 - rank / 8)
            for column, value in zip(rows, values, strict=True):
                rows[column].append(value)
    run.write_table(f"measure/{name}/exemplars.parquet", pa.table(rows, schema=EXEMPLAR_SCHEMA))
    return table


def make_run(
    root: Path,
    *,
    saes: tuple[str, ...] = ("standard",),
    labels: list[str] | None = None,
    notice: str | None = NOTICE,
    names: bool = True,
    concept: str | None = None,
    n: int = 400,
    d: int = 32,
    m: int = 160,
    seed: int = 0,
) -> tuple[RunDir, str]:
    """Writes a run directory and the images it points to; returns the run and `data.root`."""
    labels = labels if labels is not None else LABELS
    rng = np.random.default_rng(seed)
    data, run = root / "data", RunDir(str(root / "run"))
    files = [f"patient{i:05d}/study1/view1_frontal.jpg" for i in range(24)]
    for i, file in enumerate(files):
        draw_image(data / file, seed * 1000 + i)
    paths = [files[i % len(files)] for i in range(n)]
    severity = np.clip(rng.normal(-0.6, 1, (n, len(labels))), 0, None)
    y = (severity > 0.4).astype(np.float64)
    x = severity @ rng.normal(0, 1, (len(labels), d)) + rng.normal(0, 0.8, (n, d))
    encoder = {
        "name": "medclip-resnet50",
        "dim": d,
        "trained": notice is None,
        "weights": "untrained" if notice else "auto",
        "weights_sha256": None,
        "fingerprint": fingerprint(seed),
        "notice": notice,
    }
    _measure(run, "raw", x, y, paths, encoder, labels)
    for k, name in enumerate(saes):
        gate = rng.normal(-1.2, 1, (n, m))
        carries = rng.integers(0, len(labels), m)
        noise = rng.exponential(0.5, m) + 0.15 + 0.1 * k
        z = np.clip(severity[:, carries] + gate * noise, 0, None)
        z[:, rng.choice(m, m // 20, replace=False)] = 0
        table = _measure(run, name, z, y, paths, encoder, labels)
        run.write_json(f"sae/{name}/cfg.json", {"d_in": d, "d_sae": m, "architecture": "standard", "metadata": {}})
        lines = [
            {"epoch": e, "step": 10 * e, "loss": 0.2 + np.exp(-e / 8), "fvu": 0.2 + 0.8 * np.exp(-e / 6), "l0": 8 + 60 * np.exp(-e / 5)}
            for e in range(40)
        ]
        run.write_bytes(f"sae/{name}/training.jsonl", "\n".join(json.dumps(line) for line in lines).encode())
        if names:
            tops = table["top_label"].to_pylist()
            run.write_table(
                f"names/{name}.parquet",
                pa.table(
                    {
                        "neuron": pa.array(range(m), pa.int32()),
                        "namer": ["vocabulary"] * m,
                        "model": [""] * m,
                        "concept": [concept or t for t in tops],
                        "description": [f"Responds to {t.lower()} in frontal views." for t in tops],
                        "kind": ["finding"] * m,
                        "status": ["ok"] * m,
                        "prompt_hash": [""] * m,
                        "confidence": pa.array([0.5] * m, pa.float32()),
                        "evidence": ["{}"] * m,
                    },
                    schema=NAME_SCHEMA,
                ),
            )
    frontier = [
        {
            "name": name,
            "architecture": "topk" if "topk" in name else "standard",
            "dict_size": m,
            "fvu": 0.21,
            "l0": 8.0 + k,
            "dead_share": 0.05,
            "steps": 400,
        }
        for k, name in enumerate(saes)
    ]
    run.write_json("sae/frontier.json", frontier)
    rejects = [
        ("a.jpg", "extract", "truncated or damaged image"),
        ("b.jpg", "extract", "truncated or damaged image"),
        ("c.jpg", "extract", "empty file"),
    ]
    run.write_table("rejects.parquet", pa.Table.from_pylist([dict(zip(REJECT_SCHEMA.names, r, strict=True)) for r in rejects], REJECT_SCHEMA))
    manifest = {
        "schema": 1,
        "config": {"run": "runs/synthetic", "data": {"root": str(data)}, "seed": seed},
        "seed": seed,
        "versions": {"python": "3.11.7", "medsae": "0.1.0", "torch": "2.13.0+cpu"},
        "git_commit": "0" * 40,
        "labels": labels,
        "encoder": encoder,
        "stages": {
            "extract": {
                "fingerprint": fingerprint("extract"),
                "started": "2030-01-01T00:00:00+00:00",
                "seconds": 12.5,
                "counts": {"images": n},
                "outputs": {"rejects.parquet": "ab" * 32},
            }
        },
    }
    run.write_manifest(manifest)
    return run, str(data)
