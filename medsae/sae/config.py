"""Configuration of sparse autoencoders."""

from typing import Literal

from pydantic import Field

from medsae.settings import Section


class SAEConfig(Section):
    """One sparse autoencoder and how it is trained."""

    name: str = "standard"
    """Name of the artifact folder; unique in a run."""
    architecture: Literal["standard"] = "standard"
    """Architecture, see `medsae.sae.registry`."""
    dict_size: int = Field(8192, gt=0)
    """Dictionary size m: number of neurons."""
    l1: float = Field(3e-2, ge=0)
    """L1 coefficient."""
    lr: float = Field(1e-3, gt=0)
    """Adam learning rate."""
    epochs: int = Field(200, gt=0)
    """Passes over the training split."""
    batch_size: int = Field(1024, gt=0)
    """Global batch size in samples."""
