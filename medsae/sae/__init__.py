"""Sparse autoencoders: architectures, training, checkpoints. `load` gives a trained one."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from medsae.sae.checkpoint import load, save
    from medsae.sae.config import SAEConfig
    from medsae.sae.model import SAE
    from medsae.sae.training import Trainer, train

__all__ = [
    "SAE",
    "SAEConfig",
    "Trainer",
    "load",
    "save",
    "train",
]

# Loaded on first use: configuration sections are read in processes that need nothing else of this package.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoint": ["load", "save"],
        "config": ["SAEConfig"],
        "model": ["SAE"],
        "training": ["Trainer", "train"],
    },
)
