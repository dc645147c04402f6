"""Exactness against numpy, scipy and scikit-learn, and invariance under partition and order of merging."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as skm

from medsae.metrics import Activity, MeasureState, Moments, Monosemanticity, Reconstruction, TopImages, apply_policy, auroc, entropy, paper_table
from medsae.metrics.columns import Columns
from medsae.metrics.correlation import alive, best_neuron, top_label
from medsae.metrics.detection import TOP_IMAGES, confusion_at_quantile, one_hot_cross_entropy


def hard_data(seed: int, n: int = 240, m: int = 24, c: int = 5, missing: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Sparse, dense, dead, constant, fires-once, huge-offset and tiny columns; labels with a constant one and missing entries."""
    rng = np.random.default_rng(seed)
    a = np.maximum(rng.standard_normal((n, m)) - 1.5, 0)
    a[:, 0] = 0
    a[:, 1] = 3.7
    a[:, 2] = 0
    a[n // 2, 2] = 5.0
    a[:, 3] = 1e8 + rng.standard_normal(n)
    a[:, 4] = -1e6 + 1e-2 * rng.standard_normal(n)
    a[:, 5] = 1e-9 * rng.standard_normal(n)
    a[:, 6] = rng.standard_normal(n)
    a[:, 7] = 1e8 + 0.1
    y = (rng.random((n, c)) < 0.3).astype(float)
    y[:, -1] = 1.0
    y[rng.random((n, c)) < missing] = np.nan
    return a, y


def corrcoef(a: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson r by numpy in extended precision on the masked data, NaN for constants."""
    out = np.full((a.shape[1], y.shape[1]), np.nan)
    for c in range(y.shape[1]):
        keep = ~np.isnan(y[:, c])
        for j in range(a.shape[1]):
            u, v = a[keep, j].astype(np.longdouble), y[keep, c].astype(np.longdouble)
            if len(u) > 1 and np.ptp(u) > 0 and np.ptp(v) > 0:
                u, v = u - u.mean(), v - v.mean()
                out[j, c] = float((u @ v) / np.sqrt((u @ u) * (v @ v)))
    return out


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_pearson_equals_corrcoef_on_hard_data(missing: float, batch: int) -> None:
    a, y = hard_data(0, missing=missing)
    state = Moments(a.shape[1], y.shape[1])
    for start in range(0, len(a), batch):
        state.update(a[start : start + batch], y[start : start + batch])
    got, want = state.compute(), corrcoef(a, y)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_allclose(got, want, atol=1e-9, rtol=0)
    easy = np.r_[2, 6, 8:24]
    if not missing:
        np.testing.assert_allclose(got[easy, :4], np.corrcoef(a[:, easy].T, y[:, :4].T)[: len(easy), len(easy) :], atol=1e-12)
        assert got[6, 0] == pytest.approx(stats.pearsonr(a[:, 6], y[:, 0]).statistic, abs=1e-12)


def test_each_label_has_its_own_n_when_ignored() -> None:
    raw = np.array([[1, -1], [0, -2], [1, 0], [-2, 1], [0, 1], [-1, 0]], np.int8)
    a = np.array([[1.0], [0.0], [2.0], [5.0], [0.5], [7.0]])
    y = apply_policy(raw, "ignore", "ignore")
    state = Moments(1, 2)
    state.update(a, y)
    np.testing.assert_array_equal(state.n, [4, 4])
    rows = [0, 1, 2, 4]
    assert state.compute()[0, 0] == pytest.approx(np.corrcoef(a[rows, 0], raw[rows, 0])[0, 1], abs=1e-12)


@pytest.mark.parametrize(("uncertain", "blank", "want"), [("zeros", "negative", [1, 0, 0, 0]), ("ones", "negative", [1, 0, 1, 0])])
def test_policy(uncertain: str, blank: str, want: list[float]) -> None:
    np.testing.assert_array_equal(apply_policy(np.array([[1, 0, -1, -2]]), uncertain, blank)[0], want)  # type: ignore[arg-type]


def test_policy_refuses_other_values() -> None:
    with pytest.raises(ValueError, match="labels must be"):
        apply_policy(np.array([[3]]))


def pair_loop(a: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Monosemanticity by its definition, a loop over pairs of images."""
    e = e / np.linalg.norm(e, axis=1, keepdims=True)
    low, high = a.min(0), a.max(0)
    out = np.full(a.shape[1], np.nan)
    for j in np.flatnonzero(high > low):
        w = (a[:, j] - low[j]) / (high[j] - low[j])
        total = weighted = 0.0
        for i in range(len(a)):
            pair = w[i] * w[i + 1 :]
            total += pair.sum()
            weighted += (pair * (e[i + 1 :] @ e[i])).sum()
        if total > 0:
            out[j] = weighted / total
    return out


def test_monosemanticity_equals_the_pair_loop() -> None:
    a, _ = hard_data(1)
    a = a[:, [0, 1, 2, 5, 6, *range(8, 24)]]
    e = np.random.default_rng(0).standard_normal((len(a), 10)) + 0.8
    state = Monosemanticity(a.shape[1], 10)
    for start in range(0, len(a), 50):
        state.update(a[start : start + 50], e[start : start + 50])
    got = state.compute()
    want = pair_loop(a, e)
    np.testing.assert_array_equal(np.isnan(got.score), np.isnan(want))
    np.testing.assert_allclose(got.score, want, atol=1e-9)
    unit = e / np.linalg.norm(e, axis=1, keepdims=True)
    assert got.baseline == pytest.approx((unit @ unit.T)[np.triu_indices(len(e), 1)].mean(), abs=1e-12)


def test_monosemanticity_survives_a_dominating_image_and_an_offset() -> None:
    rng = np.random.default_rng(0)
    a = np.maximum(rng.standard_normal((300, 3)) - 1, 0)
    a[5] = 1e5
    a[:, 2] += 1e6
    e = rng.standard_normal((300, 6)) + 0.5
    state = Monosemanticity(3, 6)
    state.update(a, e)
    np.testing.assert_allclose(state.compute().score, pair_loop(a, e), atol=1e-9)


def test_zero_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="all zeros"):
        Monosemanticity(1, 2).update(np.ones((2, 1)), np.array([[1.0, 0.0], [0.0, 0.0]]))


def whole_state(a: np.ndarray, y: np.ndarray, e: np.ndarray, signed: bool) -> MeasureState:
    return MeasureState(a.shape[1], y.shape[1], e.shape[1], e.shape[1], 3, signed)


def figures(state: MeasureState) -> dict[str, np.ndarray]:
    mono = state.monosemanticity.compute()
    neuron, rank, value, key = state.top.compute()
    return {
        "r": state.pooled().compute(),
        "r0": state.moments[0].compute(),
        "mono": mono.score,
        "baseline": np.array([mono.baseline]),
        "mean": state.activity.mean,
        "active": state.activity.n_active,
        "high": state.activity.high,
        "fvu": np.array([state.reconstruction.compute()]),
        "top": np.stack([neuron, rank, key.astype(np.int64)]),
        "top_value": value,
    }


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_partition_and_merge_order_gives_the_same(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1000))
    signed = data.draw(st.booleans())
    a, y = hard_data(seed, n=90, missing=data.draw(st.sampled_from([0.0, 0.4])))
    a = a[:, [0, 1, 2, 6, *range(8, 24)]]  # offsets of 1e8 leave 1e-8 of relative precision in the input itself
    rng = np.random.default_rng(seed)
    e, x_hat = rng.standard_normal((90, 4)) + 1, rng.standard_normal((90, 4))
    fold, keys = rng.integers(0, 2, 90), rng.permutation(90).astype(np.uint64)

    def state_of(rows: np.ndarray) -> MeasureState:
        state = whole_state(a, y, e, signed)
        state.update(a[rows], y[rows], fold[rows], keys[rows], e[rows], e[rows], x_hat[rows])
        return state

    whole = figures(state_of(np.arange(90)))
    order = np.array(data.draw(st.permutations(range(90))))
    cuts = sorted(data.draw(st.lists(st.integers(0, 90), max_size=6)))
    states = [state_of(rows) for rows in np.split(order, cuts)]
    while len(states) > 1:
        i = data.draw(st.integers(0, len(states) - 2))
        states[i : i + 2] = [states[i].merge(states[i + 1])]
    for name, value in figures(states[0]).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_sparse_and_dense_paths_agree() -> None:
    a, y = hard_data(3, missing=0.2)
    split, dense = Columns(a), Columns(a)
    assert 0 < len(split.dense_index) < a.shape[1]
    dense.dense_index, dense.dense, dense.sparse = np.arange(a.shape[1]), a.astype(float), split.sparse[:, :0]
    dense.sparse = type(split.sparse)(a.shape)
    out = []
    for columns in (split, dense):
        state, activity = Moments(a.shape[1], y.shape[1]), Activity(a.shape[1])
        state.update(columns, y)
        activity.update(columns)
        out.append((state.compute(), activity.mean, activity.low, activity.high, activity.n_active))
    for one, two in zip(*out, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-9, rtol=1e-12)


