"""Sparse autoencoders: architectures, training, checkpoints. `load` gives a trained one."""

from medsae.sae.checkpoint import load, save
from medsae.sae.config import SAEConfig
from medsae.sae.model import SAE
from medsae.sae.training import Trainer, train

__all__ = ["SAE", "SAEConfig", "Trainer", "load", "save", "train"]
