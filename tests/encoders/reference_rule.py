"""What both stacks are given: every tensor filled by a rule from its name, drawn images, texts and a small vocabulary. NumPy and Pillow only."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = {  # name -> (mode, width, height)
    "square": ("L", 224, 224),
    "portrait": ("L", 320, 390),
    "chexpert": ("L", 390, 320),
    "odd": ("L", 225, 223),
    "small": ("L", 91, 57),
    "thin": ("L", 641, 65),
    "large": ("L", 1061, 1409),
    "colour": ("RGB", 301, 400),
    "colour-odd": ("RGB", 513, 511),
    "colour-small": ("RGB", 33, 180),
}

# fmt: off
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##s", "##al", "##ly", "mild", "minimal", "severe", "small", "large", "linear", "trace", "at",
    "the", "of", "lung", "lungs", "base", "bases", "left", "right", "upper", "lower", "lobe", "mid", "zone", "effusion", "opacity", "nodule",
    "normal", "heart", "size", "there", "is", "no", ",", ".", "-", "acute", "chronic", "change", "both", "a",
]
# fmt: on
TEXTS = [
    "mild linear opacity at the left lung base",
    "  small effusion, right lower lobe.",
    "There is NO acute change",
    "nodules of unknown kind - both lungs",
    "a",
    " ".join(["severe chronic effusion at the right base"] * 20),
]


def _uniform(name: str, count: int) -> np.ndarray:
    """`count` float32 in [-1, 1): SplitMix64 over a counter that starts at the hash of the name."""
    start = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], "<u8")[0]
    out = np.empty(count, np.float32)
    with np.errstate(over="ignore"):
        for low in range(0, count, 1 << 20):
            z = np.arange(low + 1, min(low + (1 << 20), count) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
            out[low : low + len(z)] = (z >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
    return out


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float tensor of this name: matrices keep the variance of their input, scales are near 1, shifts near 0, variances positive."""
    u = _uniform(name, math.prod(shape)).reshape(shape)
    if name.endswith("running_var"):
        return np.float32(1) + np.float32(0.5) * u
    if len(shape) >= 2:
        return u * np.float32(math.sqrt(3 / math.prod(shape[1:])))
    if name.endswith("weight"):
        return np.float32(1) + np.float32(0.25) * u
    return np.asarray(np.float32(0.25) * u + np.float32(2.5 if name == "logit_scale" else 0), np.float32)


def image(name: str) -> Image.Image:
    """A drawn image: a gradient, stripes and noise, in whole numbers."""
    mode, width, height = SIZES[name]
    y, x = np.mgrid[:height, :width].astype(np.int64)
    channels = []
    for c in range(3 if mode == "RGB" else 1):
        noise = (_uniform(f"{name}/{c}", width * height).reshape(height, width) * 60).astype(np.int64)
        step = 3 + int(_uniform(name, 1)[0] * 2) + c
        channels.append(
            np.clip((x * 151 // width) + (y * (60 + 40 * c) // height) + ((x // (5 * step) + y // (7 * step)) % 2) * 70 + noise - 30, 0, 255).astype(
                np.uint8
            )
        )
    return Image.fromarray(channels[0] if mode == "L" else np.stack(channels, -1))


def write_tokenizer(folder: Path) -> None:
    """A directory like Bio_ClinicalBERT's on the hub: a vocabulary and a configuration, no more."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "config.json").write_text('{"model_type": "bert", "vocab_size": 28996}\n')
