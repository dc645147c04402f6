"""Image (and text) encoders."""

from medsae.encoders.base import EncoderInfo, ImageEncoder, TextEncoder
from medsae.encoders.registry import encoder_names, find_batch_size, load_encoder, load_preprocess

__all__ = ["EncoderInfo", "ImageEncoder", "TextEncoder", "encoder_names", "find_batch_size", "load_encoder", "load_preprocess"]
