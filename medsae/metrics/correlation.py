"""Correlation figures of the paper: entropy, the alive rule, the table of the best neuron a label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def entropy(r: np.ndarray) -> np.ndarray:
    """Entropy [m] of p_c = |r_c| / sum |r| over labels, natural log (arXiv 2510.26411).

    0: the neuron correlates with one label only; log C: with all alike. An undefined r counts as 0; NaN where no r is defined or all are 0.
    """
    magnitude = np.abs(np.nan_to_num(np.asarray(r, dtype=np.float64)))
    total = magnitude.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = magnitude / total
        h = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(-1)
    return np.where(total[..., 0] > 0, np.maximum(h, 0.0), np.nan)


def alive(r: np.ndarray, threshold: float = 0.2) -> np.ndarray:
    """The paper's rule [m]: max over labels of |r| above the threshold."""
    return np.nan_to_num(np.abs(r)).max(-1, initial=0.0) > threshold


def best_neuron(r: np.ndarray, absolute: bool = False) -> np.ndarray:
    """For each label the neuron of highest r (or |r|) [C]; -1 where no neuron has a defined r. The lowest index wins a tie."""
    score = np.abs(r) if absolute else r
    score = np.where(np.isnan(score), -np.inf, score)
    if not len(score):
        return np.full(r.shape[1], -1)
    index = score.argmax(0)
    return np.where(np.isfinite(score.max(0)), index, -1)


def top_label(r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each neuron the label of highest r (index [m], -1 where undefined) and that r (NaN where undefined)."""
    score = np.where(np.isnan(r), -np.inf, r)
    index = score.argmax(1)
    value = score[np.arange(len(score)), index]
    return np.where(np.isfinite(value), index, -1), np.where(np.isfinite(value), value, np.nan)


@dataclass(frozen=True)
class PaperTable:
    """The paper's table: `rows` label to neuron, r, entropy; means over labels; the mean entropy takes alive neurons only."""

    rows: dict[str, dict[str, float | int | None]]
    mean_r: float | None
    mean_entropy: float | None


def paper_table(r: np.ndarray, labels: list[str], threshold: float = 0.2) -> PaperTable:
    """For each label the neuron of highest r with its r and entropy, as `correlation (entropy)` in the paper's table.

    Args:
        r: correlations [m, C].
        labels: the C names.
        threshold: the alive rule; a chosen neuron that is not alive counts in the mean of r, not in the mean of the entropy.
    """
    best, h, living = best_neuron(r), entropy(r), alive(r, threshold)
    rows: dict[str, dict[str, float | int | None]] = {}
    rs, hs = [], []
    for c, name in enumerate(labels):
        j = int(best[c])
        if j < 0:
            rows[name] = {"neuron": None, "r": None, "entropy": None}
            continue
        rows[name] = {"neuron": j, "r": float(r[j, c]), "entropy": float(h[j])}
        rs.append(float(r[j, c]))
        if living[j]:
            hs.append(float(h[j]))
    return PaperTable(rows, float(np.mean(rs)) if rs else None, float(np.mean(hs)) if hs else None)
