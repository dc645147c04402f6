"""Sparse probing: how well do k neurons predict a label on other patients? (Gurnee et al. 2023, arXiv 2305.01610, with split-half selection.)"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from medsae.metrics.detection import auroc
from medsae.metrics.inference import FOLDS

KS = (1, 2, 5)
FIT_ROWS = 20_000
"""Images that a probe is fitted on at most: with five inputs its error there is far below that of the AUROC."""


def strongest(r: list[np.ndarray], k: int = max(KS)) -> np.ndarray:
    """The k neurons of highest |r| with each label on each half, int [2, C, k], strongest first; -1 where fewer are defined."""
    out = np.full((FOLDS, r[0].shape[1], k), -1)
    for f in range(FOLDS):
        score = np.where(np.isnan(r[f]), -1.0, np.abs(r[f]))
        order = np.argsort(-score, axis=0, kind="stable")[:k]
        value = np.take_along_axis(score, order, axis=0)
        out[f, :, : len(order)] = np.where(value >= 0, order, -1).T
    return out


def fitted_scores(x: np.ndarray, y: np.ndarray, test: np.ndarray, seed: int, c: float = 1.0) -> np.ndarray:
    """Scores of `test` by L2 logistic regression fitted on standardised x [n, k] and y [n]."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(x) > FIT_ROWS:
        rows = np.random.default_rng([seed, 5]).choice(len(x), FIT_ROWS, replace=False)
        x, y = x[rows], y[rows]
    mean, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=c, max_iter=300).fit((x - mean) / spread, y)
    return np.asarray(model.decision_function((test - mean) / spread))


def split_probe(x: np.ndarray, y: np.ndarray, fold: np.ndarray, half: int, seed: int) -> float:
    """AUROC on the other half of a probe fitted on `half`; NaN where the label does not vary on both. `y` may be NaN."""
    known = ~np.isnan(y)
    train, test = known & (fold == half), known & (fold != half)
    if len(np.unique(y[train])) < 2 or len(np.unique(y[test])) < 2:
        return float("nan")
    return auroc(fitted_scores(x[train], y[train], x[test], seed), y[test])


def sparse_probing(
    neurons: np.ndarray, activations: dict[int, np.ndarray], y: np.ndarray, fold: np.ndarray, labels: list[str], seed: int
) -> dict[str, Any]:
    """AUROC per label and k of a logistic regression on the k strongest neurons; neurons and weights come from one half, the AUROC from the other.

    Args:
        neurons: what `strongest` returned.
        activations: neuron to its activations [n].
        y: labels [n, C] under the policy.
        fold: the patient's half [n].
        labels: names.
        seed: of the subsample that large data are fitted on.
    """
    figures: dict[str, dict[str, float]] = {}
    for k in KS:
        row = {}
        for c, label in enumerate(labels):
            areas = []
            for f in range(FOLDS):
                chosen = [int(j) for j in neurons[f, c, :k] if j >= 0]
                if chosen:
                    areas.append(split_probe(np.column_stack([activations[j] for j in chosen]).astype(np.float64), y[:, c], fold, f, seed))
            row[label] = float(np.mean(areas)) if areas else float("nan")
        defined = [v for v in row.values() if np.isfinite(v)]
        row["mean"] = float(np.mean(defined)) if defined else float("nan")
        figures[str(k)] = row
    return figures
