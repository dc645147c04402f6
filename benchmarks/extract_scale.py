"""Memory of the extract stage at the size of CheXpert: 223,414 manifest rows over a few hundred distinct images.

    python benchmarks/extract_scale.py [--rows 22341 111707 223414] [--distinct 400] [--json FILE]

The rows are hard links to small drawn radiographs, so that the disk holds hundreds of files while the stage sees every row as an image of its own. The
pixels that travel are as large as MedCLIP's (224 x 224 bytes: 11.2 GB in all); the encoder is their 8 x 8 thumbnail, so that minutes suffice. Each number of
rows is a run of its own on its own Ray; the memory of every process is sampled all along. Reported: the peak of the driver, of the encoder's actor, of the
largest other worker, of all processes together (private pages; what is shared is counted once, as the object store), and the duplicates found.

Exits with 1 where an image is missing or a duplicate is not found.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from medsae.artifacts import fingerprint
from medsae.config import validate_config
from medsae.encoders import EncoderInfo
from medsae.encoders.medclip import preprocess

CHEXPERT = 223_414
"""Rows of CheXpert's train.csv."""
ENCODER = "extract_scale:Thumbnail"
MB = 1e6


class Thumbnail:
    """The mean of every 28 x 28 pixels: an encoder that costs nothing, on pixels of MedCLIP's size."""

    name, dim, trained, input_size = ENCODER, 64, True, (224, 224)
    preprocess = staticmethod(preprocess)

    def __init__(self, weights: str | None = None, device: str = "cpu", seed: int = 0, dtype: str = "auto", sha256: str | None = None) -> None:
        self.info = EncoderInfo(self.name, self.dim, True, "none", None, fingerprint({"name": self.name}), None)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, 224, 224] to float32 [B, 64]."""
        return pixels.reshape(-1, 8, 28, 8, 28).mean((2, 4), dtype=np.float32).reshape(-1, 64)


def make_collection(folder: Path, distinct: int) -> list[str]:
    """Draws the distinct images, 64 pixels high; returns their names."""
    from medsae.data.phantom import render, rows

    (folder / "distinct").mkdir(parents=True)
    names = []
    for i, row in enumerate(rows(distinct, 0)):
        Image.fromarray(render(row.phantom, 64)).save(folder / "distinct" / f"{i}.jpg", quality=92)
        names.append(f"{i}.jpg")
    return names


def link_rows(folder: Path, names: list[str], count: int) -> Path:
    """A data set of `count` rows: links to the distinct images in turn, and its CSV."""
    root = folder / f"rows{count}"
    with_labels = ["Path,Finding,patient"]
    for i in range(count):
        if i % 1000 == 0:
            (root / f"{i // 1000:03d}").mkdir(parents=True)
        relative = f"{i // 1000:03d}/{i % 1000:03d}.jpg"
        os.link(folder / "distinct" / names[i % len(names)], root / relative)
        with_labels.append(f"{relative},{i % 2},p{i // 3}")
    (root / "train.csv").write_text("\n".join(with_labels) + "\n")
    return root


class Sampler(threading.Thread):
    """Samples the memory of this process and of all its descendants until stopped; keeps the peaks, in bytes.

    A process whose title has `actor` in it is one of the actors that are told apart from other workers.
    """

    def __init__(self, interval: float = 0.25, actor: str = "EncodePart") -> None:
        super().__init__(daemon=True)
        self.interval, self.actor = interval, actor
        self.stopped = threading.Event()
        self.kinds: dict[int, str] = {}
        self.peak: dict[str, float] = {}
        self.shared_before = self._object_store()

    @staticmethod
    def _object_store() -> int:
        return psutil.disk_usage("/dev/shm").used if Path("/dev/shm").exists() else 0

    def _kind(self, process: psutil.Process) -> str:
        title = " ".join(process.cmdline()[:2])
        if self.actor in title:
            self.kinds[process.pid] = "actor"  # a title is that of the call in progress: once an actor, always that actor
        if process.pid not in self.kinds and process.pid == os.getpid():
            self.kinds[process.pid] = "driver"
        return self.kinds.get(process.pid, "worker" if title.startswith("ray::") else "ray")

    def sample(self) -> None:
        """One look at all processes."""
        found: dict[str, float] = {}
        together = 0.0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                memory = process.memory_info()
                kind = self._kind(process)
            except psutil.Error:
                continue  # it ended
            private = memory.rss - getattr(memory, "shared", 0)
            found[kind] = max(found.get(kind, 0.0), private)
            together += private
        found["all"] = together
        found["store"] = self._object_store() - self.shared_before
        for kind, value in found.items():
            self.peak[kind] = max(self.peak.get(kind, 0.0), value)

    def run(self) -> None:
        while not self.stopped.wait(self.interval):
            self.sample()


def sampled(stage: str, tree: dict[str, Any], store: int, actor: str = "EncodePart") -> tuple[dict[str, Any], float, dict[str, float]]:
    """Runs a stage on a Ray of its own, with `store` bytes of object store; returns its counts, seconds and the peaks of a `Sampler`."""
    import ray

    from medsae.pipeline.stage import run_stage

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    sampler = Sampler(actor=actor)
    ray.init(
        num_cpus=max(4, os.cpu_count() or 1), object_store_memory=store, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    sampler.start()
    started = time.perf_counter()
    try:
        result = run_stage(stage, validate_config(tree))
    finally:
        sampler.stopped.set()
        sampler.join()
        ray.shutdown()
    assert result is not None
    return result.counts, time.perf_counter() - started, sampler.peak


def measure(root: Path, scratch: Path, distinct: int, rows_per_part: int, store: int) -> dict[str, Any]:
    """One run of the stage on a Ray of its own: peaks, rate, and what it found."""
    tree = {
        "run": str(scratch / f"run-{root.name}"),
        "data": {"format": "csv", "root": str(root), "label_columns": ["Finding"], "patient_column": "patient"},
        "encoder": {"name": ENCODER, "rows_per_part": rows_per_part},
    }
    counts, seconds, peak = sampled("extract", tree, store)
    rows = counts["images"]
    whole = counts["encoded"] == rows and counts["rejected"] == 0
    return {
        "rows": rows,
        "seconds": seconds,
        "peak_bytes": peak,
        "duplicates": counts["duplicates"],
        "duplicates_expected": rows - distinct,
        "right": whole and counts["duplicates"] == rows - distinct,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[CHEXPERT // 10, CHEXPERT // 2, CHEXPERT])
    parser.add_argument("--distinct", type=int, default=400)
    parser.add_argument("--rows-per-part", type=int, default=1024)
    parser.add_argument("--store-mb", type=int, default=1000, help="Ray's object store: what is decoded and not yet encoded lies there")
    parser.add_argument("--json", help="write the figures here too")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    figures = []
    print("| rows | minutes | images/s | driver | encoder's actor | largest worker | all processes | object store | duplicates (expected) |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        names = make_collection(Path(scratch), arguments.distinct)
        for count in arguments.rows:
            root = link_rows(Path(scratch), names, count)
            one = measure(root, Path(scratch), arguments.distinct, arguments.rows_per_part, int(arguments.store_mb * MB))
            figures.append(one)
            memory = " | ".join(f"{one['peak_bytes'].get(k, 0) / MB:.0f} MB" for k in ("driver", "actor", "worker", "all", "store"))
            rate = one["rows"] / one["seconds"]
            print(
                f"| {one['rows']} | {one['seconds'] / 60:.1f} | {rate:.0f} | {memory} | {one['duplicates']} ({one['duplicates_expected']}) |",
                flush=True,
            )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(f["right"] for f in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
