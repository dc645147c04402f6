"""Decoding: every kind of file that is taken, and every kind that is rejected with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medsae.data.radiograph import decode, load
from medsae.encoders.medclip import preprocess
from medsae.errors import DataError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 31), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG with a header of any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_greyscale_png_is_exact() -> None:
    image = decode(encoded(Image.fromarray(GREY)))
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), GREY)


def test_rgb_is_luma_as_pil_does() -> None:
    rgb = Image.fromarray(RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    np.testing.assert_array_equal(np.asarray(decode(encoded(rgb))), np.asarray(rgb.convert("L")))


@pytest.mark.parametrize(
    ("size", "reduce_to", "expected"), [((1600, 1200), 448, (800, 600)), ((1800, 1440), 448, (450, 360)), ((800, 640), 448, (800, 640))]
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_jpeg_decoder_scales_down_when_asked(mode: str, size: tuple[int, int], reduce_to: int, expected: tuple[int, int]) -> None:
    smooth = Image.fromarray(RNG.integers(0, 256, (9, 12), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC).convert(mode)
    whole, reduced = decode(encoded(smooth, "JPEG", quality=95)), decode(encoded(smooth, "JPEG", quality=95), reduce_to=reduce_to)
    assert (whole.size, reduced.size, reduced.mode) == (size, expected, "L")
    difference = np.abs(np.subtract(*(preprocess(image).astype(int) for image in (whole, reduced))))
    assert difference.mean() < 0.5, difference.mean()
    assert np.percentile(difference, 99) <= 2
    np.testing.assert_array_equal(np.asarray(decode(encoded(smooth), reduce_to=reduce_to)), np.asarray(decode(encoded(smooth))), "PNG is not touched")


def test_transparent_pixels_are_black() -> None:
    rgba = np.full((4, 4, 4), 200, np.uint8)
    rgba[:2, :, 3] = 0
    rgba[2:, :, 3] = 255
    grey = np.asarray(decode(encoded(Image.fromarray(rgba))))
    assert (grey[:2] == 0).all()
    assert (grey[2:] == 200).all()


def test_palette_takes_the_colours_not_the_indices() -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    image.putpalette([10, 10, 10, 240, 240, 240])
    np.testing.assert_array_equal(np.asarray(decode(encoded(image))), [[10, 240], [240, 10]])


def test_palette_with_transparency() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([90, 90, 90, 200, 200, 200])
    np.testing.assert_array_equal(np.asarray(decode(encoded(image, transparency=0))), [[0, 200]])


def test_one_bit_image() -> None:
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    np.testing.assert_array_equal(np.asarray(decode(encoded(image))), [[0, 255]])


@pytest.mark.parametrize(("top", "bits"), [(255, 8), (1023, 10), (4095, 12), (16383, 14), (65535, 16), (3000, 12), (40000, 16)])
def test_sixteen_bit_png_is_scaled_by_its_bit_depth(top: int, bits: int) -> None:
    values = np.linspace(0, top, 300).astype(np.uint16).reshape(15, 20)
    grey = np.asarray(decode(encoded(Image.fromarray(values))))
    np.testing.assert_array_equal(grey, np.rint(values * (255 / (2**bits - 1))).astype(np.uint8))


@given(st.integers(1, 65535), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_sixteen_bit_order_is_kept(top: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, top + 1, 64).astype(np.uint16).reshape(8, 8)
    grey = np.asarray(decode(encoded(Image.fromarray(values)))).astype(int).ravel()
    order = np.argsort(values.ravel(), kind="stable")
    assert (np.diff(grey[order]) >= 0).all()


def test_cmyk_jpeg() -> None:
    assert decode(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).mode == "L"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "PPM"])
def test_formats(kind: str) -> None:
    image = decode(encoded(Image.fromarray(GREY), kind))
    assert (image.mode, image.size) == ("L", (31, 20))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image at all", "not an image"),
        (b"%PDF-1.4 nothing", "not an image"),
        (b"\0" * 128 + b"DICM" + b"\0" * 64, "DICOM"),
        (encoded(Image.fromarray(GREY), "JPEG")[:200], "truncated"),
        (encoded(Image.fromarray(GREY))[:-30], "truncated"),
        (encoded(Image.fromarray(GREY))[:45], "truncated"),
        (png(60_000, 60_000), "too many pixels"),
        (png(12_000, 12_000), "too many pixels"),
        (png(500, 500, b"\0"), "truncated"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), -5, np.int32)), "TIFF"), "outside 0"),
    ],
)
def test_rejected_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_several_frames_are_rejected() -> None:
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    with pytest.raises(DataError, match="2 frames"):
        decode(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]))


def test_pixel_limit_is_checked_before_decoding() -> None:
    with pytest.raises(DataError, match="31 x 20, the limit is 619"):
        decode(encoded(Image.fromarray(GREY)), max_pixels=619)
    decode(encoded(Image.fromarray(GREY)), max_pixels=620)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_an_image_or_a_reason(data: bytes) -> None:
    with pytest.raises(DataError):
        decode(data)


@given(st.integers(0, 10_000), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_a_flipped_byte_gives_an_image_or_a_reason(position: int, value: int) -> None:
    data = bytearray(encoded(Image.fromarray(GREY)))
    data[position % len(data)] = value
    try:
        assert decode(bytes(data)).mode == "L"
    except DataError as error:
        assert "\n" not in str(error)


def test_load_from_a_filesystem(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(GREY)))
    fs = pafs.LocalFileSystem()
    np.testing.assert_array_equal(np.asarray(load(fs, str(tmp_path / "a.png"))), GREY)
    with pytest.raises(DataError, match="missing"):
        load(fs, str(tmp_path / "b.png"))
    with pytest.raises(DataError):
        load(fs, str(tmp_path))
