"""One batch of activations, split into sparse and dense columns, so that every state reads it once and works in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

DENSE_SHARE = 0.08
"""A column with more nonzeros than this share is handled densely: a BLAS row costs about a twelfth of a sparse one, and centring dense
columns keeps large offsets from cancelling."""
MOSTLY = 0.5
"""Activations with more nonzeros than this share are kept as a matrix."""
BLOCK = 2**17
"""Activations that are compressed at a time (half a megabyte of float32)."""


def as_array(activations: Any) -> np.ndarray:
    """A numpy view of a numpy array or a torch tensor [n, m]."""
    if hasattr(activations, "detach"):
        activations = activations.detach().cpu().numpy()
    array = np.asarray(activations)
    if array.ndim != 2:
        raise ValueError(f"activations must be [n, m], got shape {array.shape}")
    return array


def compress(array: np.ndarray, at_most: float) -> sp.csr_matrix | None:
    """The nonzeros of activations [n, m], values as they are; None where they are more than the share `at_most` of all.

    Reads the matrix once, in blocks of rows whose mask and indices stay in the processor's cache.
    """
    n, m = array.shape
    if not array.size:
        return sp.csr_matrix((n, m), dtype=array.dtype)
    step = max(1, BLOCK // m)
    columns, values, counts, found = [], [], [np.zeros(1, np.int64)], 0
    for first in range(0, n, step):
        block = np.ascontiguousarray(array[first : first + step])
        flat = np.flatnonzero(block != 0)  # on a mask this is several times faster than on floats
        found += len(flat)
        if found > at_most * array.size:
            return None
        edges = np.searchsorted(flat, np.arange(0, block.size + 1, m))
        counts.append(np.diff(edges))
        values.append(block.reshape(-1)[flat])
        flat -= np.repeat(np.arange(0, block.size, m), counts[-1])
        columns.append(flat.astype(np.int32))
    return sp.csr_matrix((np.concatenate(values), np.concatenate(columns), np.cumsum(np.concatenate(counts))), shape=(n, m))


def as_rows(activations: Any) -> Any:
    """Activations [n, m] so that rows can be taken: a CSR matrix where at most half of them are nonzero, else a numpy array."""
    if sp.issparse(activations):
        return activations.tocsr()
    array = as_array(activations)
    rows = compress(array, MOSTLY) if len(array) >= 4 else None
    return array if rows is None else rows


class Columns:
    """Activations [n, m] as `dense` float64 [n, len(dense_index)] and `sparse` float64 CSC [n, m], empty in the dense columns.

    `nonzero` int64 [m]: entries that are not zero.
    """

    def __init__(self, activations: Any) -> None:
        rows = as_rows(activations)
        self.n, self.m = rows.shape
        if not np.isfinite(rows.data if sp.issparse(rows) else rows).all():
            raise ValueError("activations hold NaN or infinity")
        if not sp.issparse(rows) or self.n < 4:
            array = rows.toarray() if sp.issparse(rows) else rows
            self.dense_index = np.arange(self.m)
            self.dense = array.astype(np.float64)
            self.sparse = sp.csc_matrix((self.n, self.m), dtype=np.float64)
            self.nonzero = np.count_nonzero(array, axis=0).astype(np.int64) if self.n else np.zeros(self.m, np.int64)
            return
        sparse = rows.tocsc().astype(np.float64)
        self.nonzero = np.diff(sparse.indptr).astype(np.int64)
        self.dense_index = np.flatnonzero(self.nonzero > DENSE_SHARE * self.n)
        self.dense = sparse[:, self.dense_index].toarray()
        if len(self.dense_index):
            is_dense = np.zeros(self.m, bool)
            is_dense[self.dense_index] = True
            keep = ~np.repeat(is_dense, self.nonzero)
            start = np.concatenate([[0], np.cumsum(np.where(is_dense, 0, self.nonzero))])
            sparse = sp.csc_matrix((sparse.data[keep], sparse.indices[keep], start), shape=sparse.shape)
        self.sparse = sparse

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
