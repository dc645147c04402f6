"""Checks that an encoder does what `medsae.encoders.base` says; run at start of extraction, and for plug-in authors to call in their tests."""

from __future__ import annotations

import numpy as np
from PIL import Image

from medsae.encoders.base import EncoderInfo, ImageEncoder
from medsae.errors import ConfigError


def check_encoder(encoder: ImageEncoder, tolerance: float = 1e-3) -> None:
    """Preprocesses and encodes a few drawn images.

    Args:
        encoder: the encoder to check.
        tolerance: largest difference, relative to the norm of an embedding, between an image alone and in a batch.

    Raises:
        ConfigError: what it does wrong: shape, type, NaN, an output that changes from call to call or with the batch.
    """

    def wrong(what: str) -> ConfigError:
        return ConfigError(f"encoder {encoder.name!r} {what}")

    if not isinstance(encoder.info, EncoderInfo) or encoder.info.dim != encoder.dim:
        raise wrong("must have `info`, an EncoderInfo whose `dim` is the encoder's")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in ((300, 240), (224, 224), (57, 91))]
    pixels = [encoder.preprocess(image) for image in images]
    for array in pixels:
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != tuple(encoder.input_size):
            raise wrong(
                f"preprocesses to {getattr(array, 'dtype', type(array))} {getattr(array, 'shape', '')}, not uint8 {tuple(encoder.input_size)}"
            )
    batch = np.stack(pixels)
    together = encoder.encode(batch)
    if not isinstance(together, np.ndarray) or together.dtype != np.float32 or together.shape != (len(batch), encoder.dim):
        raise wrong(
            f"encodes to {getattr(together, 'dtype', type(together))} {getattr(together, 'shape', '')}, not float32 {(len(batch), encoder.dim)}"
        )
    if not np.isfinite(together).all():
        raise wrong("returns values that are not finite")
    scale = float(np.linalg.norm(together, axis=1).max()) or 1.0
    if np.abs(encoder.encode(batch) - together).max() > 1e-6 * scale:
        raise wrong("returns other values for the same images: is it in evaluation mode?")
    alone = np.concatenate([encoder.encode(batch[i : i + 1]) for i in range(len(batch))])
    turned = encoder.encode(batch[::-1].copy())[::-1]
    difference = max(float(np.abs(alone - together).max()), float(np.abs(turned - together).max())) / scale
    if difference > tolerance:
        raise wrong(f"gives an image another embedding when its batch changes (relative difference {difference:.2g}): is it in evaluation mode?")
