"""Scaling, batches and orders; configuration of autoencoders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from medsae.config import load_config
from medsae.errors import ConfigError, DataError
from medsae.sae.config import OPTIONS, SAEConfig
from medsae.sae.data import batch_plan, check_embeddings, epoch_order, fit_scaling, geometric_median


def test_scaled_inputs_have_mean_zero_and_mean_squared_norm_d() -> None:
    x = (np.random.default_rng(0).normal(size=(40_000, 7)) * 0.01 + 5).astype(np.float32)
    scaling = fit_scaling(x)
    inputs = scaling.apply(x)
    assert inputs.dtype == np.float32
    np.testing.assert_allclose(inputs.mean(0, dtype=np.float64), 0, atol=1e-5)
    assert (inputs.astype(np.float64) ** 2).sum(1).mean() == pytest.approx(7, rel=1e-6)
    np.testing.assert_allclose(inputs / scaling.scale + scaling.mean, x, rtol=1e-6)
    assert scaling.variance == pytest.approx(x.astype(np.float64).var(0).sum(), rel=1e-12)


@given(st.integers(1, 5000), st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_batches_are_equal_and_leave_out_fewer_samples_than_steps(n: int, size: int) -> None:
    steps, batch = batch_plan(n, size)
    assert 1 <= batch <= size
    assert 0 <= n - steps * batch < steps


def test_orders_are_permutations_that_differ_by_seed_and_epoch() -> None:
    orders = [epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    np.testing.assert_array_equal(epoch_order(100, 1, 1), orders[3])


def test_geometric_median_minimises_the_sum_of_distances() -> None:
    x = np.random.default_rng(1).normal(size=(60, 3)) ** 3
    total = lambda point: float(np.linalg.norm(x - point, axis=1).sum())  # noqa: E731
    assert total(geometric_median(x)) <= optimize.minimize(total, x.mean(0)).fun * (1 + 1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted(bad: float) -> None:
    x = np.zeros((20_000, 3), np.float32)
    x[[3, 19_999], 1] = bad
    with pytest.raises(DataError, match="here: 2 of 20000 embeddings hold NaN or infinity"):
        check_embeddings(x, "here")


def test_every_option_has_bounds_and_documentation() -> None:
    for name, field in SAEConfig.model_fields.items():
        assert field.description, name
    known = set(SAEConfig.model_fields)
    assert all(set(options) <= known for options in OPTIONS.values())


def test_defaults_are_those_of_the_architecture() -> None:
    assert SAEConfig().name == "standard"
    c = SAEConfig(architecture="batch_topk", dict_size=4096)  # type: ignore[call-arg]
    assert (c.name, c.k, c.lr, c.l1) == ("batch_topk", 32, 4e-4, None)
    assert SAEConfig.model_validate(c.model_dump(mode="json")) == c
    for architecture in OPTIONS:
        config = SAEConfig(architecture=architecture)  # type: ignore[arg-type]
        assert SAEConfig.model_validate(config.model_dump(mode="json")) == config
        assert config.lr is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sae=[{architecture: topk, k: 64, dict_size: 32}]", "k = 64 is above dict_size = 32"),
        ("sae=[{k: 3}]", "standard takes no k; it takes"),
        ("sae=[{architecture: topk, l1: 0.1}]", "topk takes no l1"),
        ("sae=[{architecture: sparse}]", "Input should be 'standard', 'april'"),
        ("sae=[{lr: 0}]", "sae.0.lr: Input should be greater than 0"),
        ("sae=[{warmup: 0.6, decay: 0.6}]", "warmup . decay = 1.2 is above 1"),
        ("sae=[{architecture: matryoshka_batch_topk, groups: [0.5, 0.6]}]", "must be positive shares that sum to 1"),
        ("sae=[{name: ../up}]", "sae.0.name: String should match pattern"),
        ("sae=[{}, {}]", "names must be unique"),
    ],
)
def test_bad_options_are_one_line_that_names_them(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)


def test_options_can_be_overridden_one_by_one() -> None:
    tree: list[Any] = ["sae=[{architecture: topk, dict_size: 512}]", "sae.0.k=8", "sae.0.lr=0.01", "sae.0.batch_size=64"]
    c = load_config(None, tree).sae[0]
    assert (c.k, c.lr, c.batch_size) == (8, 0.01, 64)
