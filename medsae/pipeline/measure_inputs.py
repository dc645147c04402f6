"""What measure reads before its tasks begin: labels, confounds, truth, the choice of images, probes, and the prompts of a text tower."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from medsae.artifacts import Embeddings, RunDir, embedding_parts, label_names, read_embeddings, read_meta, read_part
from medsae.config import RunConfig
from medsae.data.manifest import read_columns
from medsae.data.phantom.model import FINDINGS
from medsae.errors import ArtifactError, ConfigError, DataError, WeightsError
from medsae.metrics.baselines import PREFIX, fit
from medsae.metrics.calibration import read_truth
from medsae.metrics.features import Features
from medsae.metrics.inference import donor_permutation
from medsae.metrics.labels import as_binary, balanced_subset
from medsae.metrics.linear import sample_halves
from medsae.metrics.targets import CONFOUNDS, KeyedRows, image_keys, indicator_rows, patient_fold, target_values
from medsae.pipeline.measure_tasks import Null, Plan, Side

log = logging.getLogger("medsae")


@dataclass(frozen=True)
class Images:
    """What is known of every measured image, in the order of the parts.

    `targets` [N, T] (labels, confounds, phantom truth), `patient` index [N], `fold` [N], `where` image key to (image_id, path), `offsets` part to its
    first row; `truth_names` of the last columns of `targets`, on phantoms.
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
        """The labels, the first columns of `targets`, as 1, 0 or NaN, found by image key."""
        keys = np.fromiter(self.where, np.uint64, len(self.where))
        order = np.argsort(keys)
        return KeyedRows([], keys[order], as_binary(self.targets[order, :labels]))


def prepare(config: RunConfig, run: RunDir) -> tuple[Plan, Side]:
    """Reads what the tasks share.

    Raises:
        ConfigError: `measure.labels` names a label that the run does not have.
        DataError: a column of `data.confound_columns` cannot be read.
    """
    every = label_names(run)
    labels = every if config.measure.labels is None else list(dict.fromkeys(config.measure.labels))
    missing = [label for label in labels if label not in every]
    if missing or not labels:
        raise ConfigError(f"measure.labels: no label {missing[0] if missing else ''!r} in the run; there are {', '.join(every)}")
    dim = read_part(run, embedding_parts(run)[0], every).x.shape[1]
    extra = None
    if config.data.confound_columns:
        ids, columns = read_columns(config.data, config.data.confound_columns)
        extra = indicator_rows(ids, columns)
    side = Side(find_truth(config), _read_reference(config.measure.reference) if config.measure.reference else None, extra)
    reference_dim = side.reference.values.shape[1] if side.reference else dim
    plan = Plan(run, config, labels, [every.index(label) for label in labels], dim, reference_dim, [*CONFOUNDS, *(extra.names if extra else [])])
    return plan.of_images(_subset(plan, every)), side


def _subset(plan: Plan, every: list[str]) -> np.ndarray | None:
    """Keys of the images of the balanced subset, ascending; None where all are measured."""
    count = plan.config.measure.balanced
    if count is None:
        return None
    parts = [read_meta(plan.run, path, every, plan.split) for path in embedding_parts(plan.run)]
    keys = np.concatenate([image_keys(p.column("image_id")) for p in parts])
    return balanced_subset(keys, np.concatenate([p.labels for p in parts if len(p)])[:, plan.columns], count, plan.config.seed) if len(keys) else keys


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
    """Everything of the measured images but the embeddings.

    Raises:
        ArtifactError: there is none.
        DataError: `data.confound_columns` are known of none of them.
    """
    parts: list[Embeddings] = []
    offsets: dict[str, int] = {}
    total = 0
    for path in embedding_parts(plan.run):
        part = plan.read(path, meta_only=True)
        if len(part):
            offsets[path] = total
            total += len(part)
            parts.append(part)
    if not total:
        raise ArtifactError(f"{plan.run.path('embeddings')} has no image in the split {plan.config.measure.split!r}; set measure.split to all")
    where: dict[int, tuple[str, str]] = {}
    for part in parts:
        ids = part.column("image_id")
        where.update(zip(image_keys(ids).tolist(), zip(ids.tolist(), part.column("path").tolist(), strict=True), strict=True))
    data = plan.config.data
    if side.extra is not None and np.isnan(side.extra.take(np.fromiter(where, np.uint64, len(where)))).all():
        raise DataError(
            f"data.confound_columns: the CSV files of {data.root} say nothing about any of the measured images; is data.root the right one?"
        )
    targets = np.concatenate([target_values(p, data.uncertain, data.blank, side.extra, side.truth) for p in parts])
    names = np.concatenate([p.column("patient_id").astype(str) for p in parts])
    _, index = np.unique(names, return_inverse=True)
    return Images(targets, index, patient_fold(names, plan.config.seed), where, offsets, side.truth.names if side.truth else [])


def probe_sample(plan: Plan, images: Images) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Embeddings and labels of the images that linear probes are fitted and tested on, and their halves as rows of these."""
    halves = sample_halves(images.fold, images.patient, plan.config.seed)
    rows = np.unique(np.concatenate([i for half in halves for i in half]))
    x = np.empty((len(rows), plan.dim), np.float32)
    for path, offset in images.offsets.items():
        part = plan.read(path)
        wanted = slice(*np.searchsorted(rows, [offset, offset + len(part)]))
        x[wanted] = part.x[rows[wanted] - offset]
    where = [(np.searchsorted(rows, a), np.searchsorted(rows, b)) for a, b in halves]
    return x, as_binary(images.targets[rows, : len(plan.labels)]), where


@dataclass(frozen=True)
class ZeroShot:
    """Text directions for some of the labels: `axes` float32 [K, d], `labels` their indices [K]."""

    axes: np.ndarray
    labels: list[int]


def zero_shot_axes(plan: Plan) -> ZeroShot | None:
    """The directions of the text prompts, the encoder's own or those of the `medclip` package; None without text tower, tokenizer or prompt.

    A direction is the mean of the unit vectors of the prompts for a label minus that of the prompts against it.
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
    return ZeroShot(axes, [plan.labels.index(k) for k in prompts])


def permuted_labels(plan: Plan, images: Images) -> Null | None:
    """The permutations of the labels over the patients; the same for all features."""
    count = plan.config.measure.permutations
    if not count:
        return None
    labels = images.targets[:, : len(plan.labels)].astype(np.float32)
    donors = donor_permutation(images.patient, count, plan.config.seed)
    given = ~np.isnan(labels)
    known = np.nan_to_num(labels).astype(np.float64)
    n = np.stack([given[d].sum(0) for d in donors]).ravel()
    safe = np.maximum(n, 1)
    mean = np.stack([known[d].sum(0) for d in donors]).ravel() / safe
    square = np.stack([(known[d] ** 2).sum(0) for d in donors]).ravel() / safe
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    return Null(labels, donors, n, mean.astype(np.float32), deviation, bool(not given.all()))
