"""The embedded encoder: the file in the package, its towers, and what it knows of unseen phantoms."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from medsae.data.phantom import render, rows
from medsae.encoders import phantom_clip
from medsae.encoders.conformance import check_encoder
from medsae.encoders.phantom_clip import PhantomCLIP, concept_vocabulary, preprocess, zero_shot_prompts
from medsae.encoders.phantom_text import UNKNOWN
from medsae.errors import WeightsError

FILE = phantom_clip.FILES / "phantom_clip.safetensors"


@pytest.fixture(scope="module")
def encoder() -> PhantomCLIP:
    return PhantomCLIP()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "train_phantom_clip.py"
    spec = importlib.util.spec_from_file_location("train_phantom_clip", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_phantom_clip"] = module
    spec.loader.exec_module(module)
    return module


def test_the_file_in_the_package_is_small_and_its_hash_is_recorded(encoder: PhantomCLIP) -> None:
    digest = hashlib.sha256(FILE.read_bytes()).hexdigest()
    assert json.loads((phantom_clip.FILES / "phantom_clip.json").read_text())["sha256"] == digest == encoder.info.weights_sha256
    assert sum(f.stat().st_size for f in phantom_clip.FILES.glob("phantom_clip.*") if f.suffix != ".py") < 4_000_000
    assert encoder.info.trained
    assert "synthetic" in (encoder.info.notice or "")
    assert encoder.info.dim == encoder.dim == 64
    assert "**mean**" in (phantom_clip.FILES / "phantom_clip.md").read_text()


def test_it_is_an_encoder(encoder: PhantomCLIP) -> None:
    check_encoder(encoder, 1e-5)
    pixels = np.random.default_rng(0).integers(0, 256, (5, *encoder.input_size), dtype=np.uint8)
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(pixels), axis=1), 1, atol=1e-5)


def test_texts_are_embedded_one_by_one_as_in_a_batch(encoder: PhantomCLIP) -> None:
    texts = ["no pneumothorax", "there is a large left pleural effusion . female patient", "AP view"]
    together = encoder.encode_text(texts)
    assert together.shape == (3, 64)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, np.concatenate([encoder.encode_text([t]) for t in texts]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert encoder.encode_text([]).shape == (0, 64)
    np.testing.assert_allclose(encoder.encode_text(["ap VIEW!"]), together[2:], atol=1e-6)


def test_unknown_words_share_one_token_and_are_named(encoder: PhantomCLIP) -> None:
    assert encoder.tokenizer("sarcoidosis") == [UNKNOWN]
    assert encoder.tokenizer.unknown("no sarcoidosis seen") == ["sarcoidosis"]
    np.testing.assert_array_equal(encoder.encode_text(["sarcoidosis"]), encoder.encode_text(["scoliosis"]))
    assert np.isfinite(encoder.encode_text(["", "x " * 500])).all()


def test_prompts_and_concepts_use_known_words(encoder: PhantomCLIP) -> None:
    texts = [t for positive, negative in zero_shot_prompts().values() for t in (*positive, *negative)] + concept_vocabulary()
    assert not {w for t in texts for w in encoder.tokenizer.unknown(t)}
    assert len(set(concept_vocabulary())) == len(concept_vocabulary())
    assert encoder.zero_shot_prompts() == zero_shot_prompts()


def test_preprocessing_pads_to_a_black_square() -> None:
    wide = preprocess(Image.new("L", (400, 200), 255))
    assert wide.shape == (192, 192)
    assert wide.dtype == np.uint8
    assert (wide[:44] == 0).all()
    assert (wide[54:138] == 255).all()
    assert (preprocess(Image.new("RGB", (30, 30), (255, 255, 255))) == 255).all()


@pytest.fixture(scope="module")
def unseen(encoder: PhantomCLIP) -> tuple[np.ndarray, list]:
    found = [r for r in rows(345, 555) if r.phantom.capture.view == "frontal"][:300]  # a seed that neither training nor the card has seen
    pixels = np.stack([preprocess(Image.fromarray(render(r.phantom, 224))) for r in found])
    return np.concatenate([encoder.encode(pixels[i : i + 50]) for i in range(0, len(pixels), 50)]), found


def test_zero_shot_on_fresh_phantoms(encoder: PhantomCLIP, unseen: tuple[np.ndarray, list]) -> None:
    x, found = unseen
    scores = {}
    for label, (positive, negative) in zero_shot_prompts().items():
        stated = np.array([r.labels[label] == 1.0 for r in found])
        assert stated.any(), label
        scores[label] = roc_auc_score(stated, x @ (encoder.encode_text(positive).mean(0) - encoder.encode_text(negative).mean(0)))
    assert np.mean(list(scores.values())) >= 0.85, scores
    scores.pop("Fracture")  # not learned, as the model card says
    assert min(scores.values()) > 0.7, scores


def test_the_space_is_superposed(encoder: PhantomCLIP, unseen: tuple[np.ndarray, list]) -> None:
    x, found = unseen
    # No single coordinate carries a finding as well as its direction does: concepts share coordinates.
    label = "Pleural Effusion"
    stated = np.array([r.labels[label] == 1.0 for r in found])
    positive, negative = zero_shot_prompts()[label]
    direction = roc_auc_score(stated, x @ (encoder.encode_text(positive).mean(0) - encoder.encode_text(negative).mean(0)))
    single = max(max(a, 1 - a) for a in (roc_auc_score(stated, x[:, k]) for k in range(x.shape[1])))
    assert single < direction
    assert len(concept_vocabulary()) > 0.6 * encoder.dim


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        PhantomCLIP(weights=str(tmp_path / "no.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    with pytest.raises(WeightsError, match=r"bad\.safetensors") as caught:
        PhantomCLIP(weights=str(tmp_path / "bad.safetensors"))
    assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="SHA-256"):
        PhantomCLIP(sha256="0" * 64)
    (tmp_path / "cut.safetensors").write_bytes(FILE.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"cut\.safetensors"):
        PhantomCLIP(weights=str(tmp_path / "cut.safetensors"))


def test_untrained_weights_follow_the_seed_and_say_so() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 192, 192), dtype=np.uint8)
    state = torch.get_rng_state()
    a, b, c = (PhantomCLIP(weights="untrained", seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(a.encode(pixels), b.encode(pixels))
    assert np.abs(a.encode(pixels) - c.encode(pixels)).max() > 1e-3
    assert not a.info.trained
    assert "UNTRAINED" in (a.info.notice or "")


def test_sentences_agree_with_the_images_they_describe(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    truth = np.stack([script.facts(r.phantom) for r in rows(80, 5)])
    sentences = [script.caption(rng, t) for t in truth]
    agreement = script.agreement(truth, sentences)
    assert (np.diag(agreement) == 1).all()
    assert np.nanmean(agreement) < 0.5
    words = set(script.vocabulary())
    assert {w for s in [*sentences, *(script.statement(rng) for _ in range(500))] for w in s.text.split() if w != "."} <= words


def test_training_is_deterministic_and_goes_on_where_it_was_cut(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collected = script.collection(16, 5, True)
    pixels = np.stack([preprocess(Image.fromarray(render(r.phantom, 96)), script.SIZE) for r in collected])
    truth = np.stack([script.facts(r.phantom) for r in collected])
    plan = {"words": script.vocabulary(), "epochs": 2, "batch": 8, "seed": 3, "verbose": False}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, curve = script.train(pixels, truth, **plan)
        again, _ = script.train(pixels, truth, **plan)
        save = torch.save

        def save_and_stop(*arguments: object, **options: object) -> None:
            save(*arguments, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            script.train(pixels, truth, **plan, checkpoint=tmp_path / "c.pt")
        monkeypatch.setattr(torch, "save", save)
        resumed, resumed_curve = script.train(pixels, truth, **plan, checkpoint=tmp_path / "c.pt")
    finally:
        torch.set_num_threads(threads)
    assert len(curve) == 2
    assert resumed_curve == curve
    for other in (again, resumed):
        for name, value in whole.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
