"""Figures of scores against scikit-learn; the bootstrap against its definition; the headline."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from medsae.naming.scoring import bootstrap_balanced_accuracy, chance_figures, evaluate, headline, shuffled_partner


@given(st.integers(0, 10_000), st.integers(4, 60))
def test_figures_agree_with_scikit_learn(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.5
    truth[:2] = [True, False]
    score = np.round(rng.random(n), 1)
    yes = score > 0.5
    got = evaluate(truth, score, np.arange(n), resamples=10)
    assert got.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(truth, yes))
    assert got.auc == pytest.approx(metrics.roc_auc_score(truth, score))
    assert got.recall == pytest.approx(metrics.recall_score(truth, yes))
    assert got.f1 == pytest.approx(metrics.f1_score(truth, yes, zero_division=0))
    if yes.any():
        assert got.precision == pytest.approx(metrics.precision_score(truth, yes))
    else:
        assert math.isnan(got.precision)


def test_failures_are_counted_and_left_out() -> None:
    truth = np.array([True, True, False, False, True, False])
    score = np.array([0.9, 0.8, 0.1, 0.2, np.nan, np.nan])
    got = evaluate(truth, score, np.arange(6))
    assert (got.n, got.failures, got.balanced_accuracy) == (4, 2, 1.0)
    # The same without the failures: they moved nothing.
    alone = evaluate(truth[:4], score[:4], np.arange(4))
    assert (alone.auc, alone.f1, alone.low) == (got.auc, got.f1, got.low)


def test_one_class_has_no_figures() -> None:
    got = evaluate(np.ones(3, bool), np.ones(3), np.arange(3))
    assert all(math.isnan(v) for v in (got.balanced_accuracy, got.auc, got.f1, got.low))
    assert got.n == 3


def test_the_bootstrap_draws_patients_not_images() -> None:
    truth = np.array([True, True, False, False] * 10)
    yes = np.array([True, False, False, True] * 10)
    one_each = bootstrap_balanced_accuracy(truth, yes, np.arange(40), 0, 2000)
    few = bootstrap_balanced_accuracy(truth, yes, np.arange(40) % 4, 0, 2000)
    assert one_each[0] < 0.5 < one_each[1]
    # With four patients of ten equal images each, the interval is wider.
    assert few[1] - few[0] > one_each[1] - one_each[0]
    assert bootstrap_balanced_accuracy(truth, yes, np.arange(40), 0, 500) == bootstrap_balanced_accuracy(truth, yes, np.arange(40), 0, 500)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        truth = np.repeat([True, False], 40)
        yes = np.where(truth, rng.random(80) < 0.8, rng.random(80) < 0.3)
        low, high = bootstrap_balanced_accuracy(truth, yes, np.arange(80), trial, 300)
        covered += low <= 0.75 <= high
    assert 0.88 <= covered / 200 <= 0.99


@given(st.lists(st.sampled_from(["edema", "Edema", "nodule", "device"]), min_size=1, max_size=12), st.integers(0, 99))
def test_a_shuffled_name_is_another_name(concepts: list[str], seed: int) -> None:
    partner = shuffled_partner(concepts, 0, np.random.default_rng(seed))
    if partner is None:
        assert len({c.casefold() for c in concepts}) == 1
    else:
        assert concepts[partner].casefold() != concepts[0].casefold()


def test_the_headline_is_the_paired_gain() -> None:
    def row(neuron: int, control: str, value: float) -> dict[str, object]:
        return {"neuron": neuron, "control": control, "method": "detection", "balanced_accuracy": value, "auc": value, "failures": 1}

    rows = [row(n, "none", 0.9) for n in range(10)] + [row(n, "shuffled", 0.5 + 0.01 * n) for n in range(8)] + [row(9, "empty", math.nan)]
    found = headline(rows)["detection"]
    assert found["neurons"] == 10
    assert found["failures"] == 19
    gain = found["gain"]["shuffled"]
    assert gain["neurons"] == 8
    assert gain["mean"] == pytest.approx(np.mean([0.4 - 0.01 * n for n in range(8)]))
    assert gain["low"] < gain["mean"] < gain["high"]
    assert "empty" not in found["mean"]


def test_questions_with_one_right_answer() -> None:
    got = chance_figures(np.array([1, 1, 0, np.nan]))
    assert (got.balanced_accuracy, got.n, got.failures) == (pytest.approx(2 / 3), 3, 1)
    assert chance_figures(np.array([np.nan])).n == 0
