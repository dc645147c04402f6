"""Zero-shot scores: how much nearer an image is to texts for a label than to texts against it. They say whether an encoder works before anyone interprets it."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medsae.encoders.base import ImageEncoder, TextEncoder
from medsae.errors import ConfigError

Prompts = Mapping[str, tuple[Sequence[str], Sequence[str]]]
"""Label to texts for it and texts against it."""


def medclip_prompts() -> dict[str, tuple[list[str], list[str]]]:
    """The class prompts of the installed `medclip` package, all of them: 5 CheXpert labels.

    The package compares an image with the prompts of its classes and takes the nearest class; so the texts against a label are those for the other labels.
    """
    from medsae.encoders.medclip import package

    package()
    prompts = importlib.import_module("medclip.prompts")
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints
        texts: dict[str, list[str]] = prompts.generate_chexpert_class_prompts()
    return {label: (list(own), [t for other, theirs in texts.items() if other != label for t in theirs]) for label, own in texts.items()}


def prompts_for(encoder: Any) -> dict[str, tuple[list[str], list[str]]]:
    """The encoder's own prompts (`zero_shot_prompts()`) where it has any, else those of the `medclip` package.

    Empty where there is nothing to learn: no text tower, or random weights without prompts of their own.
    """
    if not isinstance(encoder, TextEncoder):
        return {}
    own = getattr(encoder, "zero_shot_prompts", None)
    if own is not None:
        return dict(own())
    return medclip_prompts() if getattr(encoder, "trained", False) else {}


def prompt_axes(encoder: TextEncoder, prompts: Prompts, batch: int = 64) -> np.ndarray:
    """For each label, the mean text embedding for it minus the mean against it. float32 [labels, dim].

    Raises:
        ConfigError: a label without texts for it.
        WeightsError: the encoder's tokenizer cannot be had.
    """
    for label, (positive, _) in prompts.items():
        if not positive:
            raise ConfigError(f"zero-shot label {label!r} has no texts for it")
    texts = list(dict.fromkeys(t for sides in prompts.values() for side in sides for t in side))
    if not texts:
        return np.zeros((0, 0), np.float32)
    by_length = sorted(texts, key=len)  # texts of a batch are padded to its longest
    vectors = np.concatenate([encoder.encode_text(by_length[i : i + batch]) for i in range(0, len(by_length), batch)])
    row = {text: i for i, text in enumerate(by_length)}

    def mean(side: Sequence[str]) -> np.ndarray:
        return vectors[[row[t] for t in side]].mean(0) if side else np.zeros(vectors.shape[1])

    return np.stack([mean(positive) - mean(negative) for positive, negative in prompts.values()]).astype(np.float32)


def zero_shot_scores(encoder: ImageEncoder, embeddings: np.ndarray, prompts: Prompts | None = None) -> np.ndarray:
    """Mean cosine similarity to the texts for each label minus that to the texts against it.

    Args:
        encoder: an encoder with a text tower.
        embeddings: of images, float32 [n, dim], of any length.
        prompts: default `prompts_for(encoder)`.

    Returns:
        float32 [n, labels], in the order of `prompts`; higher is more like the label.

    Raises:
        ConfigError: the encoder has no text tower.
        WeightsError: its tokenizer cannot be had.
    """
    if not isinstance(encoder, TextEncoder):
        raise ConfigError(f"encoder {encoder.name!r} has no text tower: zero-shot scores need one")
    axes = prompt_axes(encoder, prompts_for(encoder) if prompts is None else prompts)
    if not len(axes):
        return np.zeros((len(embeddings), 0), np.float32)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores: np.ndarray = (embeddings / np.maximum(lengths, np.finfo(np.float32).tiny)) @ axes.T
    return scores.astype(np.float32, copy=False)
