"""Image files to checked 8-bit greyscale images."""

from __future__ import annotations

import io
import time
import warnings

import numpy as np
import pyarrow.fs as pafs
from PIL import Image, UnidentifiedImageError

from medsae.errors import DataError

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "PPM")
"""Formats that are tried: plain raster formats only, none that runs an interpreter (EPS, PDF)."""

MAX_PIXELS = 100_000_000


def decode(data: bytes, max_pixels: int = MAX_PIXELS, reduce_to: int = 0) -> Image.Image:
    """An image file's bytes as an 8-bit greyscale image (PIL mode `L`).

    Colour becomes luma (ITU-R 601, as PIL does), transparency is laid over black, and integers of more than 8 bits are scaled linearly
    from the smallest of 10, 12, 14 and 16 bits that holds the image's maximum.

    Args:
        data: the file's bytes.
        max_pixels: images with more are refused before they are decoded.
        reduce_to: where not 0, the JPEG decoder halves the size (up to three times) while the longer side stays at least this many pixels, and gives
            luma itself. Faster for large files, not equal to the last bit; other formats are not touched.

    Raises:
        DataError: the reason, in words that hold nothing of the file's content: empty, DICOM, not an image, too many pixels, truncated or damaged,
            several frames, a pixel type without a defined scale.
    """
    if not data:
        raise DataError("empty file")
    if data[128:132] == b"DICM":
        raise DataError("DICOM file: export it as PNG or JPEG with its display window first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise DataError("not an image in a supported format (JPEG, PNG, TIFF, BMP, WebP, GIF, JPEG 2000, PNM)") from error
        except Image.DecompressionBombError as error:
            raise DataError(f"too many pixels: the limit is {max_pixels}") from error
        except (OSError, ValueError, SyntaxError, EOFError, OverflowError) as error:
            raise DataError("truncated or damaged image") from error
        width, height = image.size
        if width * height > max_pixels:
            raise DataError(f"too many pixels: {width} x {height}, the limit is {max_pixels}")
        if getattr(image, "n_frames", 1) > 1:
            raise DataError(f"{image.n_frames} frames in one file: split it first")  # type: ignore[attr-defined]
        if reduce_to > 0 and image.format == "JPEG":
            _reduce(image, reduce_to)
        try:
            image.load()
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, MemoryError, Image.DecompressionBombError) as error:
            raise DataError("truncated or damaged image") from error
        return _grey(image)


def _reduce(image: Image.Image, reduce_to: int) -> None:
    """Has the JPEG decoder scale by 1/2, 1/4 or 1/8, in the frequency domain (libjpeg); in place."""
    scale = next((s for s in (8, 4, 2) if max(image.size) // s >= reduce_to), 1)
    if scale > 1:
        image.draft("L" if image.mode in ("L", "RGB") else image.mode, (image.width // scale, image.height // scale))


def _grey(image: Image.Image) -> Image.Image:
    if image.mode == "L":
        return image
    if image.mode.startswith("I"):
        return _scale_integers(np.asarray(image))
    if image.mode == "F":
        raise DataError("floating-point pixels have no defined scale: export as 8-bit or 16-bit")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    return image.convert("L")


def _scale_integers(values: np.ndarray) -> Image.Image:
    top = int(values.max())
    if int(values.min()) < 0 or top > 65535:
        raise DataError("integer pixels outside 0 ... 65535 have no defined scale: export as 8-bit or 16-bit")
    bits = next(b for b in (8, 10, 12, 14, 16) if top < 1 << b)
    return Image.fromarray(np.rint(values.astype(np.float64) * (255.0 / ((1 << bits) - 1))).astype(np.uint8))


def load(fs: pafs.FileSystem, path: str, max_pixels: int = MAX_PIXELS, reduce_to: int = 0) -> Image.Image:
    """Reads and decodes one file of a pyarrow filesystem; see `decode`.

    Raises:
        DataError: as `decode`, and for a file that is missing or cannot be read.
    """
    for wait in (0.2, 1.0, None):
        try:
            with fs.open_input_stream(path) as stream:
                data = bytes(stream.read())
            break
        except FileNotFoundError as error:
            raise DataError("file is missing") from error
        except OSError as error:
            if isinstance(error, PermissionError | IsADirectoryError) or "is a directory" in str(error):
                raise DataError("file cannot be read: no permission, or a folder") from error
            if wait is None:  # object stores fail now and then
                raise DataError("file cannot be read: input/output error, three times") from error
            time.sleep(wait)
    return decode(data, max_pixels, reduce_to)
