"""Checks that an encoder does what `medsae.encoders.base` says; run at start of extraction, and for plug-in authors to call in their tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from medsae.encoders.base import EncoderInfo, ImageEncoder, TextEncoder
from medsae.errors import ConfigError

FLOAT_TOLERANCE = 1e-3
HALF_TOLERANCE = 3e-2
"""Largest difference, relative to the norm of an embedding, between an image alone and in a batch. Arithmetic of 8 bits (bfloat16) rounds at 4e-3."""


def _drawn_images() -> list[Image.Image]:
    """Noise of three shapes, a gradient, a black and a white image: what standardises each image by itself divides by zero on the last two."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((300, 240), (224, 224), (57, 91))]
    arrays.append(np.tile(np.arange(256, dtype=np.uint8), (200, 1)))
    arrays += [np.full((128, 128), value, np.uint8) for value in (0, 255)]
    return [Image.fromarray(a) for a in arrays]


def check_encoder(encoder: ImageEncoder, tolerance: float | None = None, texts: Sequence[str] = ()) -> None:
    """Preprocesses and encodes a few drawn images.

    Args:
        encoder: the encoder to check.
        tolerance: largest difference, relative to the norm of an embedding, between an image alone and in a batch. Default: 0.001, or 0.03 where the
            encoder has a `dtype` of 16 bits.
        texts: where given, `encode_text` is checked with them too.

    Raises:
        ConfigError: what it does wrong: an attribute, shape, type, a value that is not finite, an output that changes from call to call or with the
            batch, the same output for every image.
    """
    name = getattr(encoder, "name", type(encoder).__name__)

    def wrong(what: str) -> ConfigError:
        return ConfigError(f"encoder {name!r} {what}")

    missing = [a for a in ("name", "dim", "trained", "input_size", "info", "preprocess", "encode") if not hasattr(encoder, a)]
    if missing:
        raise wrong(f"has no {', '.join(missing)} (see medsae.encoders.base.ImageEncoder)")
    if not isinstance(encoder.info, EncoderInfo) or encoder.info.dim != encoder.dim:
        raise wrong("must have `info`, an EncoderInfo whose `dim` is the encoder's")
    pixels = [encoder.preprocess(image) for image in _drawn_images()]
    for array in pixels:
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != tuple(encoder.input_size):
            raise wrong(f"preprocesses to {_described(array)}, not uint8 {tuple(encoder.input_size)}")
    batch = np.stack(pixels)
    batch.flags.writeable = False  # extraction hands over read-only views of the object store
    together = encoder.encode(batch)
    if not isinstance(together, np.ndarray) or together.dtype != np.float32 or together.shape != (len(batch), encoder.dim):
        raise wrong(f"encodes to {_described(together)}, not float32 {(len(batch), encoder.dim)}")
    if not np.isfinite(together).all():
        blank = np.isfinite(together[:-2]).all()
        raise wrong("returns values that are not finite" + (" for an image of one grey value" if blank else ""))
    scale = float(np.linalg.norm(together, axis=1).max()) or 1.0
    if (together == together[0]).all():
        raise wrong("gives every image the same embedding")
    if np.abs(encoder.encode(batch) - together).max() > 1e-6 * scale:
        raise wrong("returns other values for the same images: is it in evaluation mode?")
    if tolerance is None:
        tolerance = HALF_TOLERANCE if any(half in str(getattr(encoder, "dtype", "")) for half in ("float16", "half")) else FLOAT_TOLERANCE
    _check_batches(encoder, batch, together, tolerance * scale, wrong)
    if texts:
        _check_texts(encoder, list(texts), wrong)


def _described(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def _check_batches(encoder: ImageEncoder, batch: np.ndarray, together: np.ndarray, allowed: float, wrong: Any) -> None:
    alone = np.concatenate([encoder.encode(batch[i : i + 1]) for i in range(len(batch))])
    turned = encoder.encode(batch[::-1])[::-1]
    if alone.shape != together.shape or turned.shape != together.shape:
        raise wrong("returns another number of embeddings than of images when the batch changes")
    difference = max(float(np.abs(alone - together).max()), float(np.abs(turned - together).max()))
    if not difference <= allowed:
        raise wrong(
            f"gives an image another embedding when its batch changes (by {difference:.2g}, allowed {allowed:.2g}): is it in evaluation mode?"
        )


def _check_texts(encoder: ImageEncoder, texts: list[str], wrong: Any) -> None:
    if not isinstance(encoder, TextEncoder):
        raise wrong("has no encode_text")
    embeddings = encoder.encode_text(texts)
    if not isinstance(embeddings, np.ndarray) or embeddings.dtype != np.float32 or embeddings.shape != (len(texts), encoder.dim):
        raise wrong(f"encodes texts to {_described(embeddings)}, not float32 {(len(texts), encoder.dim)}")
    if not np.abs(np.linalg.norm(embeddings, axis=1) - 1).max() < 1e-3:
        raise wrong("encodes texts to vectors that are not of unit norm")
