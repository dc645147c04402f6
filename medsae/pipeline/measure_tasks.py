"""The Ray tasks of measure: two passes over the embedding parts, partials merged in a tree.

The first pass makes the moments; the second, once neurons are chosen, gathers the activations of those few and the null of the best of m.
Activations are made on the fly and never stored. The tree depends on the parts alone, not on the cluster: the same run gives the same digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import scipy.sparse as sp

from medsae.artifacts import RAW, Embeddings, RunDir, embedding_parts, read_meta, read_part
from medsae.config import RunConfig
from medsae.errors import ArtifactError, MedSAEError
from medsae.metrics.columns import as_array, as_rows
from medsae.metrics.detection import TOP_IMAGES
from medsae.metrics.features import Features, RawFeatures, SAEFeatures
from medsae.metrics.inference import NullState
from medsae.metrics.linear import probe_features
from medsae.metrics.state import MeasureState
from medsae.metrics.targets import KeyedRows, image_keys, patient_fold, target_values
from medsae.progress import progress

PARTS_PER_TASK = 8
ARITY = 4
"""Partials merged by one task of the tree."""
BLOCK_BYTES = 4 * 2**20
BATCH_ENTRIES = 1 << 22
NULL_ROWS = 2048
"""Images whose permuted labels are in memory at once."""
SPARSE_SHARE = 0.03
"""Below this share of nonzeros the null is summed sparsely."""


@dataclass(frozen=True)
class Plan:
    """What every task needs to know; small, and the same for all."""

    run: RunDir
    config: RunConfig
    labels: list[str]
    columns: list[int]
    """Where the labels stand among those of the run."""
    dim: int
    reference_dim: int
    confounds: list[str]
    images: np.ndarray | None = None
    """Keys of the images to measure, ascending; None: all of the split."""

    @property
    def split(self) -> str | None:
        return None if self.config.measure.split == "all" else self.config.measure.split

    def of_images(self, images: np.ndarray | None) -> Plan:
        """The same for some images only."""
        return replace(self, images=images)

    def read(self, path: str, meta_only: bool = False) -> Embeddings:
        """The measured images of a part, with the measured labels; `meta_only` leaves the embeddings unread (width 0)."""
        part = (read_meta if meta_only else read_part)(self.run, path, self.labels, self.split)
        labels, x, meta = part.labels, part.x, part.meta
        if self.images is not None and len(part):
            keep = np.isin(image_keys(part.column("image_id")), self.images)
            labels, x, meta = labels[keep], x[keep], meta.filter(pa.array(keep))
        return Embeddings(x, labels[:, self.columns] if len(labels) else labels, self.labels, meta)


@dataclass(frozen=True)
class Side:
    """What comes from outside the embeddings, found by image key: phantom truth, reference embeddings, further confounds."""

    truth: KeyedRows | None = None
    reference: KeyedRows | None = None
    extra: KeyedRows | None = None


@dataclass(frozen=True)
class Null:
    """What the permutation null needs of all images: labels [N, C] (NaN missing), donors [P, N]; images, mean and standard deviation of every
    permuted label [P * C]."""

    labels: np.ndarray
    donors: np.ndarray
    n: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    masked: bool

    def add(self, state: NullState, z: Any, first: int, spread: np.ndarray) -> None:
        """Adds activations [n, m] (numpy or CSR) of the images from row `first` on to a state; each neuron is divided by its `spread` [m]."""
        permuted = self.labels[self.donors[:, first : first + z.shape[0]]].transpose(1, 0, 2).reshape(z.shape[0], -1)
        given = ~np.isnan(permuted)
        centred = np.where(given, permuted - self.mean, 0).astype(np.float32)
        if sp.issparse(z) and z.nnz > SPARSE_SHARE * z.shape[0] * z.shape[1]:
            z = z.toarray()
        scaled = z.multiply(1 / spread).tocsr() if sp.issparse(z) else z / spread
        state.update(scaled, centred, given.astype(np.float32) if self.masked else None)


@dataclass(frozen=True)
class Second:
    """What the second pass is asked: activations of `neurons`; each neuron's standard deviation [m] scales it in the null; cosine similarity of
    embeddings and reconstructions with text directions `axes` [K, d]."""

    neurons: np.ndarray
    spread: np.ndarray
    offsets: dict[str, int]
    axes: np.ndarray | None = None


def load_features(plan: Plan, name: str, given: Features | None) -> Features:
    """The features of a name: handed over, the raw ones, or the SAE of the run directory."""
    if given is not None:
        return given
    if name == RAW:
        return RawFeatures()
    from medsae.sae import load

    return SAEFeatures(load((plan.run, name)))


def read_group(plan: Plan, parts: list[str]) -> Embeddings | None:
    """The images of some parts that are in the split, as one; None where there is none.

    Raises:
        ArtifactError: a part's embeddings are of another width.
    """
    found: list[Embeddings] = []
    for path in parts:
        part = plan.read(path)
        if len(part):
            if part.x.shape[1] != plan.dim:
                raise ArtifactError(f"{plan.run.path(path)} holds embeddings of width {part.x.shape[1]}, others {plan.dim}; extract again")
            found.append(part)
    if not found:
        return None
    meta = pa.concat_tables([p.meta for p in found])
    return Embeddings(np.concatenate([p.x for p in found]), np.concatenate([p.labels for p in found]), plan.labels, meta)


def batches(x: np.ndarray, features: Features, rows: int | None) -> Iterator[tuple[slice, Any]]:
    """Activations of embeddings [n, d], batch by batch, as numpy arrays or CSR matrices.

    They are made in blocks of about BLOCK_BYTES. Dense blocks are batches; sparse ones are compressed and collected up to BATCH_ENTRIES, for what is
    done once a batch costs O(m (C + D)) however few images it has.
    """
    begin, stop, step = 0, 0, rows or 256
    blocks: list[sp.csr_matrix] = []
    while stop < len(x):
        z = as_rows(features.encode(x[stop : stop + step]))
        start, stop = stop, min(stop + step, len(x))
        step = rows or int(np.clip(BLOCK_BYTES // (4 * z.shape[1]), 128, 16384))
        if blocks and not sp.issparse(z):
            yield slice(begin, start), sp.vstack(blocks, format="csr")
            blocks = []
        if not sp.issparse(z):
            yield slice(start, stop), z
            begin = stop
            continue
        blocks.append(z)
        if stop == len(x) or sum(b.nnz for b in blocks) > BATCH_ENTRIES:
            yield slice(begin, stop), sp.vstack(blocks, format="csr")
            blocks, begin = [], stop


def fold_parts(plan: Plan, side: Side, name: str, given: Features | None, parts: list[str]) -> MeasureState | None:
    """The state of some parts; None where they hold no image of the split."""
    features = load_features(plan, name, given)
    group = read_group(plan, parts)
    if group is None:
        return None
    state: MeasureState | None = None
    settings, data = plan.config.measure, plan.config.data
    keys = image_keys(group.column("image_id"))
    targets = target_values(group, data.uncertain, data.blank, side.extra, side.truth)
    fold = patient_fold(group.column("patient_id"), plan.config.seed)
    for rows, z in batches(group.x, features, settings.rows):
        if state is None:
            top = settings.exemplars if features.signed else max(settings.exemplars, TOP_IMAGES)
            state = MeasureState(z.shape[1], targets.shape[1], plan.dim, plan.reference_dim, top, features.signed)
        x = group.x[rows]
        x_hat = features.decode(z)
        reference = x if side.reference is None else side.reference.take(keys[rows])
        state.update(z, targets[rows], fold[rows], keys[rows], reference, None if x_hat is None else x, None if x_hat is None else as_array(x_hat))
    return state


@dataclass(frozen=True)
class Looked:
    """What the second pass found of some images: row of the first, activations of the chosen neurons float32 [n, k], cosine similarities with the
    text directions of the embeddings and of their reconstructions [n, K] or None."""

    offset: int
    chosen: np.ndarray
    texts: np.ndarray | None
    texts_after: np.ndarray | None


def second_look(
    plan: Plan, name: str, given: Features | None, second: Second, null: Null | None, parts: list[str]
) -> tuple[list[Looked], NullState | None]:
    """What `Looked` holds, and the null's sums."""
    features = load_features(plan, name, given)
    group = read_group(plan, parts)
    if group is None:
        return [], None
    offset = min(second.offsets[p] for p in parts if p in second.offsets)
    chosen: list[np.ndarray] = []
    after: list[np.ndarray] = []
    state = None if null is None else NullState(len(second.spread), len(plan.labels), len(null.donors), null.masked)
    for rows, z in batches(group.x, features, plan.config.measure.rows):
        few = z[:, second.neurons]
        chosen.append((few.toarray() if sp.issparse(few) else few).astype(np.float32))
        x_hat = None if second.axes is None else features.decode(z)
        if x_hat is not None and second.axes is not None:
            after.append(text_similarity(as_array(x_hat), second.axes))
        if null is not None and state is not None:
            for start in range(0, z.shape[0], NULL_ROWS):
                null.add(state, z[start : start + NULL_ROWS], offset + rows.start + start, second.spread)
    before = None if second.axes is None else text_similarity(group.x, second.axes)
    return [Looked(offset, np.concatenate(chosen), before, np.concatenate(after) if after else None)], state


