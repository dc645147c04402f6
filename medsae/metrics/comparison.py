"""The figures that compare sets of features: split-selected correlation and entropy with intervals, null, equal candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from medsae.metrics.correlation import best_neuron
from medsae.metrics.inference import Interval, Selected, equal_candidates


@dataclass(frozen=True)
class Measured:
    """What a comparison needs of one set of features.

    `halves`: correlations [m, C] on each half; `whole`: on all images; `signed`, `either`: the choice by r, by |r|; `draws_signed`,
    `draws_either`: bootstrap draws of r and entropy [B, C]; `null`: best r under permuted labels [P, C].
    """

    name: str
    halves: list[np.ndarray]
    whole: np.ndarray
    signed: Selected
    either: Selected
    draws_signed: tuple[np.ndarray, np.ndarray]
    draws_either: tuple[np.ndarray, np.ndarray]
    null: np.ndarray | None


def usable(measured: Measured) -> np.ndarray:
    """Labels that vary on both halves [C]: the others take no part in any mean."""
    return np.asarray(~np.isnan(measured.signed.r).any(0))


def mean_interval(value: np.ndarray, draws: np.ndarray, keep: np.ndarray | list[int]) -> dict[str, float] | None:
    """Mean over the kept columns of values [K], with the interval of its draws [B, K]; None where none is kept."""
    kept = value[keep]
    return Interval.of(kept.mean(), draws[:, keep].mean(1)).as_dict() if len(kept) else None


def selected_figures(measured: Measured, labels: list[str]) -> dict[str, Any]:
    """Per label the chosen neurons (half 0, half 1) and their r and entropy on the other half, with intervals; means over labels."""
    keep = usable(measured)
    rows: dict[str, Any] = {}
    for c, label in enumerate(labels):
        if not keep[c]:
            rows[label] = None
            continue
        rows[label] = {
            "neurons": measured.signed.neurons[:, c].tolist(),
            "r": Interval.of(measured.signed.mean_r[c], measured.draws_signed[0][:, c]).as_dict(),
            "entropy": Interval.of(measured.signed.mean_entropy[c], measured.draws_signed[1][:, c]).as_dict(),
            "r_either_sign": Interval.of(measured.either.mean_r[c], measured.draws_either[0][:, c]).as_dict(),
        }
    return {
        "labels": rows,
        "mean": {
            "r": mean_interval(measured.signed.mean_r, measured.draws_signed[0], keep),
            "entropy": mean_interval(measured.signed.mean_entropy, measured.draws_signed[1], keep),
            "r_either_sign": mean_interval(measured.either.mean_r, measured.draws_either[0], keep),
            "entropy_either_sign": mean_interval(measured.either.mean_entropy, measured.draws_either[1], keep),
        },
    }


def null_figures(measured: Measured, labels: list[str]) -> dict[str, Any] | None:
    """Best r of m neurons beside its distribution under permuted labels; p = (1 + permutations at least as high) / (1 + permutations)."""
    if measured.null is None:
        return None
    best = best_neuron(measured.whole)
    observed = np.array([measured.whole[j, c] if j >= 0 else np.nan for c, j in enumerate(best)])

    def figures(value: float, null: np.ndarray) -> dict[str, float] | None:
        null = null[np.isfinite(null)]
        if not len(null) or not np.isfinite(value):
            return None
        p = (1 + int((null >= value).sum())) / (1 + len(null))
        return {"observed": float(value), "null_mean": float(null.mean()), "null_95": float(np.quantile(null, 0.95)), "p": p}

    keep = np.isfinite(observed) & np.isfinite(measured.null).all(0)
    return {
        "permutations": len(measured.null),
        "labels": {label: figures(observed[c], measured.null[:, c]) for c, label in enumerate(labels)},
        "mean": figures(observed[keep].mean(), measured.null[:, keep].mean(1)) if keep.any() else None,
    }


def compare(ours: Measured, base: Measured, labels: list[str], draws: int, seed: int) -> dict[str, Any]:
    """Differences ours minus base, with paired bootstrap intervals, per label and in the mean over labels."""
    keep = usable(ours) & usable(base)
    difference = ours.signed.mean_r - base.signed.mean_r
    difference_draws = ours.draws_signed[0] - base.draws_signed[0]
    rows = {
        label: {
            "r": float(ours.signed.mean_r[c]),
            "baseline_r": float(base.signed.mean_r[c]),
            "difference": Interval.of(difference[c], difference_draws[:, c]).as_dict(),
            "entropy": float(ours.signed.mean_entropy[c]),
            "baseline_entropy": float(base.signed.mean_entropy[c]),
        }
        for c, label in enumerate(labels)
        if keep[c]
    }
    equal = equal_candidates(ours.halves, len(base.whole), draws, seed)
    return {
        "name": ours.name,
        "baseline": base.name,
        "neurons": len(ours.whole),
        "baseline_neurons": len(base.whole),
        "correlation": mean_interval(difference, difference_draws, keep),
        "entropy": mean_interval(ours.signed.mean_entropy - base.signed.mean_entropy, ours.draws_signed[1] - base.draws_signed[1], keep),
        "correlation_either_sign": mean_interval(ours.either.mean_r - base.either.mean_r, ours.draws_either[0] - base.draws_either[0], keep),
        "entropy_either_sign": mean_interval(ours.either.mean_entropy - base.either.mean_entropy, ours.draws_either[1] - base.draws_either[1], keep),
        "labels_won": int((difference[keep] > 0).sum()),
        "labels_used": int(keep.sum()),
        "labels_left_out": [label for c, label in enumerate(labels) if not keep[c]],
        "labels": rows,
        "equal_candidates": None
        if equal is None
        else {
            "candidates": len(base.whole),
            "draws": draws,
            "correlation": Interval.of(equal[0].mean() - base.signed.mean_r[keep].mean(), equal[0] - base.signed.mean_r[keep].mean()).as_dict(),
            "entropy": Interval.of(
                equal[1].mean() - base.signed.mean_entropy[keep].mean(), equal[1] - base.signed.mean_entropy[keep].mean()
            ).as_dict(),
        },
    }
