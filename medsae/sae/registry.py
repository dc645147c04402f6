"""Architectures by name."""

from __future__ import annotations

import numpy as np

from medsae.errors import ConfigError
from medsae.sae.base import Architecture
from medsae.sae.config import SAEConfig
from medsae.sae.standard import April, Standard

ARCHITECTURES: dict[str, type[Architecture]] = {"standard": Standard, "april": April}


def build(config: SAEConfig, dim: int, seed: int, center: np.ndarray | None = None) -> Architecture:
    """A fresh network of the configured architecture for inputs of width `dim`; `center` [d] starts `b_dec`."""
    if config.architecture not in ARCHITECTURES:
        raise ConfigError(f"sae {config.name}: no architecture {config.architecture!r}; there are {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[config.architecture](config, dim, seed, center)
