"""MedCLIP against its original stack (transformers 4.24, medclip 0.0.3): `make_reference.py` wrote what it gives for the tensors of `reference_rule.py`."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medsae.data import radiograph
from medsae.encoders import load_preprocess, medclip

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("reference_rule", HERE / "reference_rule.py")
assert spec is not None
assert spec.loader is not None
rule = importlib.util.module_from_spec(spec)
sys.modules["reference_rule"] = rule
spec.loader.exec_module(rule)

BOUND = 1e-5
"""Largest difference of an embedding relative to its norm (which is 1)."""


def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(HERE / "fixtures" / f"{name}.npz") as file:
        return {k: file[k] for k in file.files}


@pytest.fixture(scope="module", params=list(medclip.VARIANTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
    """An encoder loaded from a checkpoint with transformers 4's names, whole, and the reference."""
    expected = reference(request.param)
    state = {}
    for name, (shape, kind) in json.loads(str(expected["tensors"])).items():
        empty = torch.zeros(shape, dtype=getattr(torch, kind))
        state[name] = torch.from_numpy(rule.fill(name, tuple(shape))) if empty.is_floating_point() else empty
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.save(state, folder / "pytorch_model.bin")
    del state
    rule.write_tokenizer(folder if request.param == "medclip-vit" else folder / "bio_clinicalbert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSAE_CACHE", str(folder))  # the tokenizer is found beside the checkpoint, or in the cache
        yield medclip.MedCLIP(request.param, str(folder)), expected
    (folder / "pytorch_model.bin").unlink()


def as_it_is(image: Image.Image) -> Image.Image:
    return image


def through_a_file(image: Image.Image) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "PNG")
    return radiograph.decode(data.getvalue())


@pytest.mark.parametrize("name", list(medclip.VARIANTS))
@pytest.mark.parametrize("route", [as_it_is, through_a_file])
def test_preprocessing_is_equal_to_the_last_bit(name: str, route: Callable[[Image.Image], Image.Image]) -> None:
    preprocess = load_preprocess(name)
    found = {n: hashlib.sha256(preprocess(route(rule.image(n))).tobytes()).hexdigest() for n in rule.SIZES}
    assert found == dict(zip(rule.SIZES, reference(name)["preprocessed_sha256"].tolist(), strict=True))


def test_normalisation_of_every_byte() -> None:
    ours = torch.arange(256, dtype=torch.uint8).float().div_(255).sub_(medclip.MEAN).div_(medclip.STD).numpy()
    np.testing.assert_allclose(ours, reference("medclip-vit")["normalised"], rtol=1e-6, atol=3e-7)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


def test_image_embeddings(pair: Any) -> None:
    encoder, expected = pair
    found = encoder.encode(np.stack([encoder.preprocess(rule.image(n)) for n in rule.SIZES]))
    spread = np.linalg.norm(expected["image"] - expected["image"].mean(0), axis=1).min()
    assert spread > 1000 * BOUND, "the reference tells the images apart"
    assert distance(found, expected["image"]) < BOUND
    assert distance(found, expected["image_float64"]) < BOUND


def test_tokens_and_text_embeddings(pair: Any) -> None:
    encoder, expected = pair
    tokens = encoder.tokenizer(rule.TEXTS, padding=True, truncation=True, max_length=77, return_tensors="np")
    np.testing.assert_array_equal(tokens["input_ids"], expected["input_ids"])
    np.testing.assert_array_equal(tokens["attention_mask"], expected["attention_mask"])
    for found in (encoder.encode_tokens(expected["input_ids"], expected["attention_mask"]), encoder.encode_text(rule.TEXTS)):
        assert distance(found, expected["text"]) < BOUND
        assert distance(found, expected["text_float64"]) < BOUND


def test_half_precision_keeps_the_direction(pair: Any) -> None:
    encoder, expected = pair
    pixels = np.stack([encoder.preprocess(rule.image(n)) for n in list(rule.SIZES)[:4]])
    before = encoder.dtype, {n: t.clone() for n, t in encoder.vision.state_dict().items()}
    try:
        encoder.dtype = torch.bfloat16
        encoder.vision.to(encoder.dtype)
        cosine = float((encoder.encode(pixels) * expected["image"][:4]).sum(1).min())
    finally:
        encoder.dtype = before[0]
        encoder.vision.float().load_state_dict(before[1])
    assert cosine > 0.9999
