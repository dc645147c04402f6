"""How well a score or a firing neuron detects a label: exact AUROC, precision, recall, F1, binary cross-entropy."""

from __future__ import annotations

import numpy as np


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
    from scipy.stats import rankdata

    ranks = rankdata(np.asarray(score, np.float64)[keep])
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * q))


def auroc_columns(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """AUROC [C] of scores [n, C], column by column, against targets [n, C]."""
    return np.array([auroc(scores[:, c], targets[:, c]) for c in range(targets.shape[1])])


SHARE = 0.3
FEWEST, MOST = 15, 300
"""The paper's rule: neurons that fire on 15 to 300 images, detecting with the top 30 % of their activations (arXiv 2510.26411)."""
TOP_IMAGES = int(SHARE * (MOST - 1)) + 3
"""Images a neuron from which that can be computed exactly."""


def quantile_from_top(descending: np.ndarray, count: int, share: float = SHARE) -> float:
    """The (1 - share) quantile of `count` values (linear interpolation), of which only the largest are given, in descending order."""
    position = (1 - share) * (count - 1)
    low = int(np.floor(position))
    above, below = descending[max(count - 2 - low, 0)], descending[count - 1 - low]
    return float(below + (position - low) * (above - below))


def confusion_at_quantile(descending: np.ndarray, count: int, hits: np.ndarray, positives: np.ndarray, share: float = SHARE) -> np.ndarray:
    """Precision, recall and F1 [3, C] of "the activation is among the neuron's top `share`" against each label.

    An image counts as detected where the activation is at least the (1 - share) quantile of the neuron's activations above zero.

    Args:
        descending: the neuron's largest activations [k], in descending order; at least share * count + 1 of them.
        count: images on which the neuron is active.
        hits: labels of the same images [k, C], NaN where missing; an image without the label counts neither way.
        positives: images with each label [C], whether the neuron fires on them or not.
        share: of the activations.
    """
    detected = hits[descending >= quantile_from_top(descending, count, share)]
    known = (~np.isnan(detected)).sum(0)
    true = np.nansum(detected, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = true / known, true / positives
        f1 = np.where(true > 0, 2 * precision * recall / (precision + recall), 0.0)
    f1 = np.where(np.isnan(precision) | np.isnan(recall), np.nan, f1)
    return np.stack([precision, recall, f1])


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