def text_similarity(x: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Products [n, K] of unit embeddings and text directions; 0 for an embedding without direction."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray((x / np.where(norm > 0, norm, 1.0)) @ axes.T)


def merge_looks(*looks: tuple[list[Looked], NullState | None]) -> tuple[list[Looked], NullState | None]:
    """Second looks joined."""
    state: NullState | None = None
    for _, other in looks:
        if other is not None:
            state = other if state is None else state.merge(other)
    return [v for values, _ in looks for v in values], state


def merge_states(*states: MeasureState | None) -> MeasureState | None:
    """States merged in order; None stands for no images."""
    merged: MeasureState | None = None
    for state in states:
        if state is not None:
            # Objects from the store are read-only and shared: the first is copied by merging into nothing.
            merged = _fresh(state).merge(state) if merged is None else merged.merge(state)
    return merged


def _fresh(state: MeasureState) -> MeasureState:
    m, t = state.moments[0].co.shape
    d, k = len(state.reconstruction.mean), state.top.k
    return MeasureState(m, t, d, state.monosemanticity.moments.co.shape[1], k, state.signed)


def linear_look(plan: Plan, name: str, given: Features | None, x: np.ndarray, y: np.ndarray, halves: list[Any]) -> dict[str, np.ndarray]:
    """Linear probes of one set of features, as one task."""
    return probe_features(load_features(plan, name, given), x, y, halves)


def groups(parts: list[str], size: int = PARTS_PER_TASK) -> list[list[str]]:
    """Parts in runs of `size`, in order."""
    return [parts[i : i + size] for i in range(0, len(parts), size)]


def tree(name: str, function: Callable[..., Any], merge: Callable[..., Any], arguments: tuple[Any, ...], parts: list[str]) -> Any:
    """`function(*arguments, group)` for every group of parts as a task, merged in a tree as they finish."""
    first = ray.remote(function).options(name=f"measure {name}", num_cpus=1)
    second = ray.remote(merge).options(name=f"merge {name}", num_cpus=1)
    level = [first.remote(*arguments, g) for g in groups(parts)]
    waiting = list(level)
    while len(level) > 1:
        level = [second.remote(*level[i : i + ARITY]) if len(level[i : i + ARITY]) > 1 else level[i] for i in range(0, len(level), ARITY)]
    wait_all(waiting, f"measure {name}")
    del waiting
    return get(level[0])


def first_pass(plan: Plan, side: Any, name: str, features: Any) -> MeasureState:
    """The state of all parts; `side` and `features` may be object references.

    Raises:
        ArtifactError: no image in the split.
    """
    result = tree(name, fold_parts, merge_states, (plan, side, name, features), embedding_parts(plan.run))
    if result is None:
        raise ArtifactError(f"{plan.run.path('embeddings')} has no image in the split {plan.config.measure.split!r}; set measure.split to all")
    merged: MeasureState = result
    return merged


def second_pass(
    plan: Plan, name: str, features: Any, second: Any, null: Any
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, NullState | None]:
    """What `Looked` holds of all images, in the order of the parts, and the null's sums."""
    found, state = tree(name, second_look, merge_looks, (plan, name, features, second, null), embedding_parts(plan.run))
    found = sorted(found, key=lambda look: look.offset)

    def joined(parts: list[np.ndarray | None]) -> np.ndarray | None:
        known = [p for p in parts if p is not None]
        return np.concatenate(known) if known else None

    return np.concatenate([f.chosen for f in found]), joined([f.texts for f in found]), joined([f.texts_after for f in found]), state


def wait_all(refs: list[Any], desc: str) -> None:
    """Waits for tasks with a progress bar; a task's user error is raised as itself."""
    pending = list(refs)
    with progress(len(refs), desc, "task") as bar:
        while pending:
            done, pending = ray.wait(pending, num_returns=1, fetch_local=False)
            bar.update(len(done))


def get(ref: Any) -> Any:
    """`ray.get` with a MedSAEError of the task raised as itself, in one line."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, MedSAEError):
            raise cause from None
        raise
