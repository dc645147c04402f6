"""Activations of chosen neurons over the measured images, made on Ray from the embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray
import scipy.sparse as sp

from medsae.artifacts import RAW, Embeddings, RunDir, embedding_parts, label_names, read_part
from medsae.config import RunConfig
from medsae.data.manifest import read_columns
from medsae.errors import ArtifactError, DataError, MedSAEError
from medsae.metrics.labels import apply_policy, as_binary
from medsae.naming.exemplars import Images, naming_half, rectify, unit_centred
from medsae.progress import progress

PARTS_PER_TASK = 8
TOLD = 500
"""Characters of a CSV column that are told of an image."""


@dataclass(frozen=True)
class Table:
    """The measured images: `images` with centred embeddings, `targets` [n, C] under the label policy, `labels` their names."""

    images: Images
    targets: np.ndarray
    labels: list[str]


def _split(config: RunConfig) -> str | None:
    return None if config.measure.split == "all" else config.measure.split


def read_images(config: RunConfig, run: RunDir, facts: Sequence[str] = (), columns: Sequence[str] = ()) -> Table:
    """The images of the measured split, in the order of the parts; `facts` are fields of the embeddings' table, `columns` of the CSV, to tell of each image.

    Raises:
        ArtifactError: there is none.
        DataError: a column of the CSV is missing, or says nothing about any of the images.
    """
    names = label_names(run)
    parts = [read_part(run, p, names, _split(config)) for p in embedding_parts(run)]
    parts = [p for p in parts if len(p)]
    if not parts:
        raise ArtifactError(f"{run.path('embeddings')} has no image in the split {config.measure.split!r}; set measure.split to all")

    def column(name: str) -> np.ndarray:
        return np.concatenate([p.column(name).astype(str) for p in parts])

    patients = column("patient_id")
    x = unit_centred(np.concatenate([p.x for p in parts]))
    told = None
    if facts or columns:
        known = {f: column(f).tolist() for f in facts} | _of_csv(config, columns, column("image_id").tolist())
        rows = zip(*known.values(), strict=True)
        told = np.array([", ".join(f"{f} {v}" for f, v in zip(known, row, strict=True) if v not in ("", "nan")) for row in rows])
    # Numbers instead of names: they are compared for every neuron.
    _, codes = np.unique(patients, return_inverse=True)
    images = Images(column("image_id"), column("path"), codes, x, naming_half(patients, config.seed), told)
    targets = np.concatenate([as_binary(apply_policy(p.labels, config.data.uncertain, config.data.blank)) for p in parts])
    return Table(images, targets, names)


def _of_csv(config: RunConfig, columns: Sequence[str], image_ids: list[str]) -> dict[str, list[str]]:
    """What the CSV says of images in some columns, cut to `TOLD` characters; '' where it says nothing."""
    if not columns:
        return {}
    ids, values = read_columns(config.data, list(columns))
    row = {image: i for i, image in enumerate(ids)}
    if not set(image_ids) & set(row):
        raise DataError(
            f"name.columns: the CSV files of {config.data.root} say nothing about any of the measured images; is data.root the right one?"
        )
    return {c: [" ".join(values[c][row[i]].split())[:TOLD] if i in row else "" for i in image_ids] for c in columns}


def _columns(run: RunDir, target: str, neurons: np.ndarray, split: str | None, parts: list[str]) -> sp.csc_matrix:
    """Activations of `neurons` on the images of some parts, [n, k]."""
    names = label_names(run)
    pieces = [sp.csr_matrix((0, len(neurons)), dtype=np.float32)]
    sae = None
    if target != RAW:
        from medsae.sae import load

        sae = load((run, target))
    for path in parts:
        part: Embeddings = read_part(run, path, names, split)
        for start in range(0, len(part), 1024):
            x = part.x[start : start + 1024]
            z = x if sae is None else sae.encode(x)
            pieces.append(sp.csr_matrix(np.asarray(z, np.float32)[:, neurons]))
    return sp.vstack(pieces).tocsc()


def read_activations(config: RunConfig, run: RunDir, target: str, neurons: list[int]) -> sp.csc_matrix:
    """Activations [n, len(neurons)] of the images of `read_images`, in its order; signed features are rectified at their upper 5 %. Ray is connected."""
    task = ray.remote(_columns).options(name=f"activations {target}", num_cpus=1)
    index = ray.put(np.asarray(neurons, np.int64))
    parts = embedding_parts(run)
    refs = [task.remote(run, target, index, _split(config), parts[i : i + PARTS_PER_TASK]) for i in range(0, len(parts), PARTS_PER_TASK)]
    pieces = []
    with progress(len(refs), f"activations {target}", "task") as bar:
        for ref in refs:
            try:
                pieces.append(ray.get(ref))
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, MedSAEError) else error from None
            bar.update(1)
    z = sp.vstack(pieces).tocsc()
    if target != RAW:
        return z
    dense = z.toarray()
    return sp.csc_matrix(np.column_stack([rectify(dense[:, j]) for j in range(dense.shape[1])]) if dense.shape[1] else dense)
