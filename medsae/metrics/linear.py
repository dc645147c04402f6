"""Linear probe: what is in the features at all, and what a reconstruction loses of it."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from medsae.metrics.columns import as_array
from medsae.metrics.detection import auroc
from medsae.metrics.features import Features
from medsae.metrics.inference import FOLDS

FIT_ROWS = 4000
"""Images of a half that a probe is fitted on at most: the kernel is FIT_ROWS squared, whatever the width of the features."""
TEST_ROWS = 4000
PENALTIES = np.logspace(-4, 4, 17)
"""Ridge penalties tried, relative to the mean eigenvalue of the kernel."""


def ridge_scores(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Scores of `test` [n', C] by ridge regression of y [n, C] on standardised x [n, d].

    Solved in the dual; each label takes the penalty of least leave-one-out error, in closed form (Rifkin and Lippert 2007,
    MIT-CSAIL-TR-2007-025): with G = K + s I, the residual of image i left out is (G^-1 y)_i / (G^-1)_ii.
    """
    mean, spread = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    use = spread > 0
    left, right = (x[:, use] - mean[use]) / spread[use], (test[:, use] - mean[use]) / spread[use]
    kernel = left @ left.T
    centre = y.mean(0)
    values, vectors = scipy.linalg.eigh(kernel)
    values = np.maximum(values, 0)
    scale = max(float(values.mean()), 1e-12)
    rotated = vectors.T @ (y - centre)
    best, alpha = np.full(y.shape[1], np.inf), np.zeros_like(y)
    for penalty in PENALTIES * scale:
        inverse = 1 / (values + penalty)
        solution = vectors @ (inverse[:, None] * rotated)
        error = ((solution / ((vectors**2) @ inverse)[:, None]) ** 2).sum(0)
        alpha = np.where(error < best, solution, alpha)
        best = np.minimum(best, error)
    return np.asarray(right @ (left.T @ alpha))


def sample_halves(fold: np.ndarray, patients: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each half the images to fit on and those of the other half to test on, at most FIT_ROWS and TEST_ROWS, whole patients in random order."""
    rng = np.random.default_rng([seed, 6])
    rank = rng.permutation(int(patients.max()) + 1)[patients]
    order = np.argsort(rank, kind="stable")
    halves = [np.sort(order[fold[order] == f][:FIT_ROWS]) for f in range(FOLDS)], [np.sort(order[fold[order] == f][:TEST_ROWS]) for f in range(FOLDS)]
    return [(halves[0][f], halves[1][1 - f]) for f in range(FOLDS)]


def linear_probe(fit: list[np.ndarray], test: list[np.ndarray], y_fit: list[np.ndarray], y_test: list[np.ndarray]) -> np.ndarray:
    """AUROC per label [C] on the half that the probe was not fitted on, mean of both; NaN where a label does not vary.

    Args:
        fit, test: features [n, d] of the images to fit on and of the other half's, for each half.
        y_fit, y_test: their labels [n, C], NaN where missing; labels missing on the same images are fitted together.
    """
    areas = np.full((FOLDS, y_fit[0].shape[1]), np.nan)
    for f in range(FOLDS):
        patterns: dict[bytes, list[int]] = {}
        for c in range(areas.shape[1]):
            patterns.setdefault(np.isnan(y_fit[f][:, c]).tobytes(), []).append(c)
        for columns in patterns.values():
            known = ~np.isnan(y_fit[f][:, columns[0]])
            if known.sum() < 10:
                continue
            scores = ridge_scores(fit[f][known], y_fit[f][known][:, columns], test[f])
            for i, c in enumerate(columns):
                if len(np.unique(y_fit[f][known, c])) > 1:
                    areas[f, c] = auroc(scores[:, i], y_test[f][:, c])
    return np.asarray(areas.mean(0))


def probe_features(features: Features, x: np.ndarray, y: np.ndarray, halves: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """AUROC per label of a probe on the features and, where there is a way back, on the reconstruction of the embeddings.

    Args:
        features: what is probed.
        x: embeddings [n, d] of the images that `halves` name.
        y: labels [n, C] under the policy.
        halves: what `sample_halves` returned, as rows of `x`.
    """
    codes, backs = [], []
    for start in range(0, len(x), 1024):
        z = as_array(features.encode(x[start : start + 1024]))
        back = features.decode(z)
        codes.append(z)
        if back is not None:
            backs.append(as_array(back))
    out = {}
    for name, parts in (("features", codes), ("reconstruction", backs)):
        if parts:
            every = np.concatenate(parts)
            out[name] = linear_probe(
                [every[a] for a, _ in halves], [every[b] for _, b in halves], [y[a] for a, _ in halves], [y[b] for _, b in halves]
            )
    return out
