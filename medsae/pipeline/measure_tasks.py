"""The Ray tasks of measure: two passes over the embedding parts, partials merged in a tree.

The first pass makes the moments; the second, once neurons are chosen, gathers the activations of those few and the null of the best of m.
Activations are made on the fly and never stored. The tree depends on the parts alone, not on the cluster: the same run gives the same digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import scipy.sparse as sp

from medsae.artifacts import RAW, Embeddings, RunDir, embedding_parts, read_part
from medsae.config import RunConfig
from medsae.errors import ArtifactError, MedSAEError
from medsae.metrics.columns import Columns, as_array
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
BATCH_BYTES = 64 * 2**20
SPARSE_SHARE = 0.03
"""Below this share of nonzeros the null is summed sparsely."""


@dataclass(frozen=True)
class Plan:
    """What every task needs to know; small, and the same for all."""

    run: RunDir
    config: RunConfig
    labels: list[str]
    dim: int
    target_count: int
    reference_dim: int

    @property
    def split(self) -> str | None:
        return None if self.config.measure.split == "all" else self.config.measure.split


@dataclass(frozen=True)
class Side:
    """What comes from outside the embeddings, found by image key."""

    truth: KeyedRows | None = None
    reference: KeyedRows | None = None


@dataclass(frozen=True)
class Null:
    """What the permutation null needs of all images: labels [N, C] (NaN missing), donors [P, N], mean of every permuted label [P * C]."""

    labels: np.ndarray
    donors: np.ndarray
    mean: np.ndarray
    masked: bool


@dataclass(frozen=True)
class Second:
    """What the second pass is asked: activations of `neurons`; each neuron's standard deviation [m] scales it in the null."""

    neurons: np.ndarray
    spread: np.ndarray
    offsets: dict[str, int]


def load_features(plan: Plan, name: str, given: Features | None) -> Features:
    """The features of a name: handed over, the raw ones, or the SAE of the run directory."""
    if given is not None:
        return given
    if name == RAW:
        return RawFeatures()
    from medsae.sae import load

    return SAEFeatures(load((plan.run, name)))


def batches(part: Embeddings, features: Features, rows: int | None) -> Iterator[tuple[slice, np.ndarray]]:
    """Activations of a part in batches of about BATCH_BYTES."""
    start, step = 0, rows or 256
    while start < len(part):
        z = as_array(features.encode(part.x[start : start + step]))
        yield slice(start, start + step), z
        start += step
        step = rows or int(np.clip(BATCH_BYTES // (4 * z.shape[1]), 256, 16384))


def fold_parts(plan: Plan, side: Side, name: str, given: Features | None, parts: list[str]) -> MeasureState | None:
    """The state of some parts, one after the other; None where they hold no image of the split."""
    features = load_features(plan, name, given)
    state: MeasureState | None = None
    data = plan.config.data
    for path in parts:
        part = read_part(plan.run, path, plan.labels, plan.split)
        if not len(part):
            continue
        if part.x.shape[1] != plan.dim:
            raise ArtifactError(f"{plan.run.path(path)} holds embeddings of width {part.x.shape[1]}, others {plan.dim}; extract again")
        keys = image_keys(part.column("image_id"))
        targets = target_values(part, data.uncertain, data.blank, side.truth)
        fold = patient_fold(part.column("patient_id"), plan.config.seed)
        for rows, z in batches(part, features, plan.config.measure.rows):
            if state is None:
                top = plan.config.measure.exemplars if features.signed else max(plan.config.measure.exemplars, TOP_IMAGES)
                state = MeasureState(z.shape[1], plan.target_count, plan.dim, plan.reference_dim, top, features.signed)
            x_hat = features.decode(z)
            reference = part.x[rows] if side.reference is None else side.reference.take(keys[rows])
            x = None if x_hat is None else part.x[rows]
            state.update(Columns(z), targets[rows], fold[rows], keys[rows], reference, x, None if x_hat is None else as_array(x_hat))
    return state


def second_look(
    plan: Plan, name: str, given: Features | None, second: Second, null: Null | None, parts: list[str]
) -> tuple[list[tuple[int, np.ndarray]], NullState | None]:
    """Activations of the chosen neurons, as (offset of the part, float32 [n, k]), and the null's sums."""
    features = load_features(plan, name, given)
    values: list[tuple[int, np.ndarray]] = []
    state: NullState | None = None
    for path in parts:
        part = read_part(plan.run, path, plan.labels, plan.split)
        if not len(part):
            continue
        offset, chosen = second.offsets[path], []
        for rows, z in batches(part, features, plan.config.measure.rows):
            chosen.append(z[:, second.neurons].astype(np.float32))
            if null is None:
                continue
            if state is None:
                state = NullState(z.shape[1], len(plan.labels), len(null.donors), null.masked)
            images = slice(offset + rows.start, min(offset + rows.stop, offset + len(part)))
            permuted = null.labels[null.donors[:, images]].transpose(1, 0, 2).reshape(len(z), -1)
            given_labels = ~np.isnan(permuted)
            centred = np.where(given_labels, permuted - null.mean, 0).astype(np.float32)
            scaled = z / second.spread if np.count_nonzero(z) > SPARSE_SHARE * z.size else sp.csr_matrix(z).multiply(1 / second.spread).tocsr()
            state.update(scaled, centred, given_labels.astype(np.float32) if null.masked else None)
        values.append((offset, np.concatenate(chosen)))
    return values, state


def merge_looks(*looks: tuple[list[tuple[int, np.ndarray]], NullState | None]) -> tuple[list[tuple[int, np.ndarray]], NullState | None]:
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


def second_pass(plan: Plan, name: str, features: Any, second: Any, null: Any) -> tuple[np.ndarray, NullState | None]:
    """Activations of the chosen neurons of all images, in the order of the parts, float32 [N, k], and the null's sums."""
    values, state = tree(name, second_look, merge_looks, (plan, name, features, second, null), embedding_parts(plan.run))
    return np.concatenate([v for _, v in sorted(values, key=lambda item: item[0])]), state


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
