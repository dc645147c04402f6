"""Where training batches come from: inputs that are held in memory, and the order in which inputs that are not are streamed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from medsae.errors import ConfigError
from medsae.sae.data import batch_plan, epoch_order

LANES = 8
"""Places of the epoch's order that a streamed batch is drawn from. A multiple of the number of workers, so that it is theirs to share."""


class Source(Protocol):
    """Scaled training inputs. The batches of an epoch depend on (seed, epoch, batch size) only."""

    @property
    def samples(self) -> int:
        """Samples of the training split."""

    @property
    def dim(self) -> int:
        """Width of the inputs."""

    def plan(self, batch_size: int) -> tuple[int, int]:
        """Steps an epoch and samples a global batch."""

    def batches(self, seed: int, epoch: int, batch_size: int, rank: int, world: int) -> Iterator[Tensor]:
        """Samples rank, rank + world, ... of every global batch of an epoch, [b, d]."""

    def shares(self, rank: int, world: int) -> Iterator[Tensor]:
        """Every sample once over all workers, [n, d] at a time."""


class Held:
    """Inputs [n, d] in memory, shuffled exactly."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.samples, self.dim = x.shape

    def plan(self, batch_size: int) -> tuple[int, int]:
        return batch_plan(self.samples, batch_size)

    def batches(self, seed: int, epoch: int, batch_size: int, rank: int, world: int) -> Iterator[Tensor]:
        steps, batch = self.plan(batch_size)
        order = epoch_order(self.samples, seed, epoch)
        for step in range(steps):
            share = order[step * batch : (step + 1) * batch][rank::world]
            yield self.x[torch.from_numpy(share).to(self.x.device)]

    def shares(self, rank: int, world: int) -> Iterator[Tensor]:
        yield self.x[rank::world]


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a part (of those of the training split)."""

    part: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Whole steps of an epoch that are shuffled together: for each of a worker's lanes the rows to read and how they are permuted."""

    epoch: int
    first_step: int
    steps: int
    lanes: tuple[int, ...]
    rows: tuple[tuple[Rows, ...], ...]


@dataclass(frozen=True)
class StreamOrder:
    """The order of an epoch over parts that are read one after the other.

    Parts are put in a random order and their rows strung together; the string is cut into `lanes` equal pieces, and every batch takes as many samples
    from each. Within a lane, the samples of a window of steps (about `window` samples over all lanes) are permuted. So a sample can share a batch with
    one of any part, and each part is read about once. It depends on (seed, epoch, batch size) and not on who reads.

    `counts`: rows of each part in the training split.
    """

    counts: tuple[int, ...]
    window: int
    lanes: int = LANES

    @property
    def samples(self) -> int:
        return sum(self.counts)

    def plan(self, batch_size: int) -> tuple[int, int]:
        """Steps an epoch and samples a batch; at most lanes * steps samples are left out of an epoch, others in each."""
        steps = -(-self.samples // batch_size)
        batch = self.samples // self.lanes // steps * self.lanes
        if batch == 0:
            raise ConfigError(f"batch_size = {batch_size} is too small to stream {self.samples} embeddings; take at least {2 * self.lanes}")
        return steps, batch

    def windows(self, seed: int, epoch: int, batch_size: int, rank: int, world: int) -> Iterator[Window]:
        """A worker's windows of an epoch, in order. `world` must divide the number of lanes."""
        steps, batch = self.plan(batch_size)
        parts = np.random.default_rng([seed, epoch]).permutation(len(self.counts))
        ends = np.cumsum(np.asarray(self.counts, np.int64)[parts])
        length, share = self.samples // self.lanes, batch // self.lanes
        mine = tuple(range(rank, self.lanes, world))
        stride = max(1, self.window // batch)
        for first in range(0, steps, stride):
            count = min(stride, steps - first)
            spans = [(lane * length + first * share, lane * length + (first + count) * share) for lane in mine]
            yield Window(epoch, first, count, mine, tuple(self._rows(parts, ends, *span) for span in spans))

    def _rows(self, parts: np.ndarray, ends: np.ndarray, start: int, stop: int) -> tuple[Rows, ...]:
        found = []
        for place in range(int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, stop, side="left")) + 1):
            begin = int(ends[place - 1]) if place else 0
            rows = Rows(int(parts[place]), max(start, begin) - begin, min(stop, int(ends[place])) - begin)
            if rows.stop > rows.start:
                found.append(rows)
        return tuple(found)


def arrange(window: Window, seed: int, pieces: list[np.ndarray]) -> np.ndarray:
    """A worker's batches of a window, [steps, b, d], from the rows [n, d] of each of its lanes: samples in the order of the global batch."""
    mixed = []
    for lane, piece in zip(window.lanes, pieces, strict=True):
        order = np.random.default_rng([seed, window.epoch, lane, window.first_step]).permutation(len(piece))
        mixed.append(piece[order].reshape(window.steps, -1, piece.shape[1]))
    # Sample i of a batch is of lane i mod lanes, so that a worker's are rank, rank + world, ...
    return np.stack(mixed, axis=2).reshape(window.steps, -1, pieces[0].shape[1])


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the memory of an array that may be read-only. It is only read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
