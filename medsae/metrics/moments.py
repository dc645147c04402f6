"""Mergeable first and second moments of every neuron with every target, in float64.

The state holds means and centred sums, never raw sums of squares, so that a large offset cannot cancel. Batches are combined by the pairwise
update of Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance", The American Statistician 37(3), formula (1.5), and
its extension to co-moments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

from medsae.metrics.columns import Columns, as_columns

EPS = float(np.finfo(np.float64).eps)
UNSAFE = 1e-2
"""A variance below this share of the mean square is computed again about its own mean."""
BLOCK = 512
"""Neurons whose co-moments are worked on at once, so that what is made on the way stays in the cache."""
STRIP = 32
"""Targets whose sparse products are taken at once."""


class Moments:
    """Means, variances and covariances of m neurons with T targets; a target may be missing (NaN) for any image.

    Attributes:
        n: images [1], or [T] once any target was missing: a target has its own n.
        origin: a value of each neuron [m, 1]; `mean` is relative to it, so that its rounding error is that of the spread, not of the offset.
        mean, m2: of the activations over the images that the target has [m, 1] or [m, T]; `m2` is the sum of squares about the mean.
        mean_y, m2_y: of the targets [T].
        co: sum over images of (a - mean a)(y - mean y) [m, T].
        scale: largest |a| [m, 1], and [T] of the targets, by which rounding errors are told from variance.
    """

    def __init__(self, neurons: int, targets: int) -> None:
        self.n = np.zeros(1)
        self.origin = np.zeros((neurons, 1))
        self.mean = np.zeros((neurons, 1))
        self.m2 = np.zeros((neurons, 1))
        self.mean_y = np.zeros(targets)
        self.m2_y = np.zeros(targets)
        self.co = np.zeros((neurons, targets))
        self.scale = np.zeros((neurons, 1))
        self.scale_y = np.zeros(targets)

    def update(self, activations: Any, targets: np.ndarray) -> None:
        """Adds a batch: activations [n, m] (numpy, torch or `Columns`) and targets [n, T], NaN where missing."""
        columns = as_columns(activations)
        y = np.asarray(targets, dtype=np.float64)
        if columns.m != len(self.mean) or y.shape != (columns.n, len(self.mean_y)):
            raise ValueError(f"expected [n, {len(self.mean)}] and [n, {len(self.mean_y)}], got [{columns.n}, {columns.m}] and {list(y.shape)}")
        if columns.n:
            self.merge(_of_batch(columns, y))

    def merge(self, other: Moments) -> Moments:
        """Adds another state's images to this one, in place; returns self."""
        if not self.n.any():
            self.origin = other.origin
        n = self.n + other.n
        safe = np.where(n > 0, n, 1.0)
        both = self.n * other.n / safe
        delta = other.mean - self.mean + (other.origin - self.origin)
        delta_y = other.mean_y - self.mean_y
        self.co += other.co
        for start in range(0, len(self.co), BLOCK):
            rows = slice(start, start + BLOCK)
            self.co[rows] += (delta[rows] * both) * delta_y
        self.m2 = self.m2 + other.m2 + delta**2 * both
        self.m2_y = self.m2_y + other.m2_y + delta_y**2 * both
        self.mean = self.mean + delta * (other.n / safe)
        self.mean_y = self.mean_y + delta_y * (other.n / safe)
        self.n = n
        self.scale = np.maximum(self.scale, other.scale)
        self.scale_y = np.maximum(self.scale_y, other.scale_y)
        return self

    def select(self, targets: list[int]) -> Moments:
        """The state of some targets only (a copy)."""
        out = Moments(len(self.mean), len(targets))
        wide = len(self.n) > 1
        out.n = self.n[targets] if wide else self.n.copy()
        out.mean = self.mean[:, targets] if wide else self.mean.copy()
        out.m2 = self.m2[:, targets] if wide else self.m2.copy()
        out.mean_y, out.m2_y, out.co = self.mean_y[targets], self.m2_y[targets], self.co[:, targets]
        out.origin = self.origin.copy()
        out.scale, out.scale_y = self.scale.copy(), self.scale_y[targets]
        return out

    def compute(self) -> np.ndarray:
        """Pearson correlation [m, T]; NaN where either side has no variance beyond rounding."""
        constant = self.m2 <= self.n * (16 * EPS * self.scale) ** 2
        constant_y = self.m2_y <= self.n * (16 * EPS * self.scale_y) ** 2
        with np.errstate(invalid="ignore", divide="ignore"):
            r = self.co / (np.sqrt(self.m2) * np.sqrt(self.m2_y))
        return np.where(constant | constant_y, np.nan, np.clip(r, -1.0, 1.0))


