"""Architectures by name."""

from __future__ import annotations

import numpy as np

from medsae.errors import ConfigError
from medsae.sae.april import April
from medsae.sae.base import Architecture
from medsae.sae.batch_topk import BatchTopK, MatryoshkaBatchTopK
from medsae.sae.config import SAEConfig
from medsae.sae.gated import Gated
from medsae.sae.jumprelu import JumpReLU
from medsae.sae.standard import Standard
from medsae.sae.topk import TopK

ARCHITECTURES: dict[str, type[Architecture]] = {
    "standard": Standard,
    "april": April,
    "topk": TopK,
    "batch_topk": BatchTopK,
    "matryoshka_batch_topk": MatryoshkaBatchTopK,
    "jumprelu": JumpReLU,
    "gated": Gated,
}
"""Every architecture: a class of `medsae.sae.base.Architecture`."""


def build(config: SAEConfig, dim: int, seed: int, center: np.ndarray | None = None) -> Architecture:
    """A fresh network of the configured architecture for inputs of width `dim`; `center` [d] starts `b_dec`."""
    if config.architecture not in ARCHITECTURES:
        raise ConfigError(f"sae {config.name}: no architecture {config.architecture!r}; there are {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[config.architecture](config, dim, seed, center)
