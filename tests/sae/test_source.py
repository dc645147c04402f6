"""Streamed training data: the order of an epoch, its shuffle, and scaling from parts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsae.errors import ConfigError, DataError
from medsae.sae.config import SAEConfig
from medsae.sae.data import Moments, center_rows, fit_scaling
from medsae.sae.source import Held, StreamOrder, arrange
from medsae.sae.training import Trainer, train

COUNTS = (37, 0, 61, 5, 80, 44, 23)


class FromArrays:
    """A `Source` over parts in memory, read in the order of a stream."""

    def __init__(self, parts: list[np.ndarray], window: int, lanes: int = 8) -> None:
        self.parts, self.order = parts, StreamOrder(tuple(map(len, parts)), window, lanes)
        self.samples, self.dim = self.order.samples, parts[0].shape[1]

    def plan(self, batch_size: int) -> tuple[int, int]:
        return self.order.plan(batch_size)

    def batches(self, seed: int, epoch: int, batch_size: int, rank: int, world: int) -> Iterator[torch.Tensor]:
        for window in self.order.windows(seed, epoch, batch_size, rank, world):
            pieces = [np.concatenate([self.parts[r.part][r.start : r.stop] for r in rows]) for rows in window.rows]
            yield from torch.from_numpy(arrange(window, seed, pieces))

    def shares(self, rank: int, world: int) -> Iterator[torch.Tensor]:
        yield from (torch.from_numpy(part) for part in self.parts[rank::world])


def numbered(counts: tuple[int, ...] = COUNTS) -> list[np.ndarray]:
    """Parts whose rows are (part, row number over all)."""
    starts = np.cumsum((0, *counts))
    return [
        np.stack([np.full(n, p), np.arange(s, s + n)], axis=1).astype(np.float32) for p, (n, s) in enumerate(zip(counts, starts[:-1], strict=True))
    ]


def epoch_of(source: FromArrays, seed: int, epoch: int, size: int, rank: int = 0, world: int = 1) -> list[np.ndarray]:
    return [batch.numpy() for batch in source.batches(seed, epoch, size, rank, world)]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(16, 90), st.integers(1, 400), st.sampled_from([8, 9, 16]))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_equal_batches_of_different_samples(counts: list[int], size: int, window: int, lanes: int) -> None:
    source = FromArrays(numbered(tuple(counts)), window, lanes)
    if source.samples < 2 * lanes or size < 2 * lanes:
        return
    steps, batch = source.plan(size)
    batches = epoch_of(source, 1, 2, size)
    assert [len(b) for b in batches] == [batch] * steps
    assert 0 < batch <= size
    rows = np.concatenate(batches)[:, 1]
    assert len(set(rows.tolist())) == len(rows) >= source.samples - lanes * (steps + 1)


def test_the_order_depends_on_seed_and_epoch_only_and_is_shared_exactly() -> None:
    source = FromArrays(numbered(), 100)
    whole = epoch_of(source, 3, 1, 32)
    assert all(np.array_equal(a, b) for a, b in zip(whole, epoch_of(source, 3, 1, 32), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(whole, epoch_of(source, 3, 2, 32), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(whole, epoch_of(source, 4, 1, 32), strict=True))
    # The workers' shares are those of samples in memory: rank, rank + world, ...
    for world in (2, 4, 8):
        for rank in range(world):
            for share, batch in zip(epoch_of(source, 3, 1, 32, rank, world), whole, strict=True):
                np.testing.assert_array_equal(share, batch[rank::world])
    with_nine = FromArrays(numbered(), 100, 9)
    whole = epoch_of(with_nine, 3, 1, 32)
    assert all(np.array_equal(s, b[1::3]) for s, b in zip(epoch_of(with_nine, 3, 1, 32, 1, 3), whole, strict=True))


def test_a_batch_mixes_parts_and_epochs_mix_otherwise() -> None:
    counts = (200,) * 16
    source = FromArrays(numbered(counts), 800)
    parts = [len(set(batch[:, 0])) for batch in epoch_of(source, 0, 0, 160)]
    assert min(parts) >= 8
    beside = [frozenset(batch[:, 1]) for epoch in range(2) for batch in epoch_of(source, 0, epoch, 160)]
    assert max(len(a & b) for i, a in enumerate(beside) for b in beside[:i]) < 40  # 160 samples of 3,200: 8 would be shared by chance


def test_a_part_is_read_about_once() -> None:
    order = StreamOrder((2048,) * 64, 65_536)
    reads = [r.part for w in order.windows(0, 0, 1024, 0, 1) for rows in w.rows for r in rows]
    assert len(reads) <= 1.5 * 64
    # Two workers together read what one reads.
    assert sorted(reads) == sorted(r.part for k in (0, 1) for w in order.windows(0, 0, 1024, k, 2) for rows in w.rows for r in rows)


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size = 4 is too small to stream 250 embeddings; take at least 16"):
        StreamOrder(COUNTS, 100).plan(4)


def test_scaling_from_parts_is_that_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=(n, 6)) * 0.01 + 3 + p).astype(np.float32) for p, n in enumerate(COUNTS) if n]
    whole = fit_scaling(np.concatenate(parts))
    merged = Moments.of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(Moments.of(part))
    found = merged.scaling()
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-14)
    assert found.scale == pytest.approx(whole.scale, rel=1e-13)
    other = Moments.of(np.concatenate(parts[3:])).merge(Moments.of(np.concatenate(parts[:3]))).scaling()
    assert other.scale == pytest.approx(whole.scale, rel=1e-13)
    with pytest.raises(DataError, match="all 4 embeddings are alike"):
        Moments.of(np.ones((4, 3), np.float32)).scaling()


def test_rows_of_the_centre_are_all_or_a_seeded_sample() -> None:
    np.testing.assert_array_equal(center_rows(100, 1), np.arange(100))
    rows = center_rows(1_000_000, 1)
    assert len(set(rows.tolist())) == 32_768
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, center_rows(1_000_000, 1))
    assert not np.array_equal(rows, center_rows(1_000_000, 2))


def inputs(n: int = 400, d: int = 6) -> np.ndarray:
    rng = np.random.default_rng(5)
    x = (rng.random((n, 10)) < 0.2) * rng.uniform(1, 2, (n, 10)) @ rng.normal(size=(10, d))
    return fit_scaling(x).apply(x)


def test_streamed_training_learns_as_much_and_resumes_bit_for_bit() -> None:
    x, c = inputs(), SAEConfig(architecture="batch_topk", dict_size=24, k=3, epochs=12, batch_size=40, lr=5e-3)  # type: ignore[call-arg]
    source = FromArrays(np.split(x, [50, 120, 200, 310]), 160)

    def fresh() -> Trainer:
        return Trainer(c, source.dim, source.samples, 2, plan=source.plan(c.batch_size))

    whole, part, held = fresh(), fresh(), Trainer(c, source.dim, len(x), 2)
    train([whole], source, 2)
    train([held], Held(torch.from_numpy(x)), 2)
    assert whole.log[-1]["fvu"] == pytest.approx(held.log[-1]["fvu"], rel=0.15)
    assert whole.log[-1]["fvu"] < 0.5 * whole.log[0]["fvu"]

    def stop(trainers: list[Trainer], due: bool) -> None:
        if trainers[0].epoch == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train([part], source, 2, on_epoch=stop)
    resumed = fresh()
    resumed.load_state_dict(part.state_dict())
    train([resumed], source, 2)
    for key, value in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[key], value), key
