"""Configuration of the measurements."""

from typing import Literal

from pydantic import Field

from medsae.settings import Section


class MeasureConfig(Section):
    """What is measured on which images."""

    split: Literal["eval", "train", "all"] = "eval"
    """Images to measure on; `eval` are patients that the SAE was not trained on."""
    labels: list[str] | None = Field(None, min_length=1)
    """Labels to measure against; default: all of the run. Entropy runs over these."""
    balanced: int | None = Field(None, gt=0)
    """Measure on a balanced subset of the split only: for every label this many of its positive images, drawn with the seed; their union."""
    alive_correlation: float = Field(0.2, ge=0, lt=1)
    """A neuron takes part in the entropy figures when its highest |r| exceeds this (the paper's rule)."""
    exemplars: int = Field(16, gt=0)
    """Most activating images kept a neuron."""
    reference: str | None = None
    """Run directory whose embeddings (another encoder, the same images) judge similarity in the monosemanticity score. Without one the
    embeddings judge themselves, and the summary says so."""
    rows: int | None = Field(None, gt=0)
    """Images encoded at once in a task; default: what makes 16 MB of activations."""
    baselines: list[Literal["rotation", "pca", "ica", "nmf", "untrained"]] = ["rotation", "pca", "untrained"]
    """Other dictionaries measured beside the SAE, each under the name `baseline-...`. `ica` and `nmf` take minutes at width 512."""
    bootstrap: int = Field(1000, ge=100)
    """Resamples of the patients behind every interval."""
    permutations: int = Field(100, ge=0)
    """Permutations of the labels behind the null of the best of m neurons; 0 leaves it out."""
    draws: int = Field(500, gt=0)
    """Random subsets of neurons, as many as the raw features, in the equal-candidate comparison."""
