"""MedCLIP (Wang et al., EMNLP 2022, arXiv 2210.10163) through the `medclip` package's own model classes.

The package is used as it is installed. Its `__init__` does not import on transformers 5, so its modelling module is imported under a bare package module; its
constructors download ImageNet, Swin and Bio_ClinicalBERT weights that every MedCLIP checkpoint overwrites, so they are given configurations instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from medsae.artifacts import fingerprint
from medsae.encoders import weights as checkpoints
from medsae.encoders.base import EncoderInfo
from medsae.errors import WeightsError

if TYPE_CHECKING:
    import torch

SIZE = 224
MEAN, STD = 0.5862785803043838, 0.27950088968644304
"""Of one grey channel in [0, 1]; the package's constants, checked against it by a test."""

VARIANTS = {"medclip-resnet50": "MedCLIPVisionModel", "medclip-vit": "MedCLIPVisionModelViT"}
BUFFERS = ("position_ids", "relative_position_index", "num_batches_tracked")
PREPROCESSING = "pad-square-black/bicubic-224/L8/v1"

_SWIN_NAMES = [
    (r"\.attention\.self\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}_proj."),
    (r"\.attention\.self\.relative_position_bias_table$", lambda m: ".attention.relative_position_bias.relative_position_bias_table"),
    (r"\.attention\.self\.relative_position_index$", lambda m: ".attention.relative_position_bias.relative_position_index"),
    (r"\.attention\.output\.dense\.", lambda m: ".attention.o_proj."),
    (r"(blocks\.\d+)\.intermediate\.dense\.", lambda m: f"{m[1]}.mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", lambda m: f"{m[1]}.mlp.fc2."),
]
"""Parameter names of Swin in transformers 4 to those of transformers 5."""

_lock = threading.Lock()


