"""Sparse probing on data whose separability is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from medsae.metrics.probing import sparse_probing, split_probe, strongest


def test_strongest_orders_by_absolute_r_and_marks_missing() -> None:
    r = np.array([[0.1, np.nan], [-0.9, np.nan], [0.5, np.nan]])
    chosen = strongest([r, r], 5)
    np.testing.assert_array_equal(chosen[0, 0], [1, 2, 0, -1, -1])
    assert (chosen[0, 1] == -1).all()


def test_one_gaussian_neuron_gives_the_theoretical_auroc_and_two_give_more() -> None:
    rng = np.random.default_rng(0)
    n = 8000
    y = (rng.random((n, 1)) < 0.4).astype(float)
    a = y + rng.standard_normal((n, 2))
    fold = np.arange(n) % 2
    neurons = np.array([[[0, 1, -1, -1, -1]]] * 2)
    figures = sparse_probing(neurons, {0: a[:, 0], 1: a[:, 1]}, y, fold, ["x"], 0)
    assert figures["1"]["x"] == pytest.approx(stats.norm.cdf(1 / np.sqrt(2)), abs=0.015)
    assert figures["2"]["mean"] == pytest.approx(stats.norm.cdf(1), abs=0.015)
    assert figures["5"]["x"] == figures["2"]["x"]


def test_noise_probes_at_one_half_and_constant_labels_are_undefined() -> None:
    rng = np.random.default_rng(1)
    x, fold = rng.standard_normal((4000, 5)), np.arange(4000) % 2
    y = (rng.random(4000) < 0.5).astype(float)
    assert split_probe(x, y, fold, 0, 0) == pytest.approx(0.5, abs=0.05)
    assert np.isnan(split_probe(x, np.ones(4000), fold, 0, 0))
