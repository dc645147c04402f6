"""Sparse products against dense matrices and autograd on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medsae.sae import sparse_ops
from medsae.sae.sparse_ops import BLOCK, Dense, Sparse, above, preactivations, row_topk, set_places, sparse_above

sizes = st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 5), st.integers(0, 10_000))


def problem(batch: int, neurons: int, dim: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    leaves = [draw(neurons, dim), draw(neurons), draw(dim), draw(neurons, dim)]
    return (draw(batch, dim), *(leaf.requires_grad_() for leaf in leaves), draw(batch, dim))


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, leaves))


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems are treated as large ones are."""
    monkeypatch.setattr(sparse_ops, "SMALL", 0)


def by_neuron(pre: torch.Tensor) -> torch.Tensor:
    """The same matrix, a neuron's values side by side in memory."""
    return pre.T.contiguous().T


def matrix(active: Sparse) -> torch.Tensor:
    return active.matrix(active.given).to_dense()


@given(sizes, st.booleans(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_active_sets_give_the_gradients_of_dense_autograd(size: tuple[int, int, int, int], dense: bool, turned: bool) -> None:
    x, weight, bias, shift, decoder, target = problem(*size)
    leaves = [weight, bias, shift, decoder]
    out = torch.empty(len(weight), len(x)).T if turned else None
    pre = preactivations(x, weight, bias, shift, out=out)
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


@given(sizes, st.booleans(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_prefixes_are_running_sums_of_groups(size: tuple[int, int, int, int], dense: bool, turned: bool) -> None:
    x, weight, bias, shift, decoder, target = problem(*size)
    m = len(weight)
    ends = tuple(sorted({1, (m + 1) // 2, m}))
    pre = preactivations(x, weight, bias, shift)
    pre = by_neuron(pre) if turned else pre
    active = Dense(torch.where(pre > 0, pre, 0.0)) if dense else sparse_above(pre, 0.0)
    values = active.linear(x, weight, bias, shift).relu()
    scale = torch.arange(1.0, len(ends) + 1)[:, None, None]
    mine = ((active.prefixes(values, decoder, ends) - target) ** 2 * scale).sum()
    plain = (x - shift) @ weight.T + bias
    plain = plain * (plain > 0)
    stacked = torch.stack([plain[:, :e] @ decoder[:e] for e in ends])
    theirs = ((stacked - target) ** 2 * scale).sum()
    leaves = [weight, bias, shift, decoder]
    for a, b in zip(gradients(mine, leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)


@pytest.mark.usefixtures("sparse")
def test_nothing_active_gives_zero_gradients() -> None:
    x, weight, bias, shift, decoder, _ = problem(4, 6, 3, 0)
    active = above(torch.full((4, 6), -1.0), 0.0, 3)
    assert isinstance(active, Sparse)
    values = active.linear(x, weight, bias, shift)
    loss = (active.decode(values, decoder) - x).square().sum() + values.sum()
    assert all(float(g.abs().max()) == 0 for g in gradients(loss, [weight, bias, shift, decoder]))
    assert not active.fired(values).any()


@pytest.mark.usefixtures("sparse")
def test_dense_is_taken_where_much_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    pre = torch.ones(10, 10)
    assert isinstance(above(pre, 0.0, 3), Dense)
    pre[:, 1:] = -1
    assert isinstance(above(pre, 0.0, 3), Dense)
    assert isinstance(row_topk(pre, 1, 3), Dense)
    monkeypatch.setattr(sparse_ops, "DENSE_SHARE", 0.2)
    assert isinstance(above(pre, 0.0, 3), Sparse)
    assert isinstance(row_topk(pre, 1, 3), Sparse)


def test_dense_is_taken_for_small_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    pre = torch.full((10, 100), -1.0)
    monkeypatch.setattr(sparse_ops, "SMALL", 10 * 100 * 3)
    assert isinstance(above(pre, 0.0, 3), Dense)
    assert isinstance(row_topk(pre, 1, 3), Dense)
    assert isinstance(above(pre, 0.0, 4), Sparse)
    assert isinstance(row_topk(pre, 1, 4), Sparse)


def test_pairs_of_both_layouts_are_the_same() -> None:
    pre = torch.randn(24, 40, generator=torch.Generator().manual_seed(3))
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(4))
    one, two = sparse_above(pre, 0.7), sparse_above(by_neuron(pre), 0.7)
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("rows", "columns", "given"))
    torch.testing.assert_close(one.sums_by_neuron(one.given, x), matrix(one).T @ x)
    torch.testing.assert_close(two.sums_by_neuron(two.given, x), matrix(two).T @ x)


@given(st.integers(0, 200), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_places_are_those_of_nonzero(length: int, seed: int) -> None:
    mask = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < 0.1
    assert torch.equal(set_places(mask), mask.nonzero().squeeze(1))


@pytest.mark.usefixtures("sparse")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("neurons", [8 * BLOCK, 16 * BLOCK, 16 * BLOCK + 1])
def test_row_topk_is_the_k_largest_of_each_row(k: int, neurons: int, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_ops, "DENSE_SHARE", 1.0)
    pre = torch.randn(5, neurons, generator=torch.Generator().manual_seed(1))
    active = row_topk(by_neuron(pre) if turned else pre, k, 3)
    assert isinstance(active, Sparse)
    order = pre.sort(dim=1, descending=True).values[:, k - 1 : k]
    torch.testing.assert_close(matrix(active), torch.where(pre >= order, pre, 0.0))
    dense = row_topk(pre, k, 0)
    assert isinstance(dense, Dense)
    torch.testing.assert_close(dense.given, matrix(active))


@pytest.mark.usefixtures("sparse")
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_keep_exactly_k_where_values_are_equal(samples: int, k: int, seed: int) -> None:
    # Few distinct values, so that many are equal at the edge, within blocks and across them.
    pre = by_neuron(torch.randint(0, 4, (samples, 8 * BLOCK), generator=torch.Generator().manual_seed(seed)).float())
    assert sparse_ops._topk_by_blocks(pre, k) is not None
    active = row_topk(pre, k, 3)
    assert isinstance(active, Sparse)
    assert torch.equal(active.rows, torch.arange(0, samples * k + 1, k))
    assert torch.equal(active.given, pre.gather(1, active.columns.view(samples, k)).reshape(-1))
    assert torch.equal(active.given.view(samples, k).sort(dim=1).values, pre.sort(dim=1).values[:, -k:])
    assert all(len(set(chosen)) == k for chosen in active.columns.view(samples, k).tolist())


@pytest.mark.usefixtures("sparse")
def test_nan_is_chosen_as_the_largest() -> None:
    pre = torch.randn(4, 8 * BLOCK, generator=torch.Generator().manual_seed(1))
    pre[2] = torch.nan
    pre[3, 5] = torch.nan
    assert sparse_ops._topk_by_blocks(by_neuron(pre), 3) is None
    active = row_topk(by_neuron(pre), 3, 3)
    assert isinstance(active, Sparse)
    assert active.given.view(4, 3).isnan().sum(dim=1).tolist() == [0, 0, 3, 1]


@pytest.mark.usefixtures("sparse")
def test_blocks_are_left_where_all_values_are_equal() -> None:
    pre = by_neuron(torch.zeros(4, 64 * BLOCK))
    assert sparse_ops._topk_by_blocks(pre, 2) is None
    active = row_topk(pre, 2, 3)
    assert isinstance(active, Sparse)
    assert torch.equal(active.rows, torch.arange(0, 9, 2))


def test_nothing_fires_in_no_samples() -> None:
    values = torch.zeros(0, 5)
    assert not Dense(values).fired(values).any()


def test_at_least_keeps_pairs_of_their_rows() -> None:
    pre = torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
    kept = sparse_above(pre, 0.0).at_least(0.5)
    torch.testing.assert_close(matrix(kept), torch.where(pre >= 0.5, pre, 0.0))
