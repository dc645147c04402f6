"""What an image encoder is, and how one is found by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class EncoderInfo:
    """What a run records of its encoder (`manifest.json: encoder`)."""

    name: str
    dim: int
    trained: bool
    weights: str
    weights_sha256: str | None
    fingerprint: str
    notice: str | None


@runtime_checkable
class ImageEncoder(Protocol):
    """A frozen image encoder.

    `dim`: embedding width d. `trained`: False for random weights. `input_size`: (height, width) of the encoder's input.
    """

    name: str
    dim: int
    trained: bool
    input_size: tuple[int, int]

    @property
    def info(self) -> EncoderInfo:
        """What a run records of this encoder."""

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """A decoded image (mode L) to the encoder's input, uint8 [H, W]. Runs on CPU tasks, holds no weights."""

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W] to float32 [B, dim]. Normalisation and channel repeat happen on the device."""


@runtime_checkable
class TextEncoder(Protocol):
    """An encoder with a text tower in the same space as its images."""

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """Texts to float32 [n, dim], unit norm."""
