"""Selection, bootstrap, permutation null: against definitions, and on noise where the truth is zero."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from medsae.metrics.correlation import entropy
from medsae.metrics.inference import (
    Interval,
    NullState,
    PatientSums,
    bootstrap_selected,
    donor_permutation,
    equal_candidates,
    patient_weights,
    select,
)
from medsae.metrics.moments import Moments


def halves_of(a: np.ndarray, y: np.ndarray, fold: np.ndarray) -> list[np.ndarray]:
    out = []
    for f in (0, 1):
        state = Moments(a.shape[1], y.shape[1])
        state.update(a[fold == f], y[fold == f])
        out.append(state.compute())
    return out


def test_selected_r_is_unbiased_on_noise_where_the_best_of_m_is_not() -> None:
    rng = np.random.default_rng(0)
    best, reported = [], []
    for _ in range(40):
        a, y = rng.standard_normal((200, 300)), (rng.random((200, 3)) < 0.3).astype(float)
        fold = np.arange(200) % 2
        r = np.corrcoef(a.T, y.T)[:300, 300:]
        best.append(r.max(0).mean())
        reported.append(select(halves_of(a, y, fold)).mean_r.mean())
    assert np.mean(best) > 0.15
    error = np.std(reported) / np.sqrt(len(reported))
    assert abs(np.mean(reported)) < 4 * error


def test_selection_reports_the_neuron_chosen_on_the_other_half() -> None:
    rng = np.random.default_rng(1)
    r = [rng.uniform(-1, 1, (20, 4)) for _ in range(2)]
    chosen = select(r)
    for f in (0, 1):
        for c in range(4):
            j = int(np.argmax(r[f][:, c]))
            assert chosen.neurons[f, c] == j
            assert chosen.r[f, c] == r[1 - f][j, c]
            assert chosen.entropy[f, c] == pytest.approx(entropy(r[1 - f][[j]])[0])


def test_either_sign_finds_a_negative_feature() -> None:
    r = [np.array([[0.1], [-0.8]]), np.array([[0.2], [-0.7]])]
    assert select(r).mean_r[0] == pytest.approx(0.15)
    assert select(r, absolute=True).mean_r[0] == pytest.approx(0.75)


def test_a_neuron_silent_on_the_other_half_counts_as_zero_and_a_constant_label_as_undefined() -> None:
    r = [np.array([[0.9, np.nan], [0.1, np.nan]]), np.array([[np.nan, np.nan], [0.2, np.nan]])]
    chosen = select(r)
    assert chosen.r[0, 0] == 0.0
    assert chosen.entropy[0, 0] == pytest.approx(np.log(2))
    assert np.isnan(chosen.r[:, 1]).all()
    assert (chosen.neurons[:, 1] == -1).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_weighted_patient_sums_equal_repeating_the_images(seed: int, missing: bool) -> None:
    rng = np.random.default_rng(seed)
    n = 60
    patients = rng.integers(0, 12, n)
    patients = np.unique(patients, return_inverse=True)[1]
    a = rng.exponential(size=(n, 2)) * (rng.random((n, 2)) < 0.6)
    y = (rng.random((n, 3)) < 0.4).astype(float)
    if missing:
        y[rng.random((n, 3)) < 0.2] = np.nan
    w = np.bincount(rng.integers(patients.max() + 1, size=patients.max() + 1), minlength=patients.max() + 1)
    got = PatientSums(a, y, patients).correlations(w[None].astype(float))[0]
    rows = np.repeat(np.arange(n), w[patients])
    state = Moments(2, 3)
    state.update(a[rows], y[rows])
    np.testing.assert_allclose(got, np.nan_to_num(state.compute()), atol=1e-9)


def test_bootstrap_centres_on_the_reported_figure_and_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    many = (rng.random(200_000) < 0.5).astype(float)
    truth = np.corrcoef(np.maximum(many + rng.standard_normal(200_000), 0), many)[0, 1]
    for trial in range(30):
        n = 400
        y = (rng.random((n, 1)) < 0.5).astype(float)
        a = np.maximum(y + rng.standard_normal((n, 1)), 0)
        fold = np.arange(n) % 2
        chosen = select(halves_of(a, y, fold))
        draws, _ = bootstrap_selected(chosen, {0: a[:, 0]}, y, np.arange(n), fold, 300, trial)
        interval = Interval.of(chosen.mean_r[0], draws[:, 0])
        assert abs(draws.mean() - chosen.mean_r[0]) < 0.02
        covered += interval.low <= truth <= interval.high
    assert covered >= 25  # binomial(30, 0.95): fewer than 25 has probability 0.0016


def test_dependent_images_of_a_patient_widen_the_interval() -> None:
    rng = np.random.default_rng(3)
    base_y = (rng.random((100, 1)) < 0.5).astype(float)
    base_a = base_y + rng.standard_normal((100, 1))
    a, y, patients = np.repeat(base_a, 8, 0), np.repeat(base_y, 8, 0), np.repeat(np.arange(100), 8)
    fold = patients % 2
    chosen = select(halves_of(a, y, fold))
    by_patient, _ = bootstrap_selected(chosen, {0: a[:, 0]}, y, patients, fold, 300, 0)
    by_image, _ = bootstrap_selected(chosen, {0: a[:, 0]}, y, np.arange(800), fold, 300, 0)
    assert by_patient.std() > 2 * by_image.std()


def test_weights_are_the_same_for_the_same_seed_and_sum_to_the_patients() -> None:
    one = np.concatenate(list(patient_weights(13, 250, 5)))
    two = np.concatenate(list(patient_weights(13, 250, 5)))
    assert one.shape == (250, 13)
    np.testing.assert_array_equal(one, two)
    assert (one.sum(1) == 13).all()


def test_donors_move_whole_patients() -> None:
    patients = np.repeat(np.arange(30), 3)
    donors = donor_permutation(patients, 5, 0)
    for d in donors:
        assert sorted(d) == list(range(90))  # equal sizes: an exact permutation
        assert (patients[d].reshape(30, 3) == patients[d].reshape(30, 3)[:, :1]).all()


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_null_equals_corrcoef_of_permuted_labels(missing: bool, sparse: bool) -> None:
    rng = np.random.default_rng(4)
    n, m, c, p = 150, 20, 3, 4
    a = (rng.exponential(size=(n, m)) * (rng.random((n, m)) < 0.4)).astype(np.float32)
    y = (rng.random((n, c)) < 0.4).astype(np.float32)
    if missing:
        y[rng.random((n, c)) < 0.2] = np.nan
    donors = donor_permutation(np.arange(n) // 2, p, 0)
    permuted = y[donors].transpose(1, 0, 2).reshape(n, -1)
    given_ = ~np.isnan(permuted)
    mean = np.nanmean(permuted, 0)
    state, half = NullState(m, c, p, missing), NullState(m, c, p, missing)
    scaled = a / a.std(0)
    centred = np.where(given_, permuted - mean, 0)
    for s, rows in ((state, slice(0, 70)), (half, slice(70, n))):
        s.update(sp.csr_matrix(scaled[rows]) if sparse else scaled[rows], centred[rows], given_[rows].astype(np.float32) if missing else None)
    got = state.merge(half).best(given_.sum(0), np.sqrt(mean * (1 - mean)))
    exact = Moments(m, c * p)
    exact.update(a, permuted.astype(float))
    np.testing.assert_allclose(got, np.nanmax(exact.compute(), 0).reshape(p, c), atol=1e-4)


def test_equal_candidates_takes_away_the_advantage_of_numbers() -> None:
    rng = np.random.default_rng(5)
    r = [np.clip(rng.normal(0, 0.1, (400, 4)) + 0.0, -1, 1)] * 2  # the same r on both halves: more candidates, higher maximum
    few, _ = equal_candidates(r, 20, 200, 0) or (None, None)
    assert few is not None
    assert few.mean() < select(r).mean_r.mean()
    assert equal_candidates(r, 400, 10, 0) is None
