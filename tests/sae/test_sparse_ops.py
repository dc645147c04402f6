"""Sparse products against dense matrices and autograd on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsae.sae.sparse_ops import Dense, Sparse, above, grouped_decode, preactivations, row_topk, sparse_above

sizes = st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 5), st.integers(0, 10_000))


def problem(batch: int, neurons: int, dim: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    leaves = [draw(neurons, dim), draw(neurons), draw(dim), draw(neurons, dim)]
    return (draw(batch, dim), *(leaf.requires_grad_() for leaf in leaves), draw(batch, dim))


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, leaves))


@given(sizes, st.booleans())
@settings(max_examples=60, deadline=None)
def test_active_sets_give_the_gradients_of_dense_autograd(size: tuple[int, int, int, int], dense: bool) -> None:
    x, weight, bias, shift, decoder, target = problem(*size)
    leaves = [weight, bias, shift, decoder]
    pre = preactivations(x, weight, bias, shift)
    active = Dense(pre) if dense else sparse_above(pre, 0.0)
    values = active.linear(x, weight, bias, shift).relu()
    code = active.decode(values * active.spread(decoder.norm(dim=1)), decoder)
    mine = ((code - target) ** 2).sum() + values.sum()

    plain = ((x - shift) @ weight.T + bias).relu()
    theirs = ((plain * decoder.norm(dim=1)) @ decoder - target).square().sum() + plain.sum()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients(mine, leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert torch.equal(active.fired(values), (plain > 0).any(dim=0))


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_prefixes_are_running_sums_of_groups(size: tuple[int, int, int, int]) -> None:
    x, weight, bias, shift, decoder, target = problem(*size)
    m = len(weight)
    ends = tuple(sorted({1, (m + 1) // 2, m}))
    pre = preactivations(x, weight, bias, shift)
    active = sparse_above(pre, 0.0)
    values = active.linear(x, weight, bias, shift)
    scale = torch.arange(1.0, len(ends) + 1)[:, None, None]
    mine = ((grouped_decode(active, values, decoder, ends) - target) ** 2 * scale).sum()
    plain = (x - shift) @ weight.T + bias
    plain = plain * (plain > 0)
    stacked = torch.stack([plain[:, :e] @ decoder[:e] for e in ends])
    theirs = ((stacked - target) ** 2 * scale).sum()
    leaves = [weight, bias, shift, decoder]
    for a, b in zip(gradients(mine, leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)


def test_nothing_active_gives_zero_gradients() -> None:
    x, weight, bias, shift, decoder, _ = problem(4, 6, 3, 0)
    active = above(torch.full((4, 6), -1.0), 0.0)
    assert isinstance(active, Sparse)
    values = active.linear(x, weight, bias, shift)
    loss = (active.decode(values, decoder) - x).square().sum() + values.sum()
    assert all(float(g.abs().max()) == 0 for g in gradients(loss, [weight, bias, shift, decoder]))
    assert not active.fired(values).any()


def test_dense_is_taken_where_much_is_active() -> None:
    pre = torch.ones(10, 10)
    assert isinstance(above(pre, 0.0), Dense)
    pre[:, 1:] = -1
    assert isinstance(above(pre, 0.0, dense_share=0.2), Sparse)
    assert isinstance(above(pre, 0.0, dense_share=0.05), Dense)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_row_topk_is_the_k_largest_of_each_row(k: int) -> None:
    pre = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    dense = row_topk(pre, k).matrix(row_topk(pre, k).given).to_dense()
    order = pre.sort(dim=1, descending=True).values[:, k - 1 : k]
    torch.testing.assert_close(dense, torch.where(pre >= order, pre, 0.0))


def test_at_least_keeps_pairs_of_their_rows() -> None:
    pre = torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
    kept = sparse_above(pre, 0.0).at_least(0.5)
    torch.testing.assert_close(kept.matrix(kept.given).to_dense(), torch.where(pre >= 0.5, pre, 0.0))
