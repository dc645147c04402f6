"""`hf:` on tiny models of each family, made on the spot, against transformers' own processor and model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from medsae.encoders import TextEncoder, load_encoder, load_preprocess
from medsae.encoders.conformance import check_encoder
from medsae.errors import WeightsError

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VISION: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": 12, "max_position_embeddings": 10, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZE = {"height": 32, "width": 32}


def clip() -> tuple[Any, Any]:
    config = tf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    return tf.CLIPModel(config), tf.CLIPImageProcessor(
        size={"shortest_edge": 36}, crop_size=SIZE, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]
    )


def siglip() -> tuple[Any, Any]:
    return tf.SiglipModel(tf.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=VISION)), tf.SiglipImageProcessor(size=SIZE)


def dinov2() -> tuple[Any, Any]:
    config = tf.Dinov2Config(**{k: v for k, v in VISION.items() if k != "intermediate_size"}, mlp_ratio=2)
    return tf.Dinov2Model(config), tf.BitImageProcessor(size={"shortest_edge": 40}, crop_size=SIZE)


def vit() -> tuple[Any, Any]:
    return tf.ViTModel(tf.ViTConfig(**VISION)), tf.ViTImageProcessor(size=SIZE, resample=Image.Resampling.BILINEAR)


def swin() -> tuple[Any, Any]:
    config = tf.SwinConfig(image_size=32, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[1, 2], window_size=4)
    return tf.SwinModel(config), tf.ViTImageProcessor(size=SIZE, do_normalize=False)


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {f.__name__: f for f in (clip, siglip, dinov2, vit, swin)}


def save(family: str, folder: Path, seed: int = 3) -> tuple[Any, Any]:
    """Saves a model of random weights with its processor (and tokenizer) as the hub has them."""
    torch.manual_seed(seed)
    model, processor = FAMILIES[family]()
    with torch.no_grad():
        for p in model.parameters():  # away from initial zeros and ones, so that every tensor matters
            p.add_(torch.randn_like(p) * 0.05)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    if hasattr(model, "get_text_features"):
        words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", "small", "large", "effusion", "no", "heart", "of", "the"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tf.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", bos_token="<s>"
        ).save_pretrained(folder)
    return model, processor


@pytest.fixture(scope="module", params=list(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, *save(request.param, folder)


def radiographs() -> list[Image.Image]:
    rng = np.random.default_rng(4)
    return [Image.fromarray(rng.integers(0, 256, s, dtype=np.uint8)) for s in ((60, 50), (32, 32), (41, 97), (20, 28))]


def pooled(output: Any) -> torch.Tensor:
    return output if torch.is_tensor(output) else output.pooler_output


def test_embeddings_are_those_of_transformers(saved: tuple[str, Path, Any, Any]) -> None:
    _, folder, model, _ = saved
    encoder = load_encoder(f"hf:{folder}")
    images = radiographs()
    processor = tf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    x = processor(images=[i.convert("RGB") for i in images], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = pooled(model.get_image_features(pixel_values=x) if hasattr(model, "get_image_features") else model(pixel_values=x))
    expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
    pixels = [encoder.preprocess(i) for i in images]
    found = encoder.encode(np.stack(pixels))
    assert np.linalg.norm(expected - expected.mean(0), axis=1).min() > 1e-3
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert encoder.trained
    assert encoder.info.notice is None
    assert encoder.info.weights_sha256 is not None
    function = load_preprocess(f"hf:{folder}")
    for image, array in zip(images, pixels, strict=True):
        np.testing.assert_array_equal(function(image), array)
        np.testing.assert_array_equal(function(image.convert("RGB")), array)


def test_every_family_passes_the_conformance_check(saved: tuple[str, Path, Any, Any]) -> None:
    family, folder, _, _ = saved
    encoder = load_encoder(f"hf:{folder}")
    texts = ["small effusion", "no"] if family in ("clip", "siglip") else []
    assert isinstance(encoder, TextEncoder) == bool(texts)
    check_encoder(encoder, texts=texts)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_texts_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model, _ = save(family, tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    assert isinstance(encoder, TextEncoder)
    texts = ["small effusion </s>", "heart </s>", " ".join(["the"] * 30)]
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    for i, text in enumerate(texts):  # each alone: padding of the others must not matter
        options = {"padding": "max_length"} if family == "siglip" else {}
        tokens = tokenizer([text], truncation=True, max_length=10, return_tensors="pt", **options)
        with torch.inference_mode():
            expected = torch.nn.functional.normalize(pooled(model.get_text_features(input_ids=tokens["input_ids"])), dim=-1).numpy()
        np.testing.assert_allclose(encoder.encode_text(texts)[i : i + 1], expected, atol=2e-6)


def test_untrained_follows_the_seed_and_says_so(tmp_path: Path) -> None:
    save("vit", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    name, pixels = f"hf:{tmp_path}", np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8)
    encoders = [load_encoder(name, "untrained", seed=s) for s in (1, 1, 2)]
    a, b, c = (e.encode(pixels) for e in encoders)
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3
    assert not encoders[0].trained
    assert "UNTRAINED" in str(encoders[0].info.notice)
    with pytest.raises(WeightsError, match="its model cannot be had"):
        load_encoder(name)


def test_a_classifier_s_checkpoint_gives_its_first_token(tmp_path: Path) -> None:
    """Its pooling layer has no weights: the pooled output would be random."""
    torch.manual_seed(0)
    classifier = tf.ViTForImageClassification(tf.ViTConfig(**VISION)).eval()
    classifier.save_pretrained(tmp_path)
    vit()[1].save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    image = radiographs()[0]
    x = tf.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(classifier.vit(x).last_hidden_state[:, 0], dim=-1).numpy()
    np.testing.assert_allclose(encoder.encode(encoder.preprocess(image)[None]), expected, atol=2e-6)


def test_a_vision_tower_saved_with_its_projection_keeps_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**VISION, projection_dim=24)).eval()
    model.save_pretrained(tmp_path)
    clip()[1].save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    assert encoder.dim == 24
    assert not isinstance(encoder, TextEncoder)


def test_a_parameter_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save("dinov2", tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    lost = next(n for n in state if n.endswith("layernorm.weight"))
    save_file({n: t for n, t in state.items() if n != lost}, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=f"1 parameters missing.*{lost}"):
        load_encoder(f"hf:{tmp_path}")


def test_sha256_is_checked(tmp_path: Path) -> None:
    import hashlib

    save("swin", tmp_path)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert load_encoder(f"hf:{tmp_path}", sha256=digest).info.weights_sha256 == digest
    with pytest.raises(WeightsError, match=f"SHA-256 {digest}, expected"):
        load_encoder(f"hf:{tmp_path}", sha256="0" * 64)


def one_line(caught: pytest.ExceptionInfo[WeightsError]) -> bool:
    return "\n" not in str(caught.value)


def test_the_hub_out_of_reach() -> None:
    for function in (load_encoder, load_preprocess):
        with pytest.raises(WeightsError, match=r"hf:nobody/nothing: its .* cannot be had.*copy it here") as caught:
            function("hf:nobody/nothing")
        assert one_line(caught)


def test_a_language_model_has_no_vision_tower(tmp_path: Path) -> None:
    tf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="'bert' model has no vision tower") as caught:
        load_encoder(f"hf:{tmp_path}")
    assert one_line(caught)


def test_a_model_without_a_processor(tmp_path: Path) -> None:
    vit()[0].save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="its image processor cannot be had") as caught:
        load_encoder(f"hf:{tmp_path}")
    assert one_line(caught)


def test_a_processor_without_a_fixed_size(tmp_path: Path) -> None:
    vit()[0].save_pretrained(tmp_path)
    tf.CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="fixed input size"):
        load_encoder(f"hf:{tmp_path}")
