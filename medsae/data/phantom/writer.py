"""Writes phantoms as a folder in CheXpert's layout, on all cores."""

from __future__ import annotations

import csv
import multiprocessing
import os
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from medsae.data.phantom.model import ANATOMY, FINDINGS, NUISANCES
from medsae.data.phantom.render import render
from medsae.data.phantom.sampling import LABELS, Row, rows
from medsae.errors import DataError
from medsae.memory import keep_freed_memory
from medsae.progress import progress

COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS)
"""Columns of CheXpert's CSV files."""

CHUNK = 16
"""Images that one task of a worker draws."""


def _draw(folder: str, chunk: list[Row], size: int) -> int:
    for row in chunk:
        path = Path(folder, row.relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(row.phantom, size)).save(path, "JPEG", quality=92)
    return len(chunk)


def _value(label: float | None) -> str:
    return "" if label is None else f"{label:.1f}"


def _write_tables(folder: Path, drawn: list[Row]) -> None:
    name = folder.resolve().name
    by_split = {split: [r for r in drawn if r.split == split] for split in ("train", "valid")}
    for split, members in by_split.items():
        if not members:
            continue
        with open(folder / f"{split}.csv", "w", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(COLUMNS)
            for r in members:
                a, c = r.phantom.anatomy, r.phantom.capture
                labels = [_value(r.labels[label]) for label in LABELS]
                writer.writerow([f"{name}/{r.relative}", a.sex, a.age, c.view.capitalize(), c.projection, *labels])
    with open(folder / "truth.csv", "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["Path", *FINDINGS, *NUISANCES, *ANATOMY])
        for r in drawn:
            p = r.phantom
            severities = [f"{getattr(p.findings, f):.4f}" for f in FINDINGS]
            writer.writerow(
                [f"{name}/{r.relative}", *severities, *(getattr(p.capture, n) for n in NUISANCES), *(getattr(p.anatomy, n) for n in ANATOMY)]
            )


def write_phantoms(directory: str | Path, images: int, seed: int = 0, size: int = 320, workers: int | None = None) -> dict[str, Any]:
    """Draws a collection of phantom radiographs in CheXpert's layout.

    `train.csv` and `valid.csv` (15 % of the patients) have CheXpert's columns; `truth.csv` has the true severity of every planted finding
    and every nuisance. The bytes depend on `images`, `seed`, `size` and the folder's name alone, not on `workers`. A phantom folder that
    is there already is replaced.

    Args:
        directory: folder to write; it must be new, empty, or one that this function wrote.
        images: number of images, all views together.
        seed: decides everything.
        size: pixels of an image's shorter side, 64 to 2048.
        workers: processes; default one a core.

    Returns:
        `images`, `patients`, `studies`, `train`, `valid`, `lateral` and `labels` (label to number of positive images).

    Raises:
        DataError: arguments out of range, or a folder that holds other things.
    """
    if images < 1:
        raise DataError(f"phantoms: images must be at least 1, got {images}")
    if seed < 0:
        raise DataError(f"phantoms: seed must not be negative, got {seed}")
    if not 64 <= size <= 2048:
        raise DataError(f"phantoms: size must be 64 to 2048 pixels, got {size}")
    if workers is not None and workers < 1:
        raise DataError(f"phantoms: workers must be at least 1, got {workers}")
    folder = Path(directory)
    _prepare(folder)
    drawn = list(rows(images, seed))
    chunks = [drawn[i : i + CHUNK] for i in range(0, images, CHUNK)]
    count = min(workers or os.cpu_count() or 1, len(chunks))
    with progress(images, "phantoms", "image") as bar:
        if count == 1:
            for chunk in chunks:
                bar.update(_draw(str(folder), chunk, size))
        else:
            # Spawned, not forked: the caller may hold threads (torch, Ray) that a fork would break.
            with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), keep_freed_memory) as pool:
                queue = iter(chunks)
                running = [pool.submit(_draw, str(folder), c, size) for c in islice(queue, 4 * count)]
                while running:
                    bar.update(running.pop(0).result())
                    running += [pool.submit(_draw, str(folder), c, size) for c in islice(queue, 1)]
    _write_tables(folder, drawn)
    return _counts(drawn)


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = {p.name for p in folder.iterdir()}
        if present and not ("truth.csv" in present and present <= {"train", "valid", "train.csv", "valid.csv", "truth.csv"}):
            raise DataError(f"phantoms: {folder} holds other files; give a new or empty folder")
        for name in present:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        # From here on the folder is recognised as ours, also when drawing is interrupted.
        (folder / "truth.csv").touch()
    except OSError as error:
        raise DataError(f"phantoms: {folder} cannot be written: {error.strerror}") from error


def _counts(drawn: list[Row]) -> dict[str, Any]:
    splits = Counter(r.split for r in drawn)
    return {
        "images": len(drawn),
        "patients": len({r.patient for r in drawn}),
        "studies": len({(r.patient, r.study) for r in drawn}),
        "train": splits["train"],
        "valid": splits["valid"],
        "lateral": sum(r.phantom.capture.view == "lateral" for r in drawn),
        "labels": {label: sum(r.labels[label] == 1.0 for r in drawn) for label in LABELS},
    }
