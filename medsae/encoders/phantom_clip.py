"""`phantom-clip`: a small image and text encoder in the package, trained on phantom radiographs by `benchmarks/train_phantom_clip.py`.

It is a stand-in: it lets every stage run on real embeddings of real concepts without a download. It knows nothing of patients.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from medsae.artifacts import fingerprint
from medsae.encoders import weights as checkpoints
from medsae.encoders.base import EncoderInfo
from medsae.encoders.phantom_text import LENGTH, PAD, WordTokenizer, concept_vocabulary, zero_shot_prompts
from medsae.errors import WeightsError

SIZE = 192
DIM = 64
PREPROCESSING = "pad to a black square, bicubic to 192 x 192, uint8; (x / 255 - 0.45) / 0.25 on the device"
FILES = Path(__file__).parent
NOTICE = "phantom-clip is a small stand-in encoder trained on synthetic radiographs: it says nothing about clinical images."

__all__ = ["DIM", "SIZE", "PhantomCLIP", "PhantomModel", "as_ids", "concept_vocabulary", "preprocess", "standardise", "zero_shot_prompts"]


def preprocess(image: Image.Image, size: int = SIZE) -> np.ndarray:
    """Pads an image to a black square and resizes it, uint8 [size, size]."""
    grey = image if image.mode == "L" else image.convert("L")
    side = max(grey.size)
    square = Image.new("L", (side, side), 0)
    square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    padding = (kernel - 1) // 2 if kernel % 2 else (kernel - stride) // 2
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """A convolution whose output is added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = _convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class ImageTower(nn.Module):
    """Convolutions at 48, 24, 12 and 6 places a side; then what is where, and the strongest responses of each quarter and of each side.

    Small findings (a nodule, a broken rib, a catheter) are few places of a fine map: the strongest response finds them, an average would drown them.
    """

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        # Four by four pixels become channels: nothing is averaged away before the first convolution, and it is as cheap as one of stride 4.
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), _convolution(16, 32))
        self.fine = nn.Sequential(_convolution(32, 64, 3, 2), Residual(64))
        self.middle = nn.Sequential(_convolution(64, 128, 3, 2), Residual(128))
        self.coarse = nn.Sequential(_convolution(128, 128, 3, 2), Residual(128), _convolution(128, 48, 1))
        self.mix = nn.Linear(48 * 36 + 128 * 4 + 64 * 2, 256, bias=False)
        self.norm = nn.BatchNorm1d(256)
        self.head = nn.Linear(256, dim)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, 1, 192, 192], standardised, to [B, dim]."""
        fine = self.fine(self.stem(x))
        middle = self.middle(fine)
        quarters, sides = F.adaptive_max_pool2d(middle, (2, 2)), F.adaptive_max_pool2d(fine, (1, 2))
        features = torch.cat([self.coarse(middle).flatten(1), quarters.flatten(1), sides.flatten(1)], 1)
        return self.head(F.relu(self.norm(self.mix(features))))


class TextBlock(nn.Module):
    """A transformer layer with normalisation first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[n, length, width] with mask bool [n, 1, 1, length], True where there is a word."""
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class TextTower(nn.Module):
    """Words and their places through a small transformer layer, averaged."""

    def __init__(self, words: int, dim: int = DIM, width: int = 96) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        self.blocks = nn.ModuleList([TextBlock(width, 4) for _ in range(1)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Word ids, int64 [n, length], 0 where there is none, to [n, dim]."""
        there = ids != PAD
        x = self.words(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, there[:, None, None, :])
        weight = there[..., None].to(x.dtype)
        return self.head((self.norm(x) * weight).sum(1) / weight.sum(1))


class PhantomModel(nn.Module):
    """Both towers and the scale of their similarity."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.image = ImageTower()
        self.text = TextTower(words)
        self.scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(0.0))


def standardise(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W] to float32 [B, 1, H, W]."""
    return pixels[:, None].float().div_(255).sub_(0.45).div_(0.25)


