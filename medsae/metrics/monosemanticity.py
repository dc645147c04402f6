"""Monosemanticity score: mean pairwise similarity of images, weighted by how strongly a neuron fires on both. One pass, mergeable.

Definition (Pach et al. 2025, "Sparse Autoencoders Learn Monosemantic Features in Vision-Language Models", as their code computes it):
with w_i the activation scaled to [0, 1] over the data set and e_i a unit embedding of image i,

    MS = sum_{i<j} w_i w_j <e_i, e_j> / sum_{i<j} w_i w_j.

As ||e_i|| = 1, both double sums close: sum_{i<j} w_i w_j <e_i, e_j> = (||sum w_i e_i||^2 - sum w_i^2) / 2, and the same with 1 in place of e.
The scale of w cancels, so only the neuron's minimum is needed: w_i = a_i - min a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from medsae.metrics.columns import as_columns
from medsae.metrics.moments import Moments


def unit(embeddings: np.ndarray) -> np.ndarray:
    """Rows divided by their norms, float64.

    Raises:
        ValueError: when a row is zero, as it has no direction.
    """
    x = np.asarray(embeddings, np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    if (norm == 0).any():
        raise ValueError("a reference embedding is all zeros; cosine similarity is not defined for it")
    return np.asarray(x / norm)


@dataclass(frozen=True)
class MonosemanticityResult:
    """`score` [m], NaN for a neuron that fires on fewer than two images or is constant; `baseline`: mean cosine similarity of any two
    images (the score of a neuron that fires on all alike); `gain` = score - baseline."""

    score: np.ndarray
    baseline: float
    n: int

    @property
    def gain(self) -> np.ndarray:
        return np.asarray(self.score - self.baseline)


class Monosemanticity:
    """The score's state: moments of the activations with the unit embedding's coordinates, O(m D) float64 numbers.

    Args:
        neurons: m.
        dim: width D of the reference embedding.
    """

    def __init__(self, neurons: int, dim: int) -> None:
        self.moments = Moments(neurons, dim)
        self.low = np.full(neurons, np.inf)
        self.high = np.full(neurons, -np.inf)

    def update(self, activations: Any, reference: np.ndarray) -> None:
        """Adds a batch: activations [n, m] and reference embeddings [n, D], of any norm but zero."""
        columns = as_columns(activations)
        if not columns.n:
            return
        self.moments.update(columns, unit(reference))
        low, high = columns.extremes()
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)

    def merge(self, other: Monosemanticity) -> Monosemanticity:
        """Adds another state's images to this one, in place; returns self."""
        self.moments.merge(other.moments)
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        return self

    def compute(self) -> MonosemanticityResult:
        """The score of every neuron and the baseline."""
        state = self.moments
        n = float(state.n[0])
        if n < 2:
            return MonosemanticityResult(np.full(len(self.low), np.nan), float("nan"), int(n))
        above = (state.origin[:, 0] - self.low) + state.mean[:, 0]
        total = n * above
        square = state.m2[:, 0] + n * above**2
        # ||co + total * mean_e||^2 without a second [m, D] array
        vector = np.einsum("ij,ij->i", state.co, state.co) + 2 * total * (state.co @ state.mean_y) + total**2 * float(state.mean_y @ state.mean_y)
        pairs = total**2 - square
        defined = (self.high > self.low) & (pairs > 1e-12 * total**2)
        with np.errstate(invalid="ignore", divide="ignore"):
            score = np.where(defined, (vector - square) / pairs, np.nan)
        u = n * state.mean_y
        return MonosemanticityResult(score, float((u @ u - n) / (n * (n - 1))), int(n))
