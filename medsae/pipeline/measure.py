"""measure: the raw features and every SAE, measured the same way.

First pass: moments of every neuron. Then neurons are chosen per label on each half of the patients. Second pass: their activations, for intervals
by bootstrap over patients, and the null of the best of m. The tasks stand in `measure_tasks`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from medsae.artifacts import RAW, RunDir, embedding_parts, label_names, read_embeddings, read_part
from medsae.config import RunConfig
from medsae.data.phantom.model import FINDINGS
from medsae.errors import ArtifactError, WeightsError
from medsae.metrics.baselines import PREFIX, fit
from medsae.metrics.calibration import Calibrated, TruthColumns, calibration, read_truth, reported_auroc, versus
from medsae.metrics.comparison import Measured, compare, null_figures, selected_figures
from medsae.metrics.detection import auroc_columns
from medsae.metrics.features import Features
from medsae.metrics.inference import NullState, Selected, bootstrap_selected, donor_permutation, select
from medsae.metrics.linear import sample_halves
from medsae.metrics.monosemanticity import unit
from medsae.metrics.probing import sparse_probing, strongest
from medsae.metrics.state import MeasureState
from medsae.metrics.tables import detection_figures, detection_table, exemplars_table, neurons_table, number, summary
from medsae.metrics.targets import CONFOUNDS, KeyedRows, image_keys, patient_fold, target_values
from medsae.pipeline.cluster import ray_session
from medsae.pipeline.measure_tasks import Null, Plan, Second, Side, first_pass, get, linear_look, second_pass
from medsae.pipeline.stage import StageResult

log = logging.getLogger("medsae")


@dataclass(frozen=True)
class Images:
    """What is known of every image of the split, in the order of the parts.

    `targets` [N, T] (labels first), `patient` index [N], `fold` [N], `where` image key to (image_id, path), `offsets` part to its first row;
    `truth_names` of the last columns of `targets`, on phantoms.
    """

    targets: np.ndarray
    patient: np.ndarray
    fold: np.ndarray
    where: dict[int, tuple[str, str]]
    offsets: dict[str, int]
    truth_names: list[str]

    def __len__(self) -> int:
        return len(self.patient)

    def by_key(self, labels: int) -> KeyedRows:
        """The first columns of `targets`, found by image key."""
        keys = np.fromiter(self.where, np.uint64, len(self.where))
        order = np.argsort(keys)
        return KeyedRows([], keys[order], self.targets[order, :labels])


def run(config: RunConfig, run: RunDir) -> StageResult:
    """Measures the raw features and every SAE of the configuration.

    Raises:
        ArtifactError: there are no embeddings, none in the split, or an SAE is missing or does not fit.
    """
    with ray_session(config.ray):
        plan, side = prepare(config, run)
        images = read_images(plan, side)
        null = permuted_labels(plan, images)
        shared = Shared(ray.put(side), ray.put(null), [ray.put(item) for item in probe_sample(plan, images)], zero_shot(plan, images))
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


def prepare(config: RunConfig, run: RunDir) -> tuple[Plan, Side]:
    """Reads what the tasks share."""
    names = label_names(run)
    dim = read_part(run, embedding_parts(run)[0], names).x.shape[1]
    side = Side(find_truth(config), _read_reference(config.measure.reference) if config.measure.reference else None)
    count = len(names) + len(CONFOUNDS) + (side.truth.values.shape[1] if side.truth else 0)
    reference_dim = side.reference.values.shape[1] if side.reference else dim
    return Plan(run, config, names, dim, count, reference_dim), side


def find_truth(config: RunConfig) -> KeyedRows | None:
    """The true severities beside phantom radiographs (`truth.csv` in `data.root`); None for other data."""
    if not config.data.root:
        return None
    root = RunDir(config.data.root)
    return read_truth(root.read_bytes("truth.csv"), FINDINGS) if root.exists("truth.csv") else None


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
    return Images(np.concatenate(targets), index, patient_fold(names, plan.config.seed), where, offsets, side.truth.names if side.truth else [])


@dataclass(frozen=True)
class Shared:
    """References to what the tasks of all features share: `Side`, `Null`, and embeddings, labels and halves of the linear probes;
    `zero_shot` AUROC by label."""

    side: Any
    null: Any
    probe: list[Any]
    zero_shot: dict[str, float | None] | None


def probe_sample(plan: Plan, images: Images) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Embeddings and labels of the images that linear probes are fitted and tested on, and their halves as rows of these."""
    halves = sample_halves(images.fold, images.patient, plan.config.seed)
    rows = np.unique(np.concatenate([i for half in halves for i in half]))
    x = np.empty((len(rows), plan.dim), np.float32)
    for path, offset in images.offsets.items():
        part = read_part(plan.run, path, plan.labels, plan.split)
        wanted = slice(*np.searchsorted(rows, [offset, offset + len(part)]))
        x[wanted] = part.x[rows[wanted] - offset]
    where = [(np.searchsorted(rows, a), np.searchsorted(rows, b)) for a, b in halves]
    return x, images.targets[rows, : len(plan.labels)], where