def test_activity_and_fvu_equal_numpy() -> None:
    a, _ = hard_data(4)
    state = Activity(a.shape[1])
    for start in range(0, len(a), 33):
        state.update(a[start : start + 33])
    np.testing.assert_allclose(state.mean, a.mean(0), rtol=1e-12)
    np.testing.assert_array_equal(state.high, a.max(0))
    np.testing.assert_array_equal(state.n_active, (a > 0).sum(0))
    assert state.l0 == pytest.approx((a > 0).sum(1).mean())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, 5)) + 1e6
    x_hat = x + 0.1 * rng.standard_normal(x.shape)
    fvu = Reconstruction(5)
    for start in range(0, 100, 9):
        fvu.update(x[start : start + 9], x_hat[start : start + 9])
    assert fvu.compute() == pytest.approx(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-9)
    r2 = skm.r2_score(x, x_hat, multioutput="variance_weighted")
    assert 1 - (fvu.compute() or 0) == pytest.approx(r2, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.booleans())
def test_auroc_equals_scikit_learn(seed: int, n: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 4, n).astype(float) if ties else rng.standard_normal(n)
    target = (rng.random(n) < 0.4).astype(float)
    masked = target.copy()
    masked[rng.random(n) < 0.2] = np.nan
    keep = ~np.isnan(masked)
    if len(np.unique(masked[keep])) < 2:
        assert np.isnan(auroc(score, masked))
    else:
        assert auroc(score, masked) == pytest.approx(skm.roc_auc_score(masked[keep], score[keep]), abs=1e-12)


