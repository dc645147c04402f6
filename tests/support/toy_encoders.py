"""Small encoders for tests, found by `toy_encoders:Class`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
from PIL import Image

from medsae.encoders import EncoderInfo


def preprocess(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").resize((16, 16)))


class Projection:
    """A fixed random projection of 16 x 16 pixels to 8 dimensions."""

    name, dim, trained, input_size = "toy_encoders:Projection", 8, True, (16, 16)
    preprocess = staticmethod(preprocess)

    def __init__(self, weights: str | None = None, device: str = "cpu", seed: int = 0, dtype: str = "auto", sha256: str | None = None) -> None:
        self.weights = weights
        self.matrix = np.random.default_rng(seed).normal(size=(256, self.dim)).astype(np.float32)

    @property
    def info(self) -> EncoderInfo:
        return EncoderInfo(self.name, self.dim, True, "fixed", None, "toy", None)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return np.asarray((pixels.reshape(len(pixels), -1).astype(np.float32) / 255) @ self.matrix)


class DiesOnce(Projection):
    """Kills its own process in the middle of the work, once: `weights` names a folder where it leaves a mark."""

    name = "toy_encoders:DiesOnce"

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        mark = Path(str(self.weights)) / "died"
        if len(pixels) > 4 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(pixels)


class Broken(Projection):
    """Returns NaN."""

    name = "toy_encoders:Broken"

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return super().encode(pixels) * np.nan


class Slow(Projection):
    """Takes its time, so that a test can end a run in the middle."""

    name = "toy_encoders:Slow"

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        time.sleep(0.2)
        return super().encode(pixels)