def by_label(values: np.ndarray, labels: list[str]) -> dict[str, float | None]:
    """Figures [C] by label, with the mean over those that are defined."""
    defined = values[np.isfinite(values)]
    return {**dict(zip(labels, values.tolist(), strict=True)), "mean": float(defined.mean()) if len(defined) else None}


def zero_shot(plan: Plan, images: Images) -> dict[str, float | None] | None:
    """AUROC per label of text prompts: the encoder's own, or those of the `medclip` package. None where there is no text tower, tokenizer or prompt.

    The score is the mean cosine of image and prompts for the label minus that of the prompts against it.
    """
    from medsae.encoders import TextEncoder, load_encoder
    from medsae.encoders.zero_shot import prompt_axes, prompts_for

    settings = plan.config.encoder
    if settings.name != plan.run.read_manifest().get("encoder", {}).get("name"):
        return None
    encoder = load_encoder(settings.name, settings.weights, seed=settings.seed, sha256=settings.sha256)
    prompts = {k: v for k, v in prompts_for(encoder).items() if k in plan.labels}
    if not prompts or not isinstance(encoder, TextEncoder) or encoder.dim != plan.dim:
        return None
    try:
        axes = prompt_axes(encoder, prompts)
    except WeightsError as error:
        log.warning("zero-shot figures are left out: %s", error)
        return None
    parts = (read_part(plan.run, path, plan.labels, plan.split) for path in images.offsets)
    scores = np.concatenate([unit(part.x) @ axes.T for part in parts])
    areas = dict(zip(prompts, auroc_columns(scores, images.targets[:, [plan.labels.index(k) for k in prompts]]).tolist(), strict=True))
    return {label: areas.get(label) for label in plan.labels}


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
    plan: Plan, shared: Shared, images: Images, name: str, features: Features | None, null: Null | None
) -> tuple[Measured, Calibrated | None, dict[str, str]]:
    """Both passes of one set of features; writes `measure/NAME/` but for the comparison."""
    settings, labels, seed = plan.config.measure, plan.labels, plan.config.seed
    count = len(labels)
    features_ref = ray.put(features)
    state = first_pass(plan, shared.side, name, features_ref)
    choice = Choice.of(state, count)
    pooled = state.pooled()
    spread = np.sqrt(pooled.m2[:, 0] / max(pooled.n[0], 1))
    second = Second(choice.neurons, np.where(spread > 0, spread, 1.0).astype(np.float32), images.offsets)
    linear = ray.remote(linear_look).options(name=f"probe {name}", num_cpus=1).remote(plan, name, features_ref, *shared.probe)
    values, null_state = second_pass(plan, name, features_ref, second, shared.null)
    activations = {int(j): values[:, i] for i, j in enumerate(choice.neurons)}
    targets = images.targets[:, :count]

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
    detection = detection_figures(state, images.by_key(count), np.nansum(targets, axis=0))
    figures = summary(name, state, labels, settings.alive_correlation)
    figures |= {
        "split": settings.split,
        "reference": settings.reference or "circular: the embeddings themselves",
        "zero_shot": shared.zero_shot,
        "encoder": plan.run.read_manifest().get("encoder"),
        "selected": selected_figures(found, labels),
        "null": null_figures(found, labels),
        "detection": detection_table(detection, labels),
        "probing": sparse_probing(choice.probes, activations, targets, images.fold, labels, seed)
        | {f"linear_{kind}": by_label(areas, labels) for kind, areas in get(linear).items()},
    }
    folder = f"measure/{name}"
    outputs = {
        f"{folder}/neurons.parquet": plan.run.write_table(
            f"{folder}/neurons.parquet", neurons_table(state, labels, settings.alive_correlation, detection)
        ),
        f"{folder}/exemplars.parquet": plan.run.write_table(f"{folder}/exemplars.parquet", exemplars_table(state, images.where, settings.exemplars)),
        f"{folder}/summary.json": plan.run.write_json(f"{folder}/summary.json", number(figures)),
    }
    calibrated = None
    if choice.truth is not None:
        truth = images.targets[:, count + len(CONFOUNDS) :]
        area = reported_auroc(choice.truth, activations, truth, images.fold)
        calibrated = Calibrated(name, choice.truth.mean_r, draws(choice.truth, truth)[0], area)
        whole = pooled.compute()[:, count + len(CONFOUNDS) :]
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
    def of(cls, state: MeasureState, labels: int) -> Choice:
        r = [m.compute() for m in state.moments]
        halves, truth = [x[:, :labels] for x in r], [x[:, labels + len(CONFOUNDS) :] for x in r]
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
    given = ~np.isnan(null.labels)
    n = np.stack([given[d].sum(0) for d in null.donors]).ravel()
    return state.best(n, np.sqrt(null.mean * (1 - null.mean)))


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