def test_entropy_is_scipys() -> None:
    r = np.random.default_rng(0).uniform(-1, 1, (30, 14))
    np.testing.assert_allclose(entropy(r), stats.entropy(np.abs(r), axis=1), atol=1e-12)
    assert entropy(np.array([[0.0, -0.4, 0.0]]))[0] == 0.0
    assert entropy(np.full((1, 14), 0.3))[0] == pytest.approx(np.log(14))
    assert np.isnan(entropy(np.zeros((1, 3)))[0])
    np.testing.assert_allclose(entropy(np.array([[0.5, np.nan, 0.5]])), np.log(2))


def test_paper_table_takes_the_highest_r_and_only_alive_entropies() -> None:
    r = np.array([[0.5, 0.0, np.nan], [-0.9, 0.1, np.nan], [0.3, 0.15, np.nan]])
    table = paper_table(r, ["a", "b", "c"], 0.2)
    assert table.rows["a"] == {"neuron": 0, "r": 0.5, "entropy": 0.0}
    assert table.rows["b"]["neuron"] == 2
    assert table.rows["c"] == {"neuron": None, "r": None, "entropy": None}
    assert table.mean_r == pytest.approx((0.5 + 0.15) / 2)
    assert table.mean_entropy == pytest.approx((0.0 + entropy(r[[2]])[0]) / 2)
    assert list(alive(r, 0.2)) == [True, True, True]
    assert list(alive(np.array([[0.2, -0.1]]), 0.2)) == [False]
    assert list(best_neuron(r)) == [0, 2, -1]
    label, value = top_label(np.array([[np.nan, np.nan], [-0.5, -0.1]]))
    assert list(label) == [-1, 1]
    assert np.isnan(value[0])
    assert value[1] == -0.1


def test_top_images_equal_sorting() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 4, (100, 12)) * (rng.random((100, 12)) < 0.5)
    keys = rng.permutation(100).astype(np.uint64)
    state = TopImages(12, 5)
    for start in range(0, 100, 17):
        state.update(a[start : start + 17].astype(float), keys[start : start + 17])
    neuron, rank, value, key = state.compute()
    for j in range(12):
        order = np.lexsort((keys, -a[:, j]))[:5]
        order = order[a[order, j] > 0]
        np.testing.assert_array_equal(key[neuron == j], keys[order])
        np.testing.assert_array_equal(value[neuron == j], a[order, j])
        np.testing.assert_array_equal(rank[neuron == j], np.arange(len(order)))


@pytest.mark.parametrize("n", [15, 16, 17, 100, 299, 300])
def test_confusion_at_quantile_equals_scikit_learn(n: int) -> None:
    rng = np.random.default_rng(n)
    a = np.zeros(500)
    a[:n] = rng.exponential(size=n)
    y = (rng.random((500, 2)) < 0.3).astype(float)
    threshold = np.quantile(a[:n], 0.7)
    order = np.argsort(-a)[:TOP_IMAGES]
    order = order[a[order] > 0]
    got = confusion_at_quantile(a[order], n, y[order], y.sum(0))
    for c in range(2):
        want = skm.precision_recall_fscore_support(y[:, c], a >= threshold, average="binary")[:3]
        np.testing.assert_allclose(got[:, c], want, atol=1e-12)


def test_cross_entropy_equals_scikit_learn() -> None:
    r = np.random.default_rng(0).uniform(-0.99, 0.99, (5, 4))
    for row, got in zip(r, one_hot_cross_entropy(r), strict=True):
        target = np.zeros(4)
        target[np.abs(row).argmax()] = 1
        want = np.mean([skm.log_loss([t], [p], labels=[0, 1]) for t, p in zip(target, np.abs(row), strict=True)])
        assert got == pytest.approx(want, abs=1e-12)


def test_nan_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Moments(1, 1).update(np.array([[np.nan]]), np.array([[1.0]]))
