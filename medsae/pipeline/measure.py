"""measure: the raw features and every SAE, measured the same way.

First pass: moments of every neuron. Then neurons are chosen per label on each half of the patients. Second pass: their activations, for intervals
by bootstrap over patients, and the null of the best of m. The tasks stand in `measure_tasks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from medsae.artifacts import RAW, RunDir, embedding_parts, label_names, read_embeddings, read_part
from medsae.config import RunConfig
from medsae.errors import ArtifactError
from medsae.metrics.baselines import PREFIX, fit
from medsae.metrics.comparison import Measured, compare, null_figures, selected_figures
from medsae.metrics.features import Features
from medsae.metrics.inference import bootstrap_selected, donor_permutation, select
from medsae.metrics.tables import exemplars_table, neurons_table, number, summary
from medsae.metrics.targets import CONFOUNDS, KeyedRows, image_keys, patient_fold, target_values
from medsae.pipeline.cluster import ray_session
from medsae.pipeline.measure_tasks import Null, Plan, Second, Side, first_pass, second_pass
from medsae.pipeline.stage import StageResult


@dataclass(frozen=True)
class Images:
    """What is known of every image of the split, in the order of the parts.

    `targets` [N, T] (labels first), `patient` index [N], `fold` [N], `where` image key to (image_id, path), `offsets` part to its first row.
    """

    targets: np.ndarray
    patient: np.ndarray
    fold: np.ndarray
    where: dict[int, tuple[str, str]]
    offsets: dict[str, int]

    def __len__(self) -> int:
        return len(self.patient)


def run(config: RunConfig, run: RunDir) -> StageResult:
    """Measures the raw features and every SAE of the configuration.

    Raises:
        ArtifactError: there are no embeddings, none in the split, or an SAE is missing or does not fit.
    """
    with ray_session(config.ray):
        plan, side = prepare(config, run)
        images = read_images(plan, side)
        shared = ray.put(side)
        null = permuted_labels(plan, images)
        null_ref = ray.put(null)
        measured, outputs = {}, {}
        for name, features in [(RAW, None), *fit_baselines(plan), *((s.name, None) for s in config.sae)]:
            measured[name], files = measure_one(plan, shared, images, name, features, null, null_ref)
            outputs.update(files)
        for stale in set(run.folders("measure")) - set(measured):
            if stale.startswith(PREFIX):
                run.delete(f"measure/{stale}")
        outputs.update(publish_comparison(plan, measured, [s.name for s in config.sae]))
    return StageResult(counts={"images": len(images), "features": len(measured)}, outputs=outputs)


def prepare(config: RunConfig, run: RunDir) -> tuple[Plan, Side]:
    """Reads what the tasks share."""
    names = label_names(run)
    dim = read_part(run, embedding_parts(run)[0], names).x.shape[1]
    side = Side(None, _read_reference(config.measure.reference) if config.measure.reference else None)
    count = len(names) + len(CONFOUNDS) + (side.truth.values.shape[1] if side.truth else 0)
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


def fit_baselines(plan: Plan) -> list[tuple[str, Features]]:
    """The configured baselines, fitted on the training split (on all images where there is none)."""
    names = plan.config.measure.baselines
    if not names:
        return []
    x = read_embeddings(plan.run, "train").x
    if len(x) < 2:
        x = read_embeddings(plan.run).x
    return [(f"{PREFIX}{name}", fit(name, x, plan.config.sae[0], plan.config.seed)) for name in dict.fromkeys(names)]


def read_images(plan: Plan, side: Side) -> Images:
    """Everything of the split but the embeddings.

    Raises:
        ArtifactError: no image in the split.
    """
    data = plan.config.data
    targets, patients, total = [], [], 0
    where: dict[int, tuple[str, str]] = {}
    offsets: dict[str, int] = {}
    for path in embedding_parts(plan.run):
        part = read_part(plan.run, path, plan.labels, plan.split)
        if not len(part):
            continue
        offsets[path] = total
        total += len(part)
        ids = part.column("image_id")
        where.update(zip(image_keys(ids).tolist(), zip(ids.tolist(), part.column("path").tolist(), strict=True), strict=True))
        targets.append(target_values(part, data.uncertain, data.blank, side.truth))
        patients.append(part.column("patient_id").astype(str))
    if not total:
        raise ArtifactError(f"{plan.run.path('embeddings')} has no image in the split {plan.config.measure.split!r}; set measure.split to all")
    names = np.concatenate(patients)
    _, index = np.unique(names, return_inverse=True)
    return Images(np.concatenate(targets), index, patient_fold(names, plan.config.seed), where, offsets)


def permuted_labels(plan: Plan, images: Images) -> Null | None:
    """The permutations of the labels over the patients; the same for all features."""
    count = plan.config.measure.permutations
    if not count:
        return None
    labels = images.targets[:, : len(plan.labels)].astype(np.float32)
    donors = donor_permutation(images.patient, count, plan.config.seed)
    with np.errstate(invalid="ignore"):
        given = ~np.isnan(labels)
        mean = np.stack([np.nan_to_num(labels)[d].sum(0) / np.maximum(given[d].sum(0), 1) for d in donors]).ravel()
    return Null(labels, donors, mean.astype(np.float32), bool(np.isnan(labels).any()))


def measure_one(
    plan: Plan, side: Any, images: Images, name: str, features: Features | None, null: Null | None, null_ref: Any
) -> tuple[Measured, dict[str, str]]:
    """Both passes of one set of features; writes `measure/NAME/` but for the comparison."""
    settings, labels = plan.config.measure, plan.labels
    count = len(labels)
    features_ref = ray.put(features)
    state = first_pass(plan, side, name, features_ref)
    halves = [m.compute()[:, :count] for m in state.moments]
    signed, either = select(halves), select(halves, absolute=True)
    neurons = np.unique(np.concatenate([signed.neurons.ravel(), either.neurons.ravel()]))
    neurons = neurons[neurons >= 0]
    pooled = state.pooled().select([0])
    spread = np.sqrt(pooled.m2[:, 0] / max(pooled.n[0], 1))
    second = Second(neurons, np.where(spread > 0, spread, 1.0).astype(np.float32), images.offsets)
    values, null_state = second_pass(plan, name, features_ref, second, null_ref)
    activations = {int(j): values[:, i] for i, j in enumerate(neurons)}
    targets = images.targets[:, :count]
    draws = [bootstrap_selected(s, activations, targets, images.patient, images.fold, settings.bootstrap, plan.config.seed) for s in (signed, either)]
    best_null = None
    if null is not None and null_state is not None:
        given = ~np.isnan(null.labels)
        n = np.stack([given[d].sum(0) for d in null.donors]).ravel()
        best_null = null_state.best(n, np.sqrt(null.mean * (1 - null.mean)))
    whole = state.pooled().compute()[:, :count]
    found = Measured(name, halves, whole, signed, either, draws[0], draws[1], best_null)
    figures = summary(name, state, labels, settings.alive_correlation)
    figures["split"] = settings.split
    figures["reference"] = settings.reference or "circular: the embeddings themselves"
    figures["zero_shot"] = None
    figures["encoder"] = plan.run.read_manifest().get("encoder")
    figures["selected"] = selected_figures(found, labels)
    figures["null"] = null_figures(found, labels)
    outputs = {}
    for file, table in (
        ("neurons.parquet", neurons_table(state, labels, settings.alive_correlation)),
        ("exemplars.parquet", exemplars_table(state, images.where, settings.exemplars)),
    ):
        outputs[f"measure/{name}/{file}"] = plan.run.write_table(f"measure/{name}/{file}", table)
    path = f"measure/{name}/summary.json"
    outputs[path] = plan.run.write_json(path, number(figures))
    return found, outputs


def publish_comparison(plan: Plan, measured: dict[str, Measured], saes: list[str]) -> dict[str, str]:
    """Writes `measure/headline.json` and the difference to the raw features into every summary."""
    settings = plan.config.measure
    outputs = {}
    comparisons = []
    for name, found in measured.items():
        for base in [b for b in measured if b not in saes]:
            if base == name or (name not in saes and base != RAW):
                continue
            comparisons.append(compare(found, measured[base], plan.labels, settings.draws, plan.config.seed))
        path = f"measure/{name}/summary.json"
        figures = plan.run.read_json(path)
        figures["difference"] = next((number(c) for c in comparisons if c["name"] == name and c["baseline"] == RAW), None)
        outputs[path] = plan.run.write_json(path, figures)
    first = next(c for c in comparisons if c["name"] == saes[0] and c["baseline"] == RAW)
    headline = {
        "split": settings.split,
        "bootstrap": settings.bootstrap,
        "permutations": settings.permutations,
        **first,
        "comparisons": comparisons,
        "method": "Neurons chosen per label on one half of the patients, reported on the other, halves swapped and averaged; mean over labels. "
        "Intervals: 95 %, bootstrap over patients with the chosen neurons held fixed, the same patients drawn for both sides.",
    }
    outputs["measure/headline.json"] = plan.run.write_json("measure/headline.json", number(headline))
    return outputs
