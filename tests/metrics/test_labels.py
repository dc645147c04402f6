"""Label policies, the balanced subset, and further confounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsae.errors import DataError
from medsae.metrics.labels import apply_policy, as_binary, balanced_subset, label_counts
from medsae.metrics.targets import MOST_VALUES, indicator_rows


def test_keep_leaves_the_uncertain_entry_a_number_and_never_a_positive() -> None:
    y = apply_policy(np.array([[1, 0, -1, -2]]), "keep", "ignore")
    np.testing.assert_array_equal(y[0], [1, 0, -1, np.nan])
    np.testing.assert_array_equal(as_binary(y)[0], [1, 0, 0, np.nan])
    assert label_counts(y, list("abcd"))["c"] == {"positive": 0, "negative": 1, "ignored": 0}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 60), st.integers(1, 20))
def test_balanced_subset(seed: int, n: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.permutation(10 * n + 1)[:n].astype(np.uint64)
    labels = rng.choice([1, 0, -1, -2], p=[0.3, 0.2, 0.1, 0.4], size=(n, 3))
    chosen = balanced_subset(keys, labels, count, seed)
    order = rng.permutation(n)
    np.testing.assert_array_equal(chosen, balanced_subset(keys[order], labels[order], count, seed))
    inside = np.isin(keys, chosen)
    positives = (labels == 1).sum(0)
    assert ((labels[inside] == 1).sum(0) >= np.minimum(positives, count)).all()
    assert len(chosen) <= np.minimum(positives, count).sum()
    assert (labels[inside] == 1).any(1).all()


def test_balanced_subset_is_drawn_with_the_seed() -> None:
    keys, labels = np.arange(100, dtype=np.uint64), np.ones((100, 1), int)
    assert len(balanced_subset(keys, labels, 10, 0)) == 10
    assert set(balanced_subset(keys, labels, 10, 0)) != set(balanced_subset(keys, labels, 10, 1))


def test_columns_become_indicators_or_numbers() -> None:
    ids = [f"{i:016x}" for i in (3, 1, 2)]
    rows = indicator_rows(ids, {"site": ["B", " A", ""]})
    assert rows.names == ["site=A", "site=B"]
    np.testing.assert_array_equal(rows.take(np.array([1, 2, 3, 4], np.uint64)), [[1, 0], [np.nan] * 2, [0, 1], [np.nan] * 2])
    many = [f"{i:016x}" for i in range(MOST_VALUES + 2)]
    numbers = indicator_rows(many, {"dose": ["", *(str(i / 7) for i in range(1, MOST_VALUES + 2))]})
    assert numbers.names == ["dose"]
    np.testing.assert_allclose(numbers.values[1:, 0], np.arange(1, MOST_VALUES + 2) / 7)
    assert np.isnan(numbers.values[0, 0])
    with pytest.raises(DataError, match=r"'note' has 52 values that are not all numbers"):
        indicator_rows(many, {"note": [f"x{i}" for i in range(MOST_VALUES + 2)]})
