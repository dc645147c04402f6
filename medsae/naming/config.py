"""Configuration of naming and scoring."""

from typing import Literal

from pydantic import Field

from medsae.settings import Section


class NameConfig(Section):
    """Who names the neurons, and which."""

    namer: Literal["label", "medgemma"] = "label"
    """`label`: the best-correlated label with its figures. `medgemma`: the naming service."""
    model: str = "google/medgemma-4b-it"
    """Model directory or hub id behind the naming service."""
    url: str | None = None
    """Base URL of a running naming service; without one the stage starts its own and stops it."""
    images: int = Field(8, gt=0)
    """Images a prompt."""
    neurons: int | None = Field(None, gt=0)
    """Name at most this many neurons, best first; default all selected."""


class ScoreConfig(Section):
    """How names are scored."""

    images: int = Field(20, gt=0)
    """Activating images a neuron, and as many not activating."""
