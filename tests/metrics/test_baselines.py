"""Baselines keep what they must keep, and find what they are known to find."""

from __future__ import annotations

import numpy as np
import pytest

from medsae.errors import ConfigError
from medsae.metrics.baselines import fit
from medsae.sae.config import SAEConfig

SAE = SAEConfig(dict_size=24)


def embeddings(n: int = 600, d: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sources = rng.laplace(size=(n, d)) * np.arange(1, d + 1)
    return (sources @ np.linalg.qr(rng.standard_normal((d, d)))[0] + 2).astype(np.float32)


def test_rotation_keeps_distances() -> None:
    x = embeddings()
    z = fit("rotation", x, SAE, 0).encode(x)
    np.testing.assert_allclose(np.linalg.norm(z[:-1] - z[1:], axis=1), np.linalg.norm(x[:-1] - x[1:], axis=1), rtol=1e-4)


@pytest.mark.parametrize("name", ["rotation", "pca", "ica"])
def test_complete_linear_baselines_reconstruct(name: str) -> None:
    x = embeddings()
    features = fit(name, x, SAE, 0)
    np.testing.assert_allclose(features.decode(features.encode(x)), x, atol=1e-2)


def test_pca_is_uncorrelated_in_falling_variance() -> None:
    x = embeddings()
    cov = np.cov(fit("pca", x, SAE, 0).encode(x).astype(np.float64).T)
    np.testing.assert_allclose(cov - np.diag(np.diag(cov)), 0, atol=1e-3 * cov.max())
    assert (np.diff(np.diag(cov)) < 0).all()


def test_ica_recovers_independent_sources() -> None:
    rng = np.random.default_rng(1)
    sources = rng.laplace(size=(4000, 4))
    x = (sources @ rng.standard_normal((4, 4))).astype(np.float32)
    z = fit("ica", x, SAE, 0).encode(x)
    r = np.abs(np.corrcoef(z.T, sources.T)[:4, 4:])
    assert (r.max(1) > 0.98).all()


def test_untrained_has_the_shape_and_sparsity_of_a_fresh_sae() -> None:
    x = embeddings()
    features = fit("untrained", x, SAE, 0)
    z = np.asarray(features.encode(x))
    assert z.shape == (600, 24)
    assert (z >= 0).all()
    assert 0.2 < (z > 0).mean() < 0.8


def test_nmf_applies_to_non_negative_embeddings_only() -> None:
    rng = np.random.default_rng(0)
    x = (rng.exponential(size=(300, 3)) @ rng.exponential(size=(3, 8))).astype(np.float32)
    features = fit("nmf", x, SAE, 0)
    z = features.encode(x)
    assert (z >= 0).all()
    assert np.linalg.norm(features.decode(z) - x) < 0.05 * np.linalg.norm(x)
    with pytest.raises(ConfigError, match="nmf needs embeddings without negative values"):
        fit("nmf", x - 1, SAE, 0)
