"""Running top-k: the most activating images of every neuron, mergeable and exact."""

from __future__ import annotations

from typing import Any

import numpy as np

from medsae.metrics.columns import as_columns


class TopImages:
    """The k largest activations of every neuron with the key of their image.

    Ties go to the lower key, so the result does not depend on how the images were partitioned.

    Args:
        neurons: m.
        k: images kept a neuron.
        active_only: keep activations above zero only; otherwise the signed value counts, whatever its sign.
    """

    def __init__(self, neurons: int, k: int, active_only: bool = True) -> None:
        self.m, self.k, self.active_only = neurons, k, active_only
        self.neuron = np.zeros(0, np.int64)
        self.value = np.zeros(0)
        self.key = np.zeros(0, np.uint64)
        self._floor = np.full(neurons, 0.0 if active_only else -np.inf)
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._pending_size = 0

    def update(self, activations: Any, keys: np.ndarray) -> None:
        """Adds a batch [n, m] with the image keys, uint64 [n], unique over all batches."""
        columns = as_columns(activations)
        if not columns.n:
            return
        rows, cols, values = columns.entries()
        if not self.active_only and len(columns.dense_index) < self.m:
            # A sparse column's zeros are values like any other here: the k lowest keys among them can still be in the top.
            rows, cols, values = (np.concatenate(p) for p in zip((rows, cols, values), self._zeros(columns, keys), strict=True))
        self._add(cols, values, np.asarray(keys, np.uint64)[rows])

    def _add(self, neuron: np.ndarray, value: np.ndarray, key: np.ndarray) -> None:
        """Takes what can still be among the k; sorts once there is enough of it."""
        keep = value >= self._floor[neuron]
        if self.active_only:
            keep &= value > 0
        self._pending.append((neuron[keep], value[keep], key[keep]))
        self._pending_size += len(self._pending[-1][0])
        if self._pending_size > max(2 * self.m * self.k, 1 << 18):
            self._compact()

    def _zeros(self, columns: Any, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, cols = [], []
        order = np.argsort(keys, kind="stable")
        sparse = np.setdiff1d(np.arange(self.m), columns.dense_index)
        for j in sparse:
            taken = columns.sparse.indices[columns.sparse.indptr[j] : columns.sparse.indptr[j + 1]]
            free = order[~np.isin(order, taken)][: self.k]
            rows.append(free)
            cols.append(np.full(len(free), j))
        return np.concatenate(rows), np.concatenate(cols), np.zeros(sum(map(len, rows)))

    def _compact(self) -> None:
        neuron, value, key = (np.concatenate(parts) for parts in zip((self.neuron, self.value, self.key), *self._pending, strict=True))
        order = np.lexsort((key, -value, neuron))
        neuron, value, key = neuron[order], value[order], key[order]
        start = np.searchsorted(neuron, np.arange(self.m))
        rank = np.arange(len(neuron)) - start[neuron]
        keep = rank < self.k
        last = rank == self.k - 1
        self._floor = self._floor.copy()  # arrays out of an object store are read-only
        self._floor[neuron[last]] = value[last]
        self.neuron, self.value, self.key = neuron[keep], value[keep], key[keep]
        self._pending, self._pending_size = [], 0

    def merge(self, other: TopImages) -> TopImages:
        """Adds another state's images to this one, in place; returns self."""
        lists = [(other.neuron, other.value, other.key), *other._pending]
        self._add(*(np.concatenate(parts) for parts in zip(*lists, strict=True)))
        return self

    def compute(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(neuron, rank, value, key), ordered by neuron and rank; rank 0 is the most activating image."""
        self._compact()
        start = np.searchsorted(self.neuron, np.arange(self.m))
        return self.neuron, np.arange(len(self.neuron)) - start[self.neuron], self.value, self.key
