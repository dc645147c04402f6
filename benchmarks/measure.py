"""Times of measure at the size of CheXpert on one and two workers, and the paper's way beside the one-pass way.

    python benchmarks/measure.py                 # all; about six minutes on two cores
    python benchmarks/measure.py --part scale    # only the size of CheXpert
    python benchmarks/measure.py --csv DIR/train.csv   # with the label pattern of a real CSV

Prints a table and a line of JSON. What is timed at scale: the first pass over embeddings on disk (read, encode, all states, merge) and the figures that
follow from it, up to the columns of `neurons.parquet` and the state's part of `summary.json`: points that need no second pass.

Embeddings are standard normal and the SAE is made, not trained, with the sparsity of a trained one: a ReLU dictionary of random unit directions, so that
the pre-activation of neuron j is standard normal and a bias of -z(1 - f_j) makes it fire on a share f_j of the images. The f_j are log-normal with a
standard deviation of 1.3 in ln f (the two SAEs of the demo: 1.2 and 1.4), 5 % are dead, and they add up to an L0 of 32. Times depend on sizes and on this sparsity, not
on what the numbers mean. Without a CSV, labels have the shares of Irvin et al. 2019 (arXiv 1901.07031, table 1), drawn independently.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pyarrow as pa
import torch
from scipy.stats import norm

from medsae.artifacts import EMBEDDING_SCHEMA, RunDir
from medsae.config import validate_config
from medsae.data.manifest import CHEXPERT_LABELS
from medsae.metrics import MeasureState, Moments, Monosemanticity, apply_policy
from medsae.metrics.columns import as_rows
from medsae.metrics.tables import detection_figures, detection_table, neurons_table, summary
from medsae.metrics.targets import CONFOUNDS, KeyedRows
from medsae.sae import SAE, load, save

ROWS_PER_PART = 2048


def dictionary(dim: int, neurons: int, l0: float = 32.0, seed: int = 0) -> SAE:
    """A ReLU dictionary that fires on standard normal inputs as a trained one does (see the module's text)."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((dim, neurons))
    w /= np.linalg.norm(w, axis=0)
    share = np.exp(rng.normal(0, 1.3, neurons)) * (rng.random(neurons) > 0.05)
    share = np.minimum(share * l0 / share.sum(), 0.5)
    bias = np.maximum(-norm.isf(share), -30.0)
    tensors = {"W_enc": w, "b_enc": bias, "W_dec": w.T, "b_dec": np.zeros(dim)}
    return SAE("standard", {k: torch.tensor(v, dtype=torch.float32) for k, v in tensors.items()})


POSITIVE = [8.86, 4.81, 12.26, 49.39, 3.65, 26.06, 6.78, 2.44, 15.63, 9.23, 40.34, 1.30, 3.87, 56.40]
UNCERTAIN = [0.00, 5.41, 3.52, 2.31, 0.57, 6.17, 12.78, 8.34, 15.66, 1.42, 5.02, 0.94, 0.26, 0.48]
"""Per cent of CheXpert's studies (Irvin et al. 2019, table 1), in the order of CHEXPERT_LABELS."""


def labels_of(images: int, csv: str | None, seed: int = 0) -> np.ndarray:
    """Raw labels [n, 14]: rows of a CSV, repeated, or drawn with CheXpert's shares."""
    if csv is None:
        draw = 100 * np.random.default_rng(seed).random((images, len(CHEXPERT_LABELS)))
        positive, uncertain = np.array(POSITIVE), np.array(POSITIVE) + np.array(UNCERTAIN)
        return np.where(draw < positive, 1, np.where(draw < uncertain, -1, -2)).astype(np.int8)
    import pandas as pd

    raw = pd.read_csv(csv)[CHEXPERT_LABELS].fillna(-2).to_numpy().astype(np.int8)
    return raw[np.arange(images) % len(raw)]


def write_run(folder: str, images: int, dim: int, csv: str | None, split: str = "eval") -> RunDir:
    """Synthetic embeddings in the contract of the run directory."""
    run, rng, labels = RunDir(folder), np.random.default_rng(0), labels_of(images, csv)
    for index, start in enumerate(range(0, images, ROWS_PER_PART)):
        n = min(ROWS_PER_PART, images - start)
        columns: dict[str, Any] = {f.name: [""] * n for f in EMBEDDING_SCHEMA}
        columns |= {
            "image_id": [f"{i:016x}" for i in range(start, start + n)],
            "patient_id": [f"patient{i // 4:05d}" for i in range(start, start + n)],
            "view": ["frontal"] * n,
            "projection": rng.choice(["AP", "PA", ""], n).tolist(),
            "sex": rng.choice(["F", "M"], n).tolist(),
            "age": rng.uniform(20, 90, n).astype(np.float32),
            "split": [split] * n,
            "labels": pa.ListArray.from_arrays(np.arange(n + 1) * labels.shape[1], pa.array(labels[start : start + n].ravel(), pa.int8())),
            "embedding": pa.ListArray.from_arrays(np.arange(n + 1) * dim, rng.standard_normal(n * dim).astype(np.float32)),
        }
        run.write_table(f"embeddings/part-{index:05d}.parquet", pa.table(columns, schema=EMBEDDING_SCHEMA))
    run.write_manifest({"schema": 1, "stages": {}, "labels": CHEXPERT_LABELS, "encoder": {"name": "random", "dim": dim, "trained": False}})
    return run


def finish(state: MeasureState, labels: np.ndarray) -> None:
    """The figures that follow from a finished state."""
    keys = KeyedRows([], np.arange(len(labels), dtype=np.uint64), apply_policy(labels))
    found = detection_figures(state, keys, np.nansum(keys.values, axis=0))
    neurons_table(state, CHEXPERT_LABELS, list(CONFOUNDS), 0.2, found)
    detection_table(found, CHEXPERT_LABELS)
    summary("standard", state, CHEXPERT_LABELS, 0.2)


def encode_alone(folder: str, images: int) -> float:
    """Seconds that the encoder's product takes for some images, in blocks as the stage makes them: the floor."""
    sae = load((RunDir(folder), "standard"))
    x = np.random.default_rng(0).standard_normal((512, sae.d)).astype(np.float32)
    sae.encode(x)
    rounds = max(1, min(images, 8192) // len(x))
    clock = time.perf_counter()
    for _ in range(rounds):
        sae.encode(x)
    return (time.perf_counter() - clock) * images / (rounds * len(x))


def on_workers(count: int, folder: str, labels: np.ndarray, config: Any) -> dict[str, Any]:
    """Seconds and peak memory of the first pass and its figures on Ray tasks of one CPU and one BLAS thread each."""
    import ray

    from medsae.pipeline import measure
    from medsae.pipeline.measure_tasks import first_pass

    ray.init(num_cpus=count, include_dashboard=False, object_store_memory=2 * 2**30, log_to_driver=False)
    try:
        plan, side = measure.prepare(config, RunDir(folder))
        # Processes are started and imported before the clock: a stage starts them once for all its features.
        warm = ray.remote(lambda: time.sleep(3) or __import__("medsae.sae"))
        ray.get([warm.remote() for _ in range(count)])
        alone = ray.remote(encode_alone)
        floor = max(ray.get([alone.remote(folder, len(labels) // count) for _ in range(count)]))
        clock = time.perf_counter()
        state = first_pass(plan, ray.put(side), "standard", ray.put(None))
        passed = time.perf_counter() - clock
        finish(state, labels)
        seconds = time.perf_counter() - clock
        peak = ray.remote(lambda: time.sleep(1) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        memory = max(ray.get([peak.remote() for _ in range(count)]))
    finally:
        ray.shutdown()
    return {
        "seconds": round(seconds, 1),
        "first_pass_s": round(passed, 1),
        "encoder_alone_s": round(floor, 1),
        "worker_peak_gib": round(memory, 2),
        "l0": round(state.activity.l0, 1),
    }


def at_scale(images: int, dim: int, neurons: int, csv: str | None, workers: list[int]) -> dict[str, Any]:
    """The first pass and its figures at full size on each number of workers, and at half the images and half the neurons on the most."""
    out: dict[str, Any] = {"images": images, "dim": dim, "neurons": neurons, "labels": "CSV" if csv else "drawn"}
    sizes = [(f"workers_{w}", images, neurons, w) for w in workers[::-1]]
    sizes += [("half_images", images // 2, neurons, workers[-1]), ("half_neurons", images, neurons // 2, workers[-1])]
    for key, n, m, count in sizes:
        with tempfile.TemporaryDirectory() as folder:
            run = write_run(folder, n, dim, csv)
            save(dictionary(dim, m), run, "sae/standard")
            config = validate_config({"run": folder, "sae": [{"name": "standard", "dict_size": m}]})
            out[key] = on_workers(count, folder, labels_of(n, csv), config)
        print(f"{key:13} {n:7} images {m:6} neurons {out[key]}", flush=True)
    full = out[f"workers_{workers[-1]}"]["seconds"]
    out["speed_up"] = round(out[f"workers_{workers[0]}"]["seconds"] / full, 2)
    out["growth"] = {key: round(full / out[key]["seconds"], 2) for key in ("half_images", "half_neurons")}
    return out


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    clock = time.perf_counter()
    result = function()
    return time.perf_counter() - clock, result


def pair_loop(a: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Monosemanticity by its definition: over pairs of images, all partners of an image at once (the kindest form of the loop)."""
    a = a / np.maximum(a.max(0), 1e-30)
    e = e / np.linalg.norm(e, axis=1, keepdims=True)
    weighted, total = np.zeros(a.shape[1]), np.zeros(a.shape[1])
    for i in range(len(a) - 1):
        pair = a[i] * a[i + 1 :]
        weighted += (e[i + 1 :] @ e[i]) @ pair
        total += pair.sum(0)
    return np.divide(weighted, total, out=np.full(len(total), np.nan), where=total > 0)


def one_pass(state: Any, z: np.ndarray, other: np.ndarray) -> Any:
    """The figures of a state that is given dense activations in batches, as the stage does it."""
    for start in range(0, len(z), 8192):
        state.update(as_rows(z[start : start + 8192]), other[start : start + 8192])
    return state.compute()


def peers(dim: int, neurons: int) -> Iterator[dict[str, Any]]:
    """The same activations both ways; seconds, ratio, largest difference. The pair loop is run at small N and its growth shown."""
    rng = np.random.default_rng(1)
    for n, m in [(5000, neurons // 4), (10_000, neurons // 4), (20_000, neurons // 4), (20_000, neurons // 2), (20_000, neurons)]:
        z = dictionary(dim, m).encode(rng.standard_normal((n, dim)).astype(np.float32))
        y = (rng.random((n, 14)) < 0.2).astype(np.float64)
        ours, got = timed(lambda z=z, y=y, m=m: one_pass(Moments(m, 14), z, y))
        with np.errstate(invalid="ignore", divide="ignore"):  # dead neurons
            theirs, want = timed(lambda z=z, y=y, m=m: np.corrcoef(np.concatenate([z.T.astype(np.float64), y.T]))[:m, m:])
        worst = float(np.nanmax(np.abs(got - want)))
        del want
        yield {
            "what": "correlation",
            "images": n,
            "neurons": m,
            "one_pass_s": ours,
            "paper_way_s": theirs,
            "ratio": theirs / ours,
            "difference": worst,
        }
    last = {"paper_way_s": np.nan, "images": 1}
    for n in (250, 500, 1000, 20_000):
        x = rng.standard_normal((n, dim)).astype(np.float32)
        z = dictionary(dim, neurons).encode(x)
        ours, result = timed(lambda z=z, x=x: one_pass(Monosemanticity(neurons, dim), z, x))
        row: dict[str, Any] = {"what": "monosemanticity", "images": n, "neurons": neurons, "one_pass_s": ours}
        if n <= 1000:
            theirs, want = timed(lambda z=z, x=x: pair_loop(z.astype(np.float64), x.astype(np.float64)))
            both = np.isfinite(want) & np.isfinite(result.score)
            row |= {"paper_way_s": theirs, "ratio": theirs / ours, "difference": float(np.abs(want - result.score)[both].max())}
        else:
            seconds = last["paper_way_s"] * (n / last["images"]) ** 2
            row |= {"paper_way_s": seconds, "ratio": seconds / ours, "extrapolated": True}
        last = row
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["scale", "peers", "all"], default="all")
    parser.add_argument("--images", type=int, default=223_414)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--neurons", type=int, default=8192)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--csv", help="a CheXpert CSV to take the label pattern from")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    if args.part in ("scale", "all"):
        figures["scale"] = at_scale(args.images, args.dim, args.neurons, args.csv, args.workers)
        print("speed-up", figures["scale"]["speed_up"], "growth", figures["scale"]["growth"], flush=True)
    if args.part in ("peers", "all"):
        print(f"{'what':16}{'images':>8}{'neurons':>8}{'one pass':>10}{'other way':>11}{'ratio':>9}  largest difference")
        figures["peers"] = []
        for row in peers(args.dim, args.neurons):
            figures["peers"].append(row)
            note = "extrapolated by N^2" if row.get("extrapolated") else f"{row['difference']:.1e}"
            figure = f"{row['one_pass_s']:9.2f}s{row['paper_way_s']:10.1f}s{row['ratio']:9.0f}"
            print(f"{row['what']:16}{row['images']:8}{row['neurons']:8}{figure}  {note}", flush=True)
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
