"""From a finished state to the artifacts of `measure/NAME/` (docs/artifacts.md)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa

from medsae.artifacts import EXEMPLAR_SCHEMA
from medsae.metrics.correlation import alive, best_neuron, entropy, paper_table, top_label
from medsae.metrics.detection import FEWEST, MOST, confusion_at_quantile, one_hot_cross_entropy
from medsae.metrics.state import MeasureState
from medsae.metrics.targets import KeyedRows


def number(value: Any) -> Any:
    """Numbers as JSON has them: NaN and infinity become null, through lists and mappings."""
    if isinstance(value, dict):
        return {k: number(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [number(v) for v in value]
    if isinstance(value, np.ndarray):
        return number(value.tolist())
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def dead_neurons(state: MeasureState) -> np.ndarray:
    """Never above zero [m]; signed features are never dead."""
    return np.zeros(len(state.activity.n_active), bool) if state.signed else state.activity.n_active == 0


def detection_figures(state: MeasureState, labels_of: KeyedRows, positives: np.ndarray) -> np.ndarray:
    """Precision, recall and F1 [m, 3, C] at the activation quantile, for neurons that fire on 15 to 300 images; NaN for the others.

    Args:
        state: the finished state.
        labels_of: image key to labels under the policy.
        positives: images with each label [C].
    """
    out = np.full((len(state.activity.n_active), 3, len(positives)), np.nan)
    neuron, _, value, key = state.top.compute()
    start = np.searchsorted(neuron, np.arange(len(out) + 1))
    if state.signed:
        return out
    for j in np.flatnonzero((state.activity.n_active >= FEWEST) & (state.activity.n_active <= MOST)):
        rows = slice(start[j], start[j + 1])
        out[j] = confusion_at_quantile(value[rows], int(state.activity.n_active[j]), labels_of.take(key[rows]), positives)
    return out


def detection_table(figures: np.ndarray, labels: list[str]) -> dict[str, Any] | None:
    """Per label the neuron of highest F1, with precision and recall; None where no neuron fires on 15 to 300 images."""
    f1 = figures[:, 2]
    if np.isnan(f1).all():
        return None
    best = best_neuron(f1)
    return {
        label: None
        if best[c] < 0
        else dict(zip(("neuron", "precision", "recall", "f1"), [int(best[c]), *figures[best[c], :, c].tolist()], strict=True))
        for c, label in enumerate(labels)
    }


def neurons_table(state: MeasureState, labels: list[str], confound_names: list[str], threshold: float, detection: np.ndarray) -> pa.Table:
    """A row a neuron, in the columns of `neurons.parquet`; the state's targets are labels, then confounds; `detection` as `detection_figures` gives it."""
    activity = state.activity
    every = state.pooled().compute()
    count = len(labels)
    r, confounds = every[:, :count], every[:, count : count + len(confound_names)]
    mono = state.monosemanticity.compute()
    best, best_r = top_label(r)
    magnitude = np.where(np.isnan(confounds), -1.0, np.abs(confounds))
    worst = magnitude.argmax(1)
    worst_r = confounds[np.arange(len(r)), worst]
    strongest = np.nan_to_num(np.abs(r)).max(1, initial=0.0)
    f1_label, f1 = top_label(detection[:, 2])
    at = np.arange(len(r)), slice(None), np.maximum(f1_label, 0)
    columns: dict[str, Any] = {
        "neuron": pa.array(np.arange(len(r)), pa.int32()),
        "frequency": activity.n_active / max(activity.n, 1),
        "n_active": activity.n_active,
        "mean": activity.mean,
        "max": activity.high,
        "dead": dead_neurons(state),
        **{f"r_{name}": r[:, c] for c, name in enumerate(labels)},
        "alive": alive(r, threshold),
        "entropy": entropy(r),
        "top_label": pa.array([labels[b] if b >= 0 else None for b in best], pa.string()),
        "top_r": best_r,
        "monosemanticity": mono.score,
        "monosemanticity_gain": mono.gain,
        "cross_entropy": one_hot_cross_entropy(r),
        "f1_label": pa.array([labels[b] if b >= 0 else None for b in f1_label], pa.string()),
        "precision": np.where(f1_label >= 0, detection[at][:, 0], np.nan),
        "recall": np.where(f1_label >= 0, detection[at][:, 1], np.nan),
        "f1": f1,
        **{f"confound_{name}": confounds[:, i] for i, name in enumerate(confound_names)},
        "top_confound": pa.array([confound_names[w] if not np.isnan(v) else None for w, v in zip(worst, worst_r, strict=True)], pa.string()),
        "confounded": (best >= 0) & (np.abs(np.nan_to_num(worst_r)) > strongest),
    }
    return pa.table(columns)


def exemplars_table(state: MeasureState, paths: dict[int, tuple[str, str]], keep: int) -> pa.Table:
    """The `keep` most activating images a neuron, in the columns of `exemplars.parquet`.

    Args:
        state: the finished state.
        paths: image key to (image_id, path).
        keep: images a neuron.
    """
    neuron, rank, value, key = state.top.compute()
    first = rank < keep
    neuron, rank, value, key = neuron[first], rank[first], value[first], key[first]
    images = [paths[int(k)] for k in key]
    population = np.full(len(neuron), state.activity.n) if state.signed else state.activity.n_active[neuron]
    return pa.table(
        {
            "neuron": neuron.astype(np.int32),
            "image_id": [i for i, _ in images],
            "path": [p for _, p in images],
            "activation": value.astype(np.float32),
            "role": ["name"] * len(neuron),
            "rank": rank.astype(np.int32),
            "quantile": (1 - rank / np.maximum(population, 1)).astype(np.float32),
        },
        schema=EXEMPLAR_SCHEMA,
    )


def summary(name: str, state: MeasureState, labels: list[str], threshold: float) -> dict[str, Any]:
    """The figures of `summary.json` that follow from the state alone."""
    r = state.pooled().compute()[:, : len(labels)]
    table = paper_table(r, labels, threshold)
    living, h = alive(r, threshold), entropy(r)
    mono = state.monosemanticity.compute()
    defined = ~np.isnan(mono.score)
    return {
        "name": name,
        "n_images": state.activity.n,
        "n_neurons": len(r),
        "labels": labels,
        "paper_table": table.rows,
        "paper_mean": {"r": table.mean_r, "entropy": table.mean_entropy},
        "n_alive": int(living.sum()),
        "dead_share": float(dead_neurons(state).mean()),
        "l0": state.activity.l0,
        "fvu": state.reconstruction.compute(),
        "mean_entropy_alive": float(h[living].mean()) if living.any() else None,
        "mean_monosemanticity": float(mono.score[defined].mean()) if defined.any() else None,
        "monosemanticity_baseline": mono.baseline,
        "n_reference": mono.n,
    }
