"""Writes fixtures/*.npz: what MedCLIP's original stack gives for the tensors, images and texts of `reference_rule.py`.

In an environment of its own, never in the project's:

    python3.11 -m venv ENV
    ENV/bin/pip install "transformers==4.24.0" "numpy<2" "torch==2.13.0" nltk scikit-learn pandas "pillow<12" requests
    ENV/bin/pip install --no-deps "medclip==0.0.3" "torchvision==0.28.0" ./requirements/torchvision-ops
    ENV/bin/python tests/encoders/make_reference.py

The package is imported as it is. Only the constructors' downloads (ImageNet, Swin and Bio_ClinicalBERT weights, all of which a MedCLIP checkpoint overwrites) are
replaced by configurations. Embeddings are computed twice, in float32 (what the original gives) and in float64 (to tell rounding from error).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import medclip
import numpy as np
import PIL
import reference_rule as rule
import torch
import torchvision
import transformers
from medclip import constants, modeling_medclip
from medclip.dataset import MedCLIPFeatureExtractor

FIXTURES = Path(__file__).parent / "fixtures"


class Configured:
    """Stands where the package calls `AutoModel`."""

    @staticmethod
    def from_pretrained(kind, **options):
        if kind == constants.VIT_TYPE:
            return transformers.SwinModel(transformers.SwinConfig())
        return transformers.BertModel(transformers.BertConfig(vocab_size=28996, **options))


class Nothing:
    """Stands where the package loads a tokenizer that it does not use."""

    @staticmethod
    def from_pretrained(kind):
        return None


class Offline:
    """Stands for torchvision in the package: a ResNet-50 without a download."""

    class models:
        @staticmethod
        def resnet50(pretrained=False):
            return torchvision.models.resnet50(weights=None)


def unit(x):
    return (x / x.norm(dim=-1, keepdim=True)).numpy()


def main():
    modeling_medclip.AutoModel, modeling_medclip.AutoTokenizer, modeling_medclip.torchvision = Configured, Nothing, Offline
    extractor = MedCLIPFeatureExtractor()
    images = {name: rule.image(name) for name in rule.SIZES}
    bytes_of = {}
    for name, image in images.items():
        square = extractor.resize(image=extractor.pad_img(image, min_size=extractor.size), size=extractor.size, resample=extractor.resample)
        bytes_of[name] = np.asarray(extractor.center_crop(square, extractor.crop_size))
    ramp = transformers.image_utils.ImageFeatureExtractionMixin().to_pil_image(np.tile(np.arange(256, dtype=np.uint8), (256, 1)))
    table = extractor.normalize(image=ramp, mean=extractor.image_mean, std=extractor.image_std)
    pixels = torch.tensor(np.stack(extractor([images[n] for n in images])["pixel_values"]))

    with tempfile.TemporaryDirectory() as folder:
        rule.write_tokenizer(Path(folder))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.model_max_length = 77
        tokens = tokenizer(rule.TEXTS, truncation=True, padding=True, return_tensors="pt")

    for variant, vision in (("medclip-resnet50", medclip.MedCLIPVisionModel), ("medclip-vit", medclip.MedCLIPVisionModelViT)):
        model = medclip.MedCLIPModel(vision_cls=vision).eval()
        state = model.state_dict()
        filled = {n: torch.from_numpy(rule.fill(n, tuple(t.shape))) if t.is_floating_point() else t for n, t in state.items()}
        model.load_state_dict(filled, strict=True)
        out = {
            "preprocessed_sha256": np.array([hashlib.sha256(bytes_of[n].tobytes()).hexdigest() for n in images]),
            "normalised": np.asarray(table).reshape(-1, 256)[0],
            "input_ids": tokens["input_ids"].numpy(),
            "attention_mask": tokens["attention_mask"].numpy(),
            "tensors": np.array(json.dumps({n: [list(t.shape), str(t.dtype).split(".")[-1]] for n, t in state.items()})),
            "made_with": np.array(
                json.dumps({m.__name__: m.__version__ for m in (torch, torchvision, transformers, np, PIL)} | {"medclip": "0.0.3"})
            ),
        }
        with torch.no_grad():
            for suffix, precise in (("", model), ("_float64", model)):
                x = pixels.double() if suffix else pixels
                model.double() if suffix else model.float()
                out["image" + suffix] = unit(precise.vision_model(pixel_values=x))
                out["text" + suffix] = unit(precise.text_model(tokens["input_ids"], tokens["attention_mask"]))
        np.savez_compressed(FIXTURES / f"{variant}.npz", **out)
        for tower in ("image", "text"):
            gap = np.linalg.norm(out[tower] - out[tower + "_float64"], axis=1).max()
            spread = np.linalg.norm(out[tower] - out[tower].mean(0), axis=1).mean()
            print(variant, tower, out[tower].shape, f"float32 to float64 {gap:.1e}, spread between inputs {spread:.2f}")


if __name__ == "__main__":
    main()
