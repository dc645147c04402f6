"""measure: mergeable partials per group of embedding parts on Ray, reduced in a tree, for the raw features and every SAE.

Activations are made on the fly and never stored. The tree depends on the parts alone, not on the cluster: the same run gives the same digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import ray

from medsae.artifacts import RAW, Embeddings, RunDir, embedding_parts, label_names, read_part
from medsae.config import RunConfig
from medsae.errors import ArtifactError, MedSAEError
from medsae.metrics.columns import Columns, as_array
from medsae.metrics.features import Features, RawFeatures, SAEFeatures
from medsae.metrics.state import MeasureState
from medsae.metrics.tables import exemplars_table, neurons_table, number, summary
from medsae.metrics.targets import KeyedRows, image_keys, patient_fold, target_values
from medsae.pipeline.cluster import ray_session
from medsae.pipeline.stage import StageResult
from medsae.progress import progress

PARTS_PER_TASK = 8
ARITY = 4
"""Partials merged by one task of the tree."""
BATCH_BYTES = 64 * 2**20


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


def run(config: RunConfig, run: RunDir) -> StageResult:
    """Measures the raw features and every SAE of the configuration.

    Raises:
        ArtifactError: there are no embeddings, none in the split, or an SAE is missing or does not fit.
    """
    with ray_session(config.ray):
        plan, side = prepare(config, run)
        outputs: dict[str, str] = {}
        counts: dict[str, Any] = {}
        meta = _image_paths(plan)
        if not meta:
            raise ArtifactError(f"{run.path('embeddings')} has no image in the split {config.measure.split!r}; set measure.split to all")
        counts["images"] = len(meta)
        for name in [RAW, *(s.name for s in config.sae)]:
            state = reduce_parts(plan, side, name, None)
            found = publish(plan, name, state, meta)
            outputs.update(found)
    counts["features"] = 1 + len(config.sae)
    return StageResult(counts=counts, outputs=outputs)


def prepare(config: RunConfig, run: RunDir) -> tuple[Plan, Side]:
    """Reads what the tasks share."""
    names = label_names(run)
    parts = embedding_parts(run)
    dim = read_part(run, parts[0], names).x.shape[1]
    side = Side(None, _read_reference(config.measure.reference) if config.measure.reference else None)
    count = len(names) + 4 + (side.truth.values.shape[1] if side.truth else 0)
    reference_dim = side.reference.values.shape[1] if side.reference else dim
    return Plan(run, config, names, dim, count, reference_dim), side


def _read_reference(uri: str) -> KeyedRows:
    other = RunDir(uri)
    names = label_names(other)
    parts = [read_part(other, p, names) for p in embedding_parts(other)]
    keys = np.concatenate([image_keys(p.column("image_id")) for p in parts])
    values = np.concatenate([p.x for p in parts])
    order = np.argsort(keys)
    return KeyedRows([], keys[order], values[order])


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
                top = max(plan.config.measure.exemplars, 1)
                state = MeasureState(z.shape[1], plan.target_count, plan.dim, plan.reference_dim, top, features.signed)
            x_hat = features.decode(z)
            reference = part.x[rows] if side.reference is None else side.reference.take(keys[rows])
            x = None if x_hat is None else part.x[rows]
            state.update(Columns(z), targets[rows], fold[rows], keys[rows], reference, x, None if x_hat is None else as_array(x_hat))
    return state


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


def groups(parts: list[str], size: int = PARTS_PER_TASK) -> list[list[str]]:
    """Parts in runs of `size`, in order."""
    return [parts[i : i + size] for i in range(0, len(parts), size)]


def reduce_parts(plan: Plan, side: Side, name: str, given: Features | None) -> MeasureState:
    """The state of all parts: a task a group of parts, merged in a tree as they finish."""
    fold = ray.remote(fold_parts).options(name=f"measure {name}", num_cpus=1)
    merge = ray.remote(merge_states).options(name="merge", num_cpus=1)
    shared, features = ray.put(side), ray.put(given)
    level = [fold.remote(plan, shared, name, features, g) for g in groups(embedding_parts(plan.run))]
    waiting = list(level)
    while len(level) > 1:
        level = [merge.remote(*level[i : i + ARITY]) if len(level[i : i + ARITY]) > 1 else level[i] for i in range(0, len(level), ARITY)]
    wait_all(waiting, f"measure {name}")
    del waiting
    result = get(level[0])
    if result is None:
        raise ArtifactError(f"{plan.run.path('embeddings')} has no image in the split {plan.config.measure.split!r}; set measure.split to all")
    return result


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


def _image_paths(plan: Plan) -> dict[int, tuple[str, str]]:
    """Image key to (image_id, path) of every image of the split."""
    found: dict[int, tuple[str, str]] = {}
    for path in embedding_parts(plan.run):
        table = plan.run.read_table(path, ["image_id", "path", "split"])
        if plan.split is not None:
            table = table.filter(pc.equal(table["split"], plan.split))
        for image_id, image_path in zip(table["image_id"].to_pylist(), table["path"].to_pylist(), strict=True):
            found[int(image_id, 16)] = (image_id, image_path)
    return found


def publish(plan: Plan, name: str, state: MeasureState, meta: dict[int, tuple[str, str]]) -> dict[str, str]:
    """Writes the artifacts of one name; relative paths to SHA-256."""
    settings = plan.config.measure
    figures = summary(name, state, plan.labels, settings.alive_correlation)
    figures["split"] = settings.split
    figures["reference"] = settings.reference or "circular: the embeddings themselves"
    figures["zero_shot"] = None
    figures["encoder"] = plan.run.read_manifest().get("encoder")
    outputs = {}
    for file, table in (
        ("neurons.parquet", neurons_table(state, plan.labels, settings.alive_correlation)),
        ("exemplars.parquet", exemplars_table(state, meta, settings.exemplars)),
    ):
        path = f"measure/{name}/{file}"
        outputs[path] = plan.run.write_table(path, table)
    path = f"measure/{name}/summary.json"
    outputs[path] = plan.run.write_json(path, number(figures))
    return outputs
