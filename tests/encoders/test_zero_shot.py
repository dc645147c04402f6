"""Zero-shot scores on texts and images whose similarities are known; prompts of the installed package."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from toy_encoders import Projection

from medsae.encoders import load_encoder, medclip, zero_shot
from medsae.errors import ConfigError


class Hashed(Projection):
    """Texts embed to a direction drawn from their hash."""

    calls = 0

    def encode_text(self, texts: list[str]) -> np.ndarray:
        self.calls += len(texts)
        seeds = [int.from_bytes(hashlib.sha256(t.encode()).digest()[:4], "big") for t in texts]
        rows = np.stack([np.random.default_rng(s).normal(size=self.dim) for s in seeds])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_scores_are_mean_cosine_for_minus_against() -> None:
    encoder = Hashed()
    prompts = {"A": (["a", "aa"], ["b"]), "B": (["b"], ["a", "c", "dd"]), "alone": (["aa"], [])}
    images = np.random.default_rng(0).normal(size=(7, encoder.dim)).astype(np.float32) * 5
    found = zero_shot.zero_shot_scores(encoder, images, prompts)
    for j, (positive, negative) in enumerate(prompts.values()):
        for i, image in enumerate(images):
            cosines = [
                [float(image @ t / np.linalg.norm(image)) for t in encoder.encode_text(side)] if side else [0.0] for side in (positive, negative)
            ]
            assert found[i, j] == pytest.approx(np.mean(cosines[0]) - np.mean(cosines[1]), abs=1e-6)


def test_each_text_is_encoded_once_whatever_the_batch() -> None:
    prompts = {str(k): ([f"{i}" for i in range(k, k + 9)], [f"{i}" for i in range(20)]) for k in range(6)}
    axes = []
    for batch in (1, 4, 64):
        encoder = Hashed()
        axes.append(zero_shot.prompt_axes(encoder, prompts, batch))
        assert encoder.calls == 20
    np.testing.assert_allclose(axes[0], axes[1], atol=1e-6)
    np.testing.assert_allclose(axes[0], axes[2], atol=1e-6)


def test_the_package_s_prompts_of_five_labels() -> None:
    prompts = zero_shot.medclip_prompts()
    constants = medclip.package().constants
    assert sorted(prompts) == sorted(constants.CHEXPERT_COMPETITION_TASKS)
    for label, (positive, negative) in prompts.items():
        parts = constants.CHEXPERT_CLASS_PROMPTS[label].values()
        assert len(positive) == int(np.prod([len(p) for p in parts])), "all combinations, none drawn at random"
        assert all(any(word in text for text in positive) for part in parts for word in part)
        assert sorted(negative) == sorted(t for other in prompts if other != label for t in prompts[other][0])


def test_printing_of_the_package_is_kept_away(capsys: pytest.CaptureFixture[str]) -> None:
    zero_shot.medclip_prompts()
    assert capsys.readouterr().out == ""


def test_whose_prompts() -> None:
    phantom: Any = load_encoder("phantom-clip", "untrained")
    assert zero_shot.prompts_for(phantom) == phantom.zero_shot_prompts()
    assert zero_shot.prompts_for(Projection()) == {}
    assert sorted(zero_shot.prompts_for(Hashed())) == sorted(zero_shot.medclip_prompts())
    untrained = Hashed()
    untrained.trained = False
    assert zero_shot.prompts_for(untrained) == {}
    assert zero_shot.zero_shot_scores(untrained, np.ones((3, 8), np.float32)).shape == (3, 0)


def test_what_cannot_be_scored_is_said() -> None:
    with pytest.raises(ConfigError, match="no text tower"):
        zero_shot.zero_shot_scores(Projection(), np.ones((1, 8), np.float32))
    with pytest.raises(ConfigError, match="'A' has no texts"):
        zero_shot.prompt_axes(Hashed(), {"A": ([], ["b"])})