def as_ids(tokenizer: WordTokenizer, texts: list[str]) -> Tensor:
    """Texts to int64 [n, LENGTH of the longest], padded."""
    rows = [tokenizer(t) for t in texts]
    width = max(map(len, rows))
    return torch.tensor([r + [PAD] * (width - len(r)) for r in rows], dtype=torch.int64)


class PhantomCLIP:
    """The embedded encoder: image and text tower in one space of 64 dimensions, unit norm.

    Args:
        weights: None or `auto` (the file in the package), a path to a file of the same make, or `untrained`.
        device: torch device.
        seed: of the weights when untrained.
        dtype: `auto`, `float32`, `bfloat16` or `float16`; `auto` is float32 on CPU and bfloat16 on GPU.
        sha256: expected SHA-256 of the weights file.
        words: vocabulary of weights given by path; default the package's.

    Raises:
        WeightsError: weights that are missing, damaged or do not fit.
    """

    name = "phantom-clip"
    dim = DIM
    input_size = (SIZE, SIZE)
    preprocess = staticmethod(preprocess)

    def __init__(
        self,
        weights: str | None = None,
        device: str = "cpu",
        seed: int = 0,
        dtype: str = "auto",
        sha256: str | None = None,
        words: list[str] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.trained = weights != "untrained"
        card: dict[str, Any] = json.loads((FILES / "phantom_clip.json").read_text()) if words is None else {"words": words, "sha256": None}
        self.tokenizer = WordTokenizer(card["words"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = PhantomModel(len(self.tokenizer)).eval()
        digest, source = None, f"untrained, seed {seed}"
        if self.trained:
            embedded = weights in (None, "auto")
            path = FILES / "phantom_clip.safetensors" if embedded else Path(str(weights)).expanduser()
            digest, source = self._load(path, sha256 or (card["sha256"] if embedded else None)), "embedded" if embedded else path.name
        self.dtype = checkpoints.resolve_dtype(dtype, self.device)
        self.model = self.model.to(self.device)
        self.model.image.to(dtype=self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        notice = NOTICE if self.trained else f"UNTRAINED phantom-clip (random weights, seed {seed}): these figures mean nothing."
        mark = fingerprint({"name": self.name, "weights": digest or source, "preprocessing": PREPROCESSING})
        self._info = EncoderInfo(self.name, DIM, self.trained, source, digest, mark, notice)

    def _load(self, path: Path, sha256: str | None) -> str:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise WeightsError(f"phantom-clip: weights file {path} does not exist (encoder.weights)")
        digest = checkpoints.check_sha256(path, sha256)
        try:
            state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
            self.model.load_state_dict(state, strict=True)
        except (SafetensorError, RuntimeError) as error:
            raise WeightsError(f"phantom-clip: {path.name} is not a weights file of this encoder: {' '.join(str(error).split())[:200]}") from error
        return digest

    @property
    def info(self) -> EncoderInfo:
        """What a run records of this encoder."""
        return self._info

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, 192, 192] to float32 [B, 64], unit norm."""
        with torch.inference_mode():
            grey = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(self.device, non_blocking=True)
            x = standardise(grey).to(self.dtype).contiguous(memory_format=torch.channels_last)
            result: np.ndarray = F.normalize(self.model.image(x).float(), dim=-1).cpu().numpy()
        return result

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """Texts to float32 [n, 64], unit norm. Words that the encoder never saw share one token; `tokenizer.unknown` names them."""
        if not texts:
            return np.zeros((0, DIM), np.float32)
        with torch.inference_mode():
            features = self.model.text(as_ids(self.tokenizer, list(texts)).to(self.device))
            result: np.ndarray = F.normalize(features.float(), dim=-1).cpu().numpy()
        return result

    def zero_shot_prompts(self) -> dict[str, tuple[list[str], list[str]]]:
        """Texts for and against each label, see `medsae.encoders.phantom_text`."""
        return zero_shot_prompts()

    def concept_vocabulary(self) -> list[str]:
        """Phrases for what phantoms show."""
        return concept_vocabulary()