def _chop(m2: np.ndarray, square: np.ndarray) -> np.ndarray:
    """A sum of squares that is rounding error against what it was computed from, as zero."""
    return np.where(m2 <= 64 * EPS * square, 0.0, m2)


def _product(s: sp.csr_matrix, y: np.ndarray) -> np.ndarray:
    """s @ y [m, T]. Wide y is taken in strips that stay in the processor's cache while the rows of s jump about in them."""
    if y.shape[1] <= 2 * STRIP:
        return np.asarray(s @ y)
    out = np.empty((s.shape[0], y.shape[1]))
    for start in range(0, y.shape[1], STRIP):
        out[:, start : start + STRIP] = s @ np.ascontiguousarray(y[:, start : start + STRIP])
    return out


def _of_batch(columns: Columns, y: np.ndarray) -> Moments:
    """The state of one batch, two-pass in its dense columns."""
    out = Moments(columns.m, y.shape[1])
    given = ~np.isnan(y)
    complete = bool(given.all())
    mask = np.ones((columns.n, 1)) if complete else given.astype(np.float64)
    out.n = mask.sum(0)
    safe = np.where(out.n > 0, out.n, 1.0)
    # Two passes in y: centred by the first value seen, so that a constant gives exactly zero.
    known = y if complete else np.where(given, y, 0.0)
    first = known[given.argmax(0), np.arange(y.shape[1])]
    yc = known - first if complete else np.where(given, known - first, 0.0)
    shift = yc.sum(0) / safe
    yc -= shift if complete else np.where(given, shift, 0.0)
    out.mean_y, out.m2_y = first + shift, np.einsum("ij,ij->j", yc, yc)
    out.scale_y = np.maximum(known.max(0), -known.min(0))
    shape = (columns.m, len(out.n))
    out.mean, out.m2 = np.zeros(shape), np.zeros(shape)
    if columns.sparse.nnz:
        s, q = columns.sparse.T.tocsr(), columns.sparse.T.tocsr()
        q.data = q.data**2
        total, square = s @ mask, q @ mask
        out.mean = total / safe
        out.m2 = _chop(square - total * out.mean, square)
        out.co = _product(s, yc)
        out.scale = abs(s).max(axis=1).toarray()
        # Few of a label's images may all lie among the few active ones: then the subtraction above loses digits.
        unsafe = np.flatnonzero(((out.m2 < UNSAFE * square) & (out.n > 1)).any(1))
        if len(unsafe):
            _dense(out, unsafe, columns.sparse[:, unsafe].toarray(), mask, safe, yc, complete)
    if len(columns.dense_index):
        _dense(out, columns.dense_index, columns.dense, mask, safe, yc, complete)
    return out


def _dense(out: Moments, index: np.ndarray, block: np.ndarray, mask: np.ndarray, safe: np.ndarray, yc: np.ndarray, complete: bool) -> None:
    """Fills the rows `index` of a batch's state from dense columns [n, len(index)]."""
    centred = block - block[0]
    middle = centred.mean(0)
    centred -= middle
    out.origin[index, 0] = block[0]
    mean = middle[:, None]
    if complete:
        out.mean[index] = mean
        out.m2[index] = np.einsum("ij,ij->j", centred, centred)[:, None]
    else:
        total, square = centred.T @ mask, (centred * centred).T @ mask
        out.mean[index] = mean + total / safe
        out.m2[index] = _chop(square - total**2 / safe, square)
    out.co[index] = centred.T @ yc
    out.scale[index, 0] = np.abs(block).max(0)
    if complete:
        return
    # A neuron may hardly vary over the few images of a label: then its own mean over them has to go first.
    for t in np.flatnonzero(((out.m2[index] < UNSAFE * square) & (out.n > 1)).any(0)):
        few, given = np.flatnonzero(out.m2[index, t] < UNSAFE * square[:, t]), mask[:, t] > 0
        own = centred[np.ix_(given, few)]
        own = own - own[0]
        shift = own.mean(0)
        own -= shift
        out.mean[index[few], t] = middle[few] + centred[given][0, few] + shift
        out.m2[index[few], t] = np.einsum("ij,ij->j", own, own)
        out.co[index[few], t] = own.T @ yc[given, t]
