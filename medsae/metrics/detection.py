"""How well a score or a firing neuron detects a label: exact AUROC, precision, recall, F1, binary cross-entropy."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def auroc(score: np.ndarray, target: np.ndarray) -> float:
    """Area under the ROC curve by ranks: (R+ - P(P+1)/2) / (P N), R+ the sum of the positives' midranks (Hanley and McNeil 1982).

    Ties count one half. Images whose target is NaN are left out.

    Args:
        score: [n], the higher the more positive.
        target: [n], 1, 0 or NaN.

    Returns:
        The area; NaN where there is no positive or no negative.
    """
    keep = ~np.isnan(target)
    positive = target[keep] == 1
    p, q = int(positive.sum()), int((~positive).sum())
    if not p or not q:
        return float("nan")
    ranks = rankdata(np.asarray(score, np.float64)[keep])
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * q))


def auroc_columns(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """AUROC [C] of scores [n, C], column by column, against targets [n, C]."""
    return np.array([auroc(scores[:, c], targets[:, c]) for c in range(targets.shape[1])])


def confusion_at_quantile(values: np.ndarray, hits: np.ndarray, positives: float, share: float = 0.3) -> tuple[float, float, float]:
    """Precision, recall and F1 of "the activation is among the neuron's top `share`" against a label.

    Args:
        values: the neuron's activations above zero [k].
        hits: whether the image has the label [k]; NaN where the policy leaves it out.
        positives: images with the label, whether the neuron fires on them or not.
        share: an image counts as detected where the activation is at least the (1 - share) quantile of `values` (linear interpolation).
    """
    keep = ~np.isnan(hits)
    values, hits = values[keep], hits[keep]
    if not len(values) or positives <= 0:
        return float("nan"), float("nan"), float("nan")
    detected = values >= np.quantile(values, 1 - share)
    true = float(hits[detected].sum())
    precision, recall = true / float(detected.sum()), true / positives
    return precision, recall, 2 * precision * recall / (precision + recall) if true else 0.0


def one_hot_cross_entropy(r: np.ndarray) -> np.ndarray:
    """Mean over labels of the binary cross-entropy [m] of |r| against the one-hot vector of its argmax (arXiv 2510.26411).

    Logarithms are bounded below at -100, as torch does. NaN where no r is defined.
    """
    p = np.abs(np.asarray(r, np.float64))
    defined = ~np.isnan(p).all(1)
    p = np.nan_to_num(p)
    target = np.zeros_like(p)
    target[np.arange(len(p)), p.argmax(1)] = 1.0
    with np.errstate(divide="ignore"):
        log_p, log_q = np.maximum(np.log(p), -100), np.maximum(np.log1p(-p), -100)
    return np.where(defined, -(target * log_p + (1 - target) * log_q).mean(1), np.nan)