def preprocess(image: Image.Image) -> np.ndarray:
    """MedCLIP's own preprocessing up to the 8-bit image: centred on a black square, bicubic to 224 x 224. uint8 [224, 224]."""
    width, height = image.size
    side = max(SIZE, width, height)
    if (width, height) != (side, side):
        square = Image.new("L", (side, side), 0)
        square.paste(image.convert("L"), ((side - width) // 2, (side - height) // 2))
        image = square
    return np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def package() -> types.ModuleType:
    """The `medclip` package's modelling module, without running the package's `__init__`."""
    if "medclip" not in sys.modules:
        spec = importlib.util.find_spec("medclip")
        if spec is None or not spec.submodule_search_locations:
            raise WeightsError("package medclip is not installed: pip install medclip==0.0.3")
        bare = types.ModuleType("medclip")
        bare.__path__ = list(spec.submodule_search_locations)
        bare.__spec__ = spec
        sys.modules["medclip"] = bare
    return importlib.import_module("medclip.modeling_medclip")


@contextmanager
def _constructors_from_configs(modelling: types.ModuleType) -> Iterator[None]:
    """Within it, the package's constructors build from configurations and fetch nothing."""
    import torchvision
    from transformers import BertConfig, BertModel, SwinConfig, SwinModel

    def auto_model(kind: str, **options: Any) -> torch.nn.Module:
        # microsoft/swin-tiny-patch4-window7-224 is SwinConfig's default; Bio_ClinicalBERT is BERT base with a vocabulary of 28,996 words (cased)
        if kind == modelling.constants.VIT_TYPE:
            return SwinModel(SwinConfig())
        return BertModel(BertConfig(vocab_size=28_996, **options))

    class Nothing:
        @staticmethod
        def from_pretrained(kind: str, **options: Any) -> Any:
            return None

    class Configured:
        from_pretrained = staticmethod(auto_model)

    resnet = types.SimpleNamespace(models=types.SimpleNamespace(resnet50=lambda pretrained=True: torchvision.models.resnet50(weights=None)))
    before = {name: getattr(modelling, name) for name in ("AutoModel", "AutoTokenizer", "torchvision")}
    with _lock:
        try:
            modelling.AutoModel, modelling.AutoTokenizer, modelling.torchvision = Configured, Nothing, resnet  # type: ignore[attr-defined]
            yield
        finally:
            for name, value in before.items():
                setattr(modelling, name, value)


def build(name: str, seed: int) -> torch.nn.Module:
    """The package's MedCLIPModel of one variant with random weights, the same for the same seed."""
    import torch

    modelling = package()
    with torch.random.fork_rng(devices=[]), _constructors_from_configs(modelling):
        torch.manual_seed(seed)
        model: torch.nn.Module = modelling.MedCLIPModel(vision_cls=getattr(modelling, VARIANTS[name]))
    return model.eval()


def rename_swin(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A MedCLIP-ViT state dict with transformers 5's names of the Swin tower; names that are new already stay."""
    renamed = {}
    for name, tensor in state.items():
        new = name
        if name.startswith("vision_model."):
            for pattern, replace in _SWIN_NAMES:
                new = re.sub(pattern, replace, new)
        renamed[new] = tensor
    return renamed


def load_checkpoint(model: torch.nn.Module, name: str, state: dict[str, torch.Tensor]) -> None:
    """Every parameter from the checkpoint, or an error that names what does not fit."""
    swin = any(".embeddings.patch_embeddings." in n for n in state)
    resnet = any(n.startswith("vision_model.model.conv1") for n in state)
    if (name == "medclip-vit" and resnet) or (name == "medclip-resnet50" and swin):
        other = "medclip-resnet50" if resnet else "medclip-vit"
        raise WeightsError(f"{name}: the checkpoint is of the other variant: set encoder.name={other}, or encoder.weights to a {name} checkpoint")
    checkpoints.load_strictly(model, rename_swin(state), BUFFERS, name)


class MedCLIP:
    """A MedCLIP encoder: image and text tower in one space of 512 dimensions, unit norm.

    Args:
        name: `medclip-resnet50` or `medclip-vit`.
        weights: a path (archive, directory or `pytorch_model.bin`), `auto` (the default: download of the official checkpoint) or `untrained`.
        device: torch device.
        seed: of the weights when untrained.
        dtype: `auto`, `float32`, `bfloat16`, `float16`; `auto` is float32 on CPU and bfloat16 on GPU.
        sha256: expected SHA-256 of the weights file.

    Raises:
        WeightsError: weights that are missing, damaged, unsafe or do not fit.
    """

    dim = 512
    input_size = (SIZE, SIZE)

    def __init__(
        self, name: str, weights: str | None = None, device: str = "cpu", seed: int = 0, dtype: str = "auto", sha256: str | None = None
    ) -> None:
        import torch

        self.name, self.device = name, torch.device(device)
        self.dtype = checkpoints.resolve_dtype(dtype, self.device)
        self.trained = weights != "untrained"
        self._tokenizer: Any = None
        self._tokenizer_folders = [checkpoints.cache_folder() / "bio_clinicalbert"]
        digest, source, state = None, f"untrained, seed {seed}", None
        if self.trained:  # the file is read before the model is built: what is wrong with it shows at once
            path = self._find(weights)
            self._tokenizer_folders.insert(0, path.parent)
            digest, source = checkpoints.check_sha256(path, sha256), "official checkpoint" if weights in (None, "auto") else path.name
            state = checkpoints.read_state_dict(path)
        model = build(name, seed)
        if state is not None:
            load_checkpoint(model, name, state)
            del state
        self.model = model
        vision: Any = model.vision_model
        self.vision = vision.to(self.device, self.dtype).to(memory_format=torch.channels_last)
        # The text tower (433 MB) stays where it is, in float32, until a text is asked for: most work is on images.
        self._info = EncoderInfo(
            name=name,
            dim=self.dim,
            trained=self.trained,
            weights=source,
            weights_sha256=digest,
            fingerprint=fingerprint({"name": name, "weights": digest or source, "preprocessing": PREPROCESSING}),
            notice=None if self.trained else f"UNTRAINED {name} (random weights, seed {seed}): these figures say nothing about MedCLIP.",
        )

    def _find(self, weights: str | None) -> Any:
        if weights not in (None, "auto"):
            return checkpoints.find(str(weights))
        constants = package().constants
        pointer = constants.PRETRAINED_URL_MEDCLIP_RESNET if self.name == "medclip-resnet50" else constants.PRETRAINED_URL_MEDCLIP_VIT
        return checkpoints.download(pointer, checkpoints.cache_folder() / self.name, self.name)

    @property
    def info(self) -> EncoderInfo:
        return self._info

    preprocess = staticmethod(preprocess)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, 224, 224] to float32 [B, 512], unit norm. Bytes travel to the device; normalisation and channel repeat happen there."""
        import torch

        with torch.inference_mode():
            grey = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(self.device, non_blocking=True)
            x = grey[:, None].float().div_(255).sub_(MEAN).div_(STD).to(self.dtype).expand(-1, 3, -1, -1)
            features = self.vision(x.contiguous(memory_format=torch.channels_last)).float()
            result: np.ndarray = torch.nn.functional.normalize(features, dim=-1).cpu().numpy()
        return result

    def encode_tokens(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Token ids and mask, int64 [n, length], to float32 [n, 512], unit norm."""
        import torch

        with torch.inference_mode():
            ids, mask = (torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)).to(self.device) for a in (input_ids, attention_mask))
            tower: Any = self.model.text_model
            text = tower.to(self.device)
            features = text(ids, mask).float()
            result: np.ndarray = torch.nn.functional.normalize(features, dim=-1).cpu().numpy()
        return result

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """Texts to float32 [n, 512], unit norm, with Bio_ClinicalBERT's tokenizer (beside the checkpoint, in the cache, or from the hub).

        Raises:
            WeightsError: the tokenizer cannot be had; says where to put it.
        """
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=77, return_tensors="np")
        return self.encode_tokens(tokens["input_ids"], tokens["attention_mask"])

    @property
    def tokenizer(self) -> Any:
        """Bio_ClinicalBERT's tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            local = self._tokenizer_folders[-1]
            source = next((str(f) for f in self._tokenizer_folders if (f / "vocab.txt").is_file()), package().constants.BERT_TYPE)
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(source)
            except (OSError, ValueError) as error:
                raise WeightsError(
                    f"the text tower needs the tokenizer of {package().constants.BERT_TYPE}, which cannot be had: put its vocab.txt and "
                    f"config.json into {local} or beside the checkpoint"
                ) from error
        return self._tokenizer
