"""measure: the raw features and every SAE, measured the same way.

First pass: moments of every neuron. Then neurons are chosen per label on each half of the patients. Second pass: their activations, for intervals
by bootstrap over patients, and the null of the best of m. The tasks stand in `measure_tasks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from medsae.artifacts import RAW, RunDir
from medsae.config import RunConfig
from medsae.data.phantom.model import FINDINGS
from medsae.metrics.baselines import PREFIX
from medsae.metrics.calibration import Calibrated, TruthColumns, calibration, reported_auroc, versus
from medsae.metrics.comparison import Measured, compare, null_figures, selected_figures
from medsae.metrics.detection import auroc_columns
from medsae.metrics.features import Features
from medsae.metrics.inference import NullState, Selected, bootstrap_selected, select
from medsae.metrics.labels import as_binary, label_counts
from medsae.metrics.probing import sparse_probing, strongest
from medsae.metrics.state import MeasureState
from medsae.metrics.tables import detection_figures, detection_table, exemplars_table, neurons_table, number, summary
from medsae.pipeline.cluster import ray_session
from medsae.pipeline.measure_inputs import Images, ZeroShot, fit_baselines, permuted_labels, prepare, probe_sample, read_images, zero_shot_axes
from medsae.pipeline.measure_tasks import Null, Plan, Second, first_pass, get, linear_look, second_pass
from medsae.pipeline.stage import StageResult


def run(config: RunConfig, run: RunDir) -> StageResult:
    """Measures the raw features and every SAE of the configuration.

    Raises:
        ArtifactError: there are no embeddings, none in the split, or an SAE is missing or does not fit.
    """
    with ray_session(config.ray):
        plan, side = prepare(config, run)
        images = read_images(plan, side)
        null = permuted_labels(plan, images)
        shared = Shared(ray.put(side), ray.put(null), [ray.put(item) for item in probe_sample(plan, images)], zero_shot_axes(plan))
        measured: dict[str, Measured] = {}
        calibrated: dict[str, Calibrated] = {}
        outputs: dict[str, str] = {}
        for name, features in [(RAW, None), *fit_baselines(plan), *((s.name, None) for s in config.sae)]:
            measured[name], known, files = measure_one(plan, shared, images, name, features, null)
            outputs.update(files)
            if known is not None:
                calibrated[name] = known
        for stale in set(run.folders("measure")) - set(measured):
            if stale.startswith(PREFIX):
                run.delete(f"measure/{stale}")
        outputs.update(publish_comparison(plan, measured, [s.name for s in config.sae]))
        outputs.update(publish_calibration(plan, calibrated, images.truth_names))
    return StageResult(counts={"images": len(images), "features": len(measured)}, outputs=outputs)


@dataclass(frozen=True)
class Shared:
    """References to what the tasks of all features share: `Side`, `Null`, and embeddings, labels and halves of the linear probes; text directions."""

    side: Any
    null: Any
    probe: list[Any]
    axes: ZeroShot | None


def by_label(values: np.ndarray, labels: list[str]) -> dict[str, float | None]:
    """Figures [C] by label, with the mean over those that are defined."""
    defined = values[np.isfinite(values)]
    return {**dict(zip(labels, values.tolist(), strict=True)), "mean": float(defined.mean()) if len(defined) else None}


def zero_shot(axes: ZeroShot | None, scores: np.ndarray | None, targets: np.ndarray, labels: list[str]) -> dict[str, float | None] | None:
    """AUROC per label of mean cosine similarities [N, K] with the text directions; None without any, null for a label without prompts."""
    if axes is None or scores is None:
        return None
    areas = auroc_columns(scores, targets[:, axes.labels])
    return {**dict.fromkeys(labels, None), **{labels[c]: float(a) for c, a in zip(axes.labels, areas, strict=True)}}


def measure_one(
    plan: Plan, shared: Shared, images: Images, name: str, features: Features | None, null: Null | None
) -> tuple[Measured, Calibrated | None, dict[str, str]]:
    """Both passes of one set of features; writes `measure/NAME/` but for the comparison."""
    settings, labels, seed = plan.config.measure, plan.labels, plan.config.seed
    count = len(labels)
    features_ref = ray.put(features)
    state = first_pass(plan, shared.side, name, features_ref)
    choice = Choice.of(state, count, count + len(plan.confounds))
    pooled = state.pooled()
    spread = np.sqrt(pooled.m2[:, 0] / max(pooled.n[0], 1))
    axes = None if shared.axes is None else shared.axes.axes
    second = Second(choice.neurons, np.where(spread > 0, spread, 1.0).astype(np.float32), images.offsets, axes)
    linear = ray.remote(linear_look).options(name=f"probe {name}", num_cpus=1).remote(plan, name, features_ref, *shared.probe)
    values, texts, texts_after, null_state = second_pass(plan, name, features_ref, second, shared.null)
    activations = {int(j): values[:, i] for i, j in enumerate(choice.neurons)}
    targets = images.targets[:, :count]
    present = as_binary(targets)

    def draws(chosen: Selected, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return bootstrap_selected(chosen, activations, columns, images.patient, images.fold, settings.bootstrap, seed)

    found = Measured(
        name,
        choice.halves,
        pooled.compute()[:, :count],
        choice.signed,
        choice.either,
        draws(choice.signed, targets),
        draws(choice.either, targets),
        None if null is None or null_state is None else best_under_null(null, null_state),
    )
    detection = detection_figures(state, images.by_key(count), np.nansum(present, axis=0))
    figures = summary(name, state, labels, settings.alive_correlation)
    figures |= {
        "split": settings.split,
        "reference": settings.reference or "circular: the embeddings themselves",
        "balanced": settings.balanced,
        "label_counts": label_counts(targets, labels),
        "confounds": plan.confounds,
        "zero_shot": zero_shot(shared.axes, texts, present, labels),
        "zero_shot_reconstruction": zero_shot(shared.axes, texts_after, present, labels),
        "encoder": plan.run.read_manifest().get("encoder"),
        "selected": selected_figures(found, labels),
        "null": null_figures(found, labels),
        "detection": detection_table(detection, labels),
        "probing": sparse_probing(choice.probes, activations, present, images.fold, labels, seed)
        | {f"linear_{kind}": by_label(areas, labels) for kind, areas in get(linear).items()},
    }
    folder = f"measure/{name}"
    outputs = {
        f"{folder}/neurons.parquet": plan.run.write_table(
            f"{folder}/neurons.parquet", neurons_table(state, labels, plan.confounds, settings.alive_correlation, detection)
        ),
        f"{folder}/exemplars.parquet": plan.run.write_table(f"{folder}/exemplars.parquet", exemplars_table(state, images.where, settings.exemplars)),
        f"{folder}/summary.json": plan.run.write_json(f"{folder}/summary.json", number(figures)),
    }
    calibrated = None
    if choice.truth is not None:
        truth = images.targets[:, count + len(plan.confounds) :]
        area = reported_auroc(choice.truth, activations, truth, images.fold)
        calibrated = Calibrated(name, choice.truth.mean_r, draws(choice.truth, truth)[0], area)
        whole = pooled.compute()[:, count + len(plan.confounds) :]
        names = images.truth_names
        table = calibration(calibrated, choice.truth, choice.truth_halves, whole, truth, names, TruthColumns.of(names, FINDINGS))
        outputs[f"{folder}/calibration.json"] = plan.run.write_json(f"{folder}/calibration.json", number(table))
    return found, calibrated, outputs


@dataclass(frozen=True)
class Choice:
    """The neurons chosen on each half of the patients: per label by r and by |r|, the strongest few for probes, per truth column by |r|."""

    halves: list[np.ndarray]
    signed: Selected
    either: Selected
    probes: np.ndarray
    truth_halves: list[np.ndarray]
    truth: Selected | None

    @classmethod
    def of(cls, state: MeasureState, labels: int, truth_from: int) -> Choice:
        """From a finished state whose first `labels` targets are labels and whose targets from `truth_from` on are phantom truth."""
        r = [m.compute() for m in state.moments]
        halves, truth = [x[:, :labels] for x in r], [x[:, truth_from:] for x in r]
        chosen = select(truth, absolute=True) if truth[0].shape[1] else None
        return cls(halves, select(halves), select(halves, absolute=True), strongest(halves), truth, chosen)

    @property
    def neurons(self) -> np.ndarray:
        """All of them once, ascending."""
        parts = [self.signed.neurons, self.either.neurons, self.probes, *([] if self.truth is None else [self.truth.neurons])]
        every = np.unique(np.concatenate([p.ravel() for p in parts]))
        return every[every >= 0]


def best_under_null(null: Null, state: NullState) -> np.ndarray:
    """Best r of the neurons under each permutation [P, C]."""
    return state.best(null.n, null.deviation)


def publish_calibration(plan: Plan, calibrated: dict[str, Calibrated], names: list[str]) -> dict[str, str]:
    """Writes into every `calibration.json` how it compares with the raw features."""
    columns = TruthColumns.of(names, FINDINGS)
    outputs = {}
    for name, found in calibrated.items():
        if name != RAW:
            path = f"measure/{name}/calibration.json"
            table = plan.run.read_json(path)
            table["versus_raw"] = number(versus(found, calibrated[RAW], names, columns))
            outputs[path] = plan.run.write_json(path, table)
    return outputs


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
