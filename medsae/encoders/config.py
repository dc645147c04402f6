"""Configuration of the encoder and of the extraction."""

from typing import Literal

from pydantic import Field

from medsae.settings import Section


class EncoderConfig(Section):
    """Which encoder, with which weights."""

    name: str = "medclip-resnet50"
    """`medclip-resnet50`, `medclip-vit`, `hf:ID-or-directory`, `phantom-clip`, a registered plug-in or `module:Class`."""
    weights: str | None = None
    """A path, `auto` (download the official checkpoint) or `untrained`. Default: `auto` where the encoder has one."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Expected SHA-256 of the weights file; extraction stops when it differs."""
    seed: int = 0
    """Seed of the weights when `weights` is `untrained`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the forward pass; `auto`: float32 on CPU, bfloat16 on GPU."""
    batch_size: int | None = Field(None, gt=0)
    """Images a forward pass; default 32 on CPU, found by trial on a GPU."""
    reduced_decode: bool = False
    """JPEG files of at least four times the encoder's side are decoded at 1/2, 1/4 or 1/8 of their size, never below twice the encoder's side.
    Faster on original-size files; pixels differ by a few grey values (`docs/encoders.md`)."""
    actors: int | None = Field(None, gt=0)
    """Encoder actors; default one a GPU, or one a CPU core pair."""
    rows_per_part: int | None = Field(None, gt=0)
    """Images a Parquet part (the unit of resume); default depends on the number of images, 2048 at most."""
