"""Mergeable activity of every neuron (frequency, mean, extremes, L0) and the reconstruction error (FVU)."""

from __future__ import annotations

from typing import Any

import numpy as np

from medsae.metrics.columns import as_columns


class Activity:
    """Counts and extremes of m neurons over n images.

    Attributes:
        n: images; n_active: images with activation > 0 [m]; low, high: extremes [m]; mean: [m].
    """

    def __init__(self, neurons: int) -> None:
        self.n = 0
        self.n_active = np.zeros(neurons, np.int64)
        self.mean = np.zeros(neurons)
        self.low = np.full(neurons, np.inf)
        self.high = np.full(neurons, -np.inf)

    def update(self, activations: Any) -> None:
        """Adds a batch [n, m]."""
        columns = as_columns(activations)
        if not columns.n:
            return
        other = Activity(columns.m)
        other.n = columns.n
        other.low, other.high = columns.extremes()
        if columns.sparse.nnz:
            other.mean = np.asarray(columns.sparse.sum(0)).ravel() / columns.n
            positive = np.concatenate([[0], np.cumsum(columns.sparse.data > 0)])
            other.n_active = np.diff(positive[columns.sparse.indptr])
        if len(columns.dense_index):
            index, block = columns.dense_index, columns.dense
            other.mean[index] = block.mean(0)
            other.n_active[index] = (block > 0).sum(0)
        self.merge(other)

    def merge(self, other: Activity) -> Activity:
        """Adds another state's images to this one, in place; returns self."""
        n = self.n + other.n
        if n:
            self.mean = self.mean + (other.mean - self.mean) * (other.n / n)
        self.n = n
        self.n_active = self.n_active + other.n_active
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        return self

    @property
    def l0(self) -> float:
        """Mean number of active neurons an image."""
        return float(self.n_active.sum() / self.n) if self.n else float("nan")


class Reconstruction:
    """Fraction of variance unexplained: sum of ||x - x_hat||^2 over sum of ||x - mean x||^2, both over all images, in float64.

    One ratio of sums over the data set; a mean of per-batch ratios would depend on the batches (SAELens issue 659).
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.error = 0.0
        self.mean = np.zeros(dim)
        self.m2 = 0.0

    def update(self, x: np.ndarray, x_hat: np.ndarray) -> None:
        """Adds a batch: embeddings [n, d] and their reconstruction [n, d]."""
        if not len(x):
            return
        x64 = np.asarray(x, np.float64)
        other = Reconstruction(x64.shape[1])
        other.n = len(x64)
        residual = x64 - np.asarray(x_hat, np.float64)
        other.error = float(np.einsum("ij,ij->", residual, residual))
        centred = x64 - x64[0]
        shift = centred.mean(0)
        centred -= shift
        other.mean, other.m2 = x64[0] + shift, float(np.einsum("ij,ij->", centred, centred))
        self.merge(other)

    def merge(self, other: Reconstruction) -> Reconstruction:
        """Adds another state's images to this one, in place; returns self."""
        n = self.n + other.n
        if n:
            delta = other.mean - self.mean
            self.m2 += other.m2 + float(delta @ delta) * self.n * other.n / n
            self.mean = self.mean + delta * (other.n / n)
        self.error += other.error
        self.n = n
        return self

    def compute(self) -> float | None:
        """FVU; None without images or variance."""
        return self.error / self.m2 if self.m2 > 0 else None
