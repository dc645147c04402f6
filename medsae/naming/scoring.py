"""How well a name tells the images on which a neuron fires from those on which it does not, with controls and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medsae.metrics.detection import auroc

CONTROLS = ("shuffled", "empty", "best label", "raw")
"""Names that are judged on the same images as the neuron's own (control `none`)."""

OWN = "none"


@dataclass(frozen=True)
class Figures:
    """One row of `scores/NAME.parquet` without its keys. `low`, `high`: 95 % interval of the balanced accuracy, by bootstrap over patients."""

    balanced_accuracy: float
    auc: float
    precision: float
    recall: float
    f1: float
    n: int
    failures: int
    low: float
    high: float


def evaluate(truth: np.ndarray, score: np.ndarray, patients: np.ndarray, threshold: float = 0.5, seed: int = 0, resamples: int = 1000) -> Figures:
    """Figures of answers against what the neuron really does.

    Args:
        truth: bool [n], the neuron fires.
        score: [n], how sure the judge is that the image shows the name; NaN is a failure: it is counted and left out of every figure.
        patients: [n], the unit of the bootstrap.
        threshold: an answer is yes where the score exceeds it.

    Returns:
        Figures; NaN where a class has no answered image.
    """
    answered = ~np.isnan(score)
    failures = int((~answered).sum())
    truth, score, patients = truth[answered], score[answered], patients[answered]
    yes = score > threshold
    tp, fp = float((yes & truth).sum()), float((yes & ~truth).sum())
    p, q = float(truth.sum()), float((~truth).sum())
    if not p or not q:
        nan = math.nan
        return Figures(nan, nan, nan, nan, nan, len(truth), failures, nan, nan)
    recall = tp / p
    precision = tp / (tp + fp) if tp + fp else math.nan
    # No image called positive: F1 = 2 TP / (2 TP + FP + FN) is 0 although the precision is undefined.
    f1 = 2 * tp / (tp + fp + p)
    low, high = bootstrap_balanced_accuracy(truth, yes, patients, seed, resamples)
    return Figures((recall + 1 - fp / q) / 2, auroc(score, truth.astype(float)), precision, recall, f1, len(truth), failures, low, high)


def bootstrap_balanced_accuracy(truth: np.ndarray, yes: np.ndarray, patients: np.ndarray, seed: int, resamples: int) -> tuple[float, float]:
    """95 % percentile interval of the balanced accuracy, patients drawn with replacement; draws that miss a class are left out."""
    _, group = np.unique(patients.astype(str), return_inverse=True)
    count = int(group.max()) + 1
    # [groups, 4]: true positives, positives, true negatives, negatives of each patient
    cells = np.stack([truth & yes, truth, ~truth & ~yes, ~truth], axis=1).astype(np.float64)
    table = np.zeros((count, 4))
    np.add.at(table, group, cells)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    tp, p, tn, q = (weights @ table).T
    valid = (p > 0) & (q > 0)
    if not valid.any():
        return math.nan, math.nan
    values = (tp[valid] / p[valid] + tn[valid] / q[valid]) / 2
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def shuffled_partner(concepts: Sequence[str], index: int, rng: np.random.Generator) -> int | None:
    """Another neuron with another name, drawn at random; None where all names are the same."""
    own = concepts[index].casefold()
    others = [i for i, c in enumerate(concepts) if c and c.casefold() != own]
    return int(rng.choice(others)) if others else None


def headline(rows: Sequence[dict[str, Any]], seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """Of rows of `scores/NAME.parquet`, by method: means by control, and the gain of the own name over each control, paired by neuron.

    The gain has a 95 % interval by bootstrap over neurons.
    """
    out: dict[str, Any] = {}
    for method in sorted({r["method"] for r in rows}):
        figure = "auc" if method == "embedding" else "balanced_accuracy"
        by_control: dict[str, dict[int, float]] = {}
        failures = 0
        for row in rows:
            if row["method"] == method:
                failures += row["failures"]
                if not math.isnan(row[figure]):
                    by_control.setdefault(row["control"], {})[row["neuron"]] = row[figure]
        own = by_control.get(OWN, {})
        rng = np.random.default_rng(seed)
        gains = {}
        for control, values in by_control.items():
            both = sorted(set(own) & set(values)) if control != OWN else []
            if both:
                difference = np.array([own[n] - values[n] for n in both])
                means = difference[rng.integers(0, len(both), (resamples, len(both)))].mean(1)
                low, high = np.quantile(means, [0.025, 0.975])
                gains[control] = {"mean": float(difference.mean()), "low": float(low), "high": float(high), "neurons": len(both)}
        out[method] = {
            "figure": figure,
            "neurons": len(own),
            "mean": {control: float(np.mean(list(v.values()))) for control, v in by_control.items() if v},
            "gain": gains,
            "failures": failures,
        }
    return out


def chance_figures(found: np.ndarray, seed: int = 0, resamples: int = 1000) -> Figures:
    """Figures of questions with one right answer: the share found stands as balanced accuracy, with a bootstrap interval over questions.

    `found`: [n], 1, 0 or NaN for no answer. The other figures are undefined.
    """
    answered = found[~np.isnan(found)]
    failures = len(found) - len(answered)
    nan = math.nan
    if not len(answered):
        return Figures(nan, nan, nan, nan, nan, 0, failures, nan, nan)
    means = answered[np.random.default_rng(seed).integers(0, len(answered), (resamples, len(answered)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Figures(float(answered.mean()), nan, nan, nan, nan, len(answered), failures, float(low), float(high))
