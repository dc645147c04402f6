"""Encoders by name: built in, installed by another package, or a class by its path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
from PIL import Image

from medsae.encoders.base import ImageEncoder
from medsae.errors import ConfigError

GROUP = "medsae.encoders"
"""Entry-point group in which packages register encoder classes."""


def encoder_names() -> list[str]:
    """Names that `load_encoder` knows, plug-ins included; besides them it takes `hf:...` and `module:Class`."""
    return sorted({"medclip-resnet50", "medclip-vit", "phantom-clip", *(e.name for e in metadata.entry_points(group=GROUP))})


def _plugin(name: str) -> Any:
    found = [e for e in metadata.entry_points(group=GROUP) if e.name == name]
    path = found[0].value if found else name
    module, colon, attribute = path.partition(":")
    if not colon:
        raise ConfigError(f"encoder {name!r} is not known; there are {', '.join(encoder_names())}, hf:ID-or-directory and module:Class")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"encoder {name!r} cannot be imported: {error}") from error


def load_encoder(
    name: str, weights: str | None = None, device: str = "cpu", seed: int = 0, dtype: str = "auto", sha256: str | None = None
) -> ImageEncoder:
    """An encoder, ready to encode.

    Args:
        name: see `encoder_names`; `hf:ID-or-directory`; `module:Class`.
        weights: a path, `auto` or `untrained`; None is the encoder's own default.
        device: torch device.
        seed: of the weights when `untrained`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        sha256: expected SHA-256 of the weights file.

    Raises:
        ConfigError: no such encoder.
        WeightsError: weights that are missing, damaged, unsafe or do not fit.
    """
    options: dict[str, Any] = {"weights": weights, "device": device, "seed": seed, "dtype": dtype, "sha256": sha256}
    if name in ("medclip-resnet50", "medclip-vit"):
        from medsae.encoders.medclip import MedCLIP

        return MedCLIP(name, **options)
    if name == "phantom-clip":
        return importlib.import_module("medsae.encoders.phantom_clip").PhantomCLIP(**options)
    if name.startswith("hf:"):
        from medsae.encoders.huggingface import load

        return load(name, **options)
    encoder: ImageEncoder = _plugin(name)(**options)
    return encoder


def load_preprocess(name: str) -> Callable[[Image.Image], np.ndarray]:
    """An encoder's preprocessing alone: no weights, for CPU tasks. Image (mode L) to uint8 [H, W]."""
    if name in ("medclip-resnet50", "medclip-vit"):
        from medsae.encoders.medclip import preprocess

        return preprocess
    if name == "phantom-clip":
        return importlib.import_module("medsae.encoders.phantom_clip").preprocess
    if name.startswith("hf:"):
        return importlib.import_module("medsae.encoders.huggingface").load_preprocess(name)
    plugin = _plugin(name)
    function: Callable[[Image.Image], np.ndarray] | None = getattr(plugin, "preprocess", None)
    if function is None:
        raise ConfigError(f"encoder {name!r} has no preprocess(image)")
    return function


def find_batch_size(encoder: ImageEncoder, start: int = 32, limit: int = 4096) -> int:
    """The batch size for a GPU, found by doubling until its memory is short: half of what fits, for safety; `limit` at most.

    Raises:
        ConfigError: not even one image fits.
    """
    import torch

    def fits(size: int) -> bool:
        try:
            encoder.encode(np.zeros((size, *encoder.input_size), np.uint8))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return False
        return True

    best = start
    if not fits(start):
        while best > 1:
            best //= 2
            if fits(best):
                return best
        raise ConfigError(f"encoder {encoder.name!r}: not even 1 image fits into the GPU's memory")
    while best * 2 <= limit:
        if not fits(best * 2):
            return max(start, best // 2)
        best *= 2
    return best
