"""Training data: input checks, centring and scale, the order of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from medsae.errors import DataError

CHUNK = 16384
"""Rows that are converted to float64 at a time."""
MEDIAN_ROWS = 32768
"""Rows that the geometric median is taken of, at most."""


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
    check_counts(len(x), x.shape[1] if x.ndim == 2 else 0, not_finite(x) if x.ndim == 2 else 0, where, dim)


def not_finite(x: np.ndarray) -> int:
    """How many rows of [n, d] hold NaN or infinity."""
    return sum(int((~np.isfinite(x[s : s + CHUNK])).any(axis=1).sum()) for s in range(0, len(x), CHUNK))


def check_counts(rows: int, width: int, bad: int, where: str, dim: int | None = None) -> None:
    """`check_embeddings` from counts: rows, their width, and rows that are not finite."""
    if rows < 2 or width == 0:
        raise DataError(f"{where}: {rows} embeddings are too few to train on (at least 2); lower data.eval_fraction or extract more images")
    if dim is not None and width != dim:
        raise DataError(f"{where}: embeddings are {width} wide and the encoder of the manifest is {dim} wide; run extract again")
    if bad:
        raise DataError(f"{where}: {bad} of {rows} embeddings hold NaN or infinity; check the encoder's weights and dtype, then run extract again")


@dataclass(frozen=True)
class Moments:
    """What scaling needs of some rows, in float64; parts merge in any grouping to the same numbers but for rounding (Chan et al. 1983).

    `count` rows; `mean` [d]; `spread` the sum of ||x - mean||^2.
    """

    count: int
    mean: np.ndarray
    spread: float

    @classmethod
    def of(cls, x: np.ndarray) -> Moments:
        """Of rows [n, d], n > 0."""
        found = None
        for start in range(0, len(x), CHUNK):
            rows = x[start : start + CHUNK].astype(np.float64)
            mean = rows.mean(axis=0)
            part = cls(len(rows), mean, float(((rows - mean) ** 2).sum()))
            found = part if found is None else found.merge(part)
        assert found is not None
        return found

    def merge(self, other: Moments) -> Moments:
        """Of the rows of both."""
        count = self.count + other.count
        apart = other.mean - self.mean
        spread = self.spread + other.spread + float(apart @ apart) * self.count * other.count / count
        return Moments(count, self.mean + apart * (other.count / count), spread)

    def scaling(self, where: str = "embeddings") -> Scaling:
        """Centre on the mean, scale so that the mean of ||x||^2 is d (the paper's normalisation).

        Raises:
            DataError: all rows are alike.
        """
        variance = self.spread / self.count
        if not variance > 1e-12 * max(1.0, float(self.mean @ self.mean)):
            raise DataError(f"{where}: all {self.count} embeddings are alike, there is nothing to learn; check the images and the encoder")
        return Scaling(self.mean, math.sqrt(len(self.mean) / variance), variance)


def fit_scaling(x: np.ndarray, where: str = "embeddings") -> Scaling:
    """Mean and scale of the training split [n, d], in one pass and in float64."""
    return Moments.of(x).scaling(where)


def center_rows(n: int, seed: int) -> np.ndarray:
    """The rows, ascending, whose geometric median starts `b_dec`: all, or `MEDIAN_ROWS` drawn from the seed."""
    if n <= MEDIAN_ROWS:
        return np.arange(n)
    rows: np.ndarray = np.sort(np.random.default_rng(seed).choice(n, MEDIAN_ROWS, replace=False, shuffle=False))
    return rows


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
