"""One batch of activations, split into sparse and dense columns, so that every state reads it once and works in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

DENSE_SHARE = 0.08
"""A column with more nonzeros than this share is handled densely: a BLAS row costs about a twelfth of a sparse one, and centring dense
columns keeps large offsets from cancelling."""


def as_array(activations: Any) -> np.ndarray:
    """A numpy view of a numpy array or a torch tensor [n, m]."""
    if hasattr(activations, "detach"):
        activations = activations.detach().cpu().numpy()
    array = np.asarray(activations)
    if array.ndim != 2:
        raise ValueError(f"activations must be [n, m], got shape {array.shape}")
    return array


class Columns:
    """Activations [n, m] as `dense` float64 [n, len(dense_index)] and `sparse` float64 CSC [n, m], empty in the dense columns.

    `nonzero` int64 [m]: entries that are not zero. `index`: the batch's own columns.
    """

    def __init__(self, activations: Any) -> None:
        array = as_array(activations)
        self.n, self.m = array.shape
        if not np.isfinite(array).all():
            raise ValueError("activations hold NaN or infinity")
        share = np.count_nonzero(array) / max(array.size, 1)
        if share > 0.5 or self.n < 4:
            self.dense_index = np.arange(self.m)
            self.dense = array.astype(np.float64)
            self.sparse = sp.csc_matrix((self.n, self.m), dtype=np.float64)
            self.nonzero = np.count_nonzero(array, axis=0).astype(np.int64) if self.n else np.zeros(self.m, np.int64)
            return
        flat = np.flatnonzero(array)
        rows, cols = np.divmod(flat, self.m)
        self.nonzero = np.bincount(cols, minlength=self.m).astype(np.int64)
        self.dense_index = np.flatnonzero(self.nonzero > DENSE_SHARE * self.n)
        self.dense = array[:, self.dense_index].astype(np.float64)
        values = array.ravel()[flat]
        if len(self.dense_index):
            is_dense = np.zeros(self.m, bool)
            is_dense[self.dense_index] = True
            keep = ~is_dense[cols]
            rows, cols, values = rows[keep], cols[keep], values[keep]
        start = np.zeros(self.n + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=self.n), out=start[1:])
        self.sparse = sp.csr_matrix((values.astype(np.float64), cols, start), shape=(self.n, self.m)).tocsc()

    def take(self, rows: np.ndarray) -> Columns:
        """The same columns of some rows (a boolean mask or indices), without splitting again."""
        out = object.__new__(Columns)
        index = np.flatnonzero(rows) if rows.dtype == bool else rows
        out.n, out.m, out.dense_index = len(index), self.m, self.dense_index
        out.dense = self.dense[index]
        out.sparse = self.sparse[index] if self.sparse.nnz else sp.csc_matrix((len(index), self.m), dtype=np.float64)
        out.nonzero = np.diff(out.sparse.indptr).astype(np.int64)
        out.nonzero[self.dense_index] = np.count_nonzero(out.dense, axis=0)
        return out

    def column(self, j: int) -> np.ndarray:
        """Column j, float64 [n]."""
        where = np.searchsorted(self.dense_index, j)
        if where < len(self.dense_index) and self.dense_index[where] == j:
            return self.dense[:, where]
        return np.asarray(self.sparse[:, [j]].todense()).ravel()

    def extremes(self) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest value of every column [m]; the batch must not be empty."""
        low, high = np.zeros(self.m), np.zeros(self.m)
        if self.sparse.nnz:
            low = np.asarray(self.sparse.min(axis=0).todense()).ravel()
            high = np.asarray(self.sparse.max(axis=0).todense()).ravel()
        low[self.dense_index], high[self.dense_index] = self.dense.min(0), self.dense.max(0)
        return low, high

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, column, value) of every sparse nonzero and of every entry of the dense columns."""
        rows, cols, values = [self.sparse.indices], [np.repeat(np.arange(self.m), np.diff(self.sparse.indptr))], [self.sparse.data]
        if len(self.dense_index):
            rows.append(np.repeat(np.arange(self.n), len(self.dense_index)))
            cols.append(np.tile(self.dense_index, self.n))
            values.append(self.dense.ravel())
        return np.concatenate(rows).astype(np.int64), np.concatenate(cols), np.concatenate(values)


def as_columns(activations: Any) -> Columns:
    """Activations in whatever form as `Columns`."""
    return activations if isinstance(activations, Columns) else Columns(activations)
