"""The ridge probe against scikit-learn and against what must be so."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from medsae.metrics.linear import FIT_ROWS, linear_probe, ridge_scores, sample_halves


@pytest.mark.parametrize(("n", "d"), [(80, 6), (40, 90)])
def test_ridge_with_leave_one_out_equals_ridge_cv(n: int, d: int) -> None:
    rng = np.random.default_rng(0)
    x, test = rng.standard_normal((n, d)) * 3 + 1, rng.standard_normal((30, d)) * 3 + 1
    y = (x[:, :1] + rng.standard_normal((n, 1)) > 1).astype(float)
    scaler = StandardScaler().fit(x)
    z = scaler.transform(x)
    scale = np.maximum(np.linalg.eigvalsh(z @ z.T), 0).mean()
    theirs = RidgeCV(alphas=np.logspace(-4, 4, 17) * scale, fit_intercept=False).fit(z, y[:, 0] - y.mean())
    ours = ridge_scores(x, y, test)[:, 0]
    np.testing.assert_allclose(ours, theirs.predict(scaler.transform(test)), atol=1e-8)


def test_probe_finds_a_linear_label_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 800, 20))
    y = np.stack([(x[:, :, :3].sum(2) > 0), rng.random((2, 800)) < 0.5], axis=2).astype(float)
    y[:, ::5, 1] = np.nan
    areas = linear_probe([x[0], x[1]], [x[1], x[0]], [y[0], y[1]], [y[1], y[0]])
    assert areas[0] > 0.97
    assert areas[1] == pytest.approx(0.5, abs=0.08)


def test_halves_are_patient_disjoint_and_capped() -> None:
    rng = np.random.default_rng(2)
    patients = rng.integers(0, 4000, 12_000)
    fold = patients % 2
    for f, (fit, test) in enumerate(sample_halves(fold, patients, 0)):
        assert len(fit) == FIT_ROWS
        assert (fold[fit] == f).all()
        assert (fold[test] == 1 - f).all()
        assert not set(patients[fit]) & set(patients[test])
