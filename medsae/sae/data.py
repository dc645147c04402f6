"""Training data: input checks, centring and scale, the order of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from medsae.errors import DataError

CHUNK = 16384
"""Rows that are converted to float64 at a time."""


@dataclass(frozen=True)
class Scaling:
    """Centring and scale of the inputs: the network sees (x - mean) * scale, whose mean squared norm over the training split is d.

    `mean` float64 [d]; `variance` is the mean of ||x - mean||^2 before scaling (the denominator of FVU, by sample, is d after scaling).
    """

    mean: np.ndarray
    scale: float
    variance: float

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Raw embeddings [n, d] to the network's inputs, float32 [n, d]."""
        out = np.empty(x.shape, np.float32)
        for start in range(0, len(x), CHUNK):
            out[start : start + CHUNK] = (x[start : start + CHUNK].astype(np.float64) - self.mean) * self.scale
        return out


def check_embeddings(x: np.ndarray, where: str, dim: int | None = None) -> None:
    """Stops on embeddings that no autoencoder can be trained on.

    Raises:
        DataError: fewer than two rows, a wrong width, values that are not finite, or all rows alike.
    """
    if x.ndim != 2 or len(x) < 2:
        raise DataError(f"{where}: {len(x)} embeddings are too few to train on (at least 2); lower data.eval_fraction or extract more images")
    if dim is not None and x.shape[1] != dim:
        raise DataError(f"{where}: embeddings are {x.shape[1]} wide and the encoder of the manifest is {dim} wide; run extract again")
    bad = sum(int((~np.isfinite(x[s : s + CHUNK])).any(axis=1).sum()) for s in range(0, len(x), CHUNK))
    if bad:
        raise DataError(f"{where}: {bad} of {len(x)} embeddings hold NaN or infinity; check the encoder's weights and dtype, then run extract again")


def fit_scaling(x: np.ndarray, where: str = "embeddings") -> Scaling:
    """Mean and scale of the training split [n, d], in float64 and independent of the order of additions to 1e-15.

    The paper's normalisation: centre on the training mean, scale so that the mean of ||x||^2 is d.
    """
    n, d = x.shape
    mean = sum((x[s : s + CHUNK].astype(np.float64).sum(axis=0) for s in range(0, n, CHUNK)), np.zeros(d)) / n
    variance = sum(float(((x[s : s + CHUNK].astype(np.float64) - mean) ** 2).sum()) for s in range(0, n, CHUNK)) / n
    if not variance > 1e-12 * max(1.0, float(mean @ mean)):
        raise DataError(f"{where}: all {n} embeddings are alike, there is nothing to learn; check the images and the encoder")
    return Scaling(mean, math.sqrt(d / variance), variance)


def batch_plan(n: int, batch_size: int) -> tuple[int, int]:
    """Steps an epoch and samples a batch.

    Batches are equal: the fewest steps that keep a batch within `batch_size`; the few samples (fewer than steps) that do not fill a batch differ from
    epoch to epoch, because each epoch has an order of its own.
    """
    steps = -(-n // batch_size)
    return steps, n // steps


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the samples in an epoch: a permutation of range(n), the same wherever it is computed."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def geometric_median(x: np.ndarray, iterations: int = 100, tolerance: float = 1e-5) -> np.ndarray:
    """Geometric median of rows [n, d] by Weiszfeld's iteration, float64 [d]."""
    rows = x.astype(np.float64)
    guess: np.ndarray = rows.mean(axis=0)
    for _ in range(iterations):
        weights = 1.0 / np.maximum(np.linalg.norm(rows - guess, axis=1), 1e-12)
        following: np.ndarray = (weights[:, None] * rows).sum(axis=0) / weights.sum()
        moved = float(np.linalg.norm(following - guess))
        guess = following
        if moved <= tolerance * max(1.0, float(np.linalg.norm(guess))):
            break
    return guess
