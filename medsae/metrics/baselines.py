"""Other dictionaries of the same embeddings, fitted on the patients that the SAE was trained on and measured the same way.

Every method that is claimed to find concepts has to beat them: a random rotation (no fitting at all), PCA, ICA, NMF where embeddings are not negative, and
an SAE of the same shape that was not trained.
"""

from __future__ import annotations

import warnings

import numpy as np

from medsae.errors import ConfigError
from medsae.metrics.features import Features, LinearFeatures, SAEFeatures
from medsae.sae.config import SAEConfig

PREFIX = "baseline-"
FIT_ROWS = 20_000
"""Images that ICA and NMF are fitted on at most."""


class NMFFeatures:
    """Non-negative codes z of x = z @ components, each row solved for by multiplicative updates (Lee and Seung 2001) from a fixed start."""

    signed = False

    def __init__(self, components: np.ndarray, steps: int = 200) -> None:
        self.components, self.steps = components.astype(np.float32), steps

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Codes [n, k] of non-negative embeddings [n, d]."""
        up = np.asarray(x, np.float32) @ self.components.T
        gram = self.components @ self.components.T
        z = np.full_like(up, float(up.mean()) / max(float(gram.sum(0).mean()), 1e-12) + 1e-6)
        for _ in range(self.steps):
            z *= up / np.maximum(z @ gram, 1e-12)
        return np.where(z > 1e-6 * z.max(initial=0.0), z, 0.0).astype(np.float32)

    def decode(self, z: np.ndarray) -> np.ndarray:
        return np.asarray(z @ self.components)


def fit(name: str, x: np.ndarray, sae: SAEConfig, seed: int) -> Features:
    """A baseline, fitted on embeddings [n, d].

    Args:
        name: `rotation`, `pca`, `ica`, `nmf` or `untrained`.
        x: embeddings of training patients.
        sae: the SAE whose shape and architecture `untrained` takes.
        seed: of the random parts.

    Raises:
        ConfigError: the baseline does not apply to these embeddings, with the reason.
    """
    rng = np.random.default_rng([seed, 4])
    x64 = x.astype(np.float64)
    mean, d = x64.mean(0), x.shape[1]
    if name == "rotation":
        q, upper = np.linalg.qr(rng.standard_normal((d, d)))
        q *= np.sign(np.diag(upper))  # uniform over rotations (Mezzadri 2007)
        return LinearFeatures(q, np.zeros(d), q.T)
    if name == "pca":
        _, vectors = np.linalg.eigh((x64 - mean).T @ (x64 - mean))
        return LinearFeatures(vectors[:, ::-1], mean, vectors[:, ::-1].T)
    if name == "untrained":
        from medsae.sae.data import fit_scaling
        from medsae.sae.model import fold
        from medsae.sae.registry import build

        return SAEFeatures(fold(*build(sae, d, seed).export(), fit_scaling(x), {}))
    from sklearn.decomposition import NMF, FastICA
    from sklearn.exceptions import ConvergenceWarning

    sample = x[rng.choice(len(x), FIT_ROWS, replace=False)] if len(x) > FIT_ROWS else x
    k = min(d, len(sample) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if name == "ica":
            ica = FastICA(k, whiten="unit-variance", max_iter=200, tol=1e-3, random_state=seed).fit(sample.astype(np.float64))
            return LinearFeatures(ica.components_.T, ica.mean_, ica.mixing_.T)
        if name == "nmf":
            if (sample < 0).any():
                raise ConfigError(
                    f"measure.baselines: nmf needs embeddings without negative values, {float((sample < 0).mean()):.0%} here are; leave it out"
                )
            return NMFFeatures(NMF(k, init="nndsvda", max_iter=200, random_state=seed).fit(sample).components_)
    raise ConfigError(f"measure.baselines: no baseline {name!r}; there are rotation, pca, ica, nmf, untrained")
