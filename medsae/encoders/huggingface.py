"""`hf:ID-or-directory`: any vision tower of transformers (CLIP, SigLIP, DINOv2, ViT, Swin, ...) with its own image processor.

The processor runs up to its 8-bit image (on Pillow, its CPU backend); its rescaling and normalisation happen on the device. On greyscale radiographs this is the
processor's own arithmetic: the three channels of its 8-bit image are the same, so one of them travels.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from medsae.artifacts import fingerprint
from medsae.encoders import weights as checkpoints
from medsae.encoders.base import EncoderInfo
from medsae.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    import torch

PREFIX = "hf:"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def find_folder(name: str, with_weights: bool) -> Path:
    """The model's directory: the one that is named, or a snapshot of the hub's (kept in the hub's own cache).

    Raises:
        WeightsError: neither; says what to do.
    """
    source = name.removeprefix(PREFIX)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    files = ["*.json", "*.txt", "*.model"]
    try:
        folder = Path(snapshot_download(source, allow_patterns=files))
        for pattern in ("model*.safetensors", "pytorch_model*.bin") if with_weights else ():
            if not _weight_files(folder):
                folder = Path(snapshot_download(source, allow_patterns=[*files, pattern]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        what = "model" if with_weights else "configuration"
        raise WeightsError(
            f"encoder {name}: its {what} cannot be had ({source!r} is no directory, and the hub gave {type(error).__name__}): fetch the model from the "
            f"hub, copy it here, and set encoder.name={PREFIX}DIRECTORY"
        ) from error
    return folder


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class Preprocess:
    """A model's own image processor up to its 8-bit image: image to uint8 [H, W]. Holds no weights.

    Raises:
        WeightsError: there is no processor, or it makes images of no fixed size or of more than 8 bits.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoImageProcessor

        self.name = name
        folder = find_folder(name, with_weights=False)
        try:
            with _quiet():
                self.processor: Any = AutoImageProcessor.from_pretrained(str(folder), backend="pil")
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise WeightsError(f"encoder {name}: its image processor cannot be had (preprocessor_config.json): {_one_line(error)}") from error
        sizes = {self(Image.new("L", size)).shape for size in ((96, 64), (64, 96), (300, 300))}
        if len(sizes) != 1:
            raise WeightsError(f"encoder {name}: its image processor has no fixed input size (it makes {sorted(sizes)}): set a size or a crop in it")
        self.size: tuple[int, int] = sizes.pop()

    def __call__(self, image: Image.Image) -> np.ndarray:
        colour = image.convert("L").convert("RGB")
        pixels = np.asarray(self.processor(colour, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"])
        if pixels.ndim != 4 or pixels.shape[:2] != (1, 3) or pixels.dtype != np.uint8:
            raise WeightsError(f"encoder {self.name}: its image processor makes {pixels.dtype} {pixels.shape} where 8-bit [1, 3, H, W] is needed")
        return np.ascontiguousarray(pixels[0, 0])

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the pixels, for the fingerprint."""
        known = self.processor.to_dict()
        return {
            k: known[k]
            for k in sorted(known)
            if k.startswith("do_") or k in ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor")
        }

    @property
    def scale(self) -> tuple[list[float], list[float]]:
        """Factor and shift of each channel: input = byte * factor + shift."""
        p = self.processor
        factor = float(p.rescale_factor) if getattr(p, "do_rescale", False) else 1.0
        mean, std = (p.image_mean, p.image_std) if getattr(p, "do_normalize", False) else (0.0, 1.0)
        means, stds = (np.broadcast_to(np.asarray(v, np.float64), 3) for v in (mean, std))
        return (factor / stds).tolist(), (-means / stds).tolist()


@functools.lru_cache(maxsize=4)
def load_preprocess(name: str) -> Callable[[Image.Image], np.ndarray]:
    """The preprocessing of `hf:...` alone; kept, since each decode task asks for it."""
    return Preprocess(name)


class HuggingFace:
    """A vision tower of transformers.

    The embedding, of unit norm, is the projected image feature where the model has one, else the pooler's output, else the first token of the last layer.

    Args:
        name: `hf:` and a hub id or a directory.
        weights: None or `auto` (the model's own), or `untrained`.
        device: torch device.
        seed: of the weights when untrained.
        dtype: `auto`, `float32`, `bfloat16`, `float16`; `auto` is float32 on CPU and bfloat16 on GPU.
        sha256: expected SHA-256 of the weights file.

    Raises:
        ConfigError: weights of a path.
        WeightsError: no vision tower, no usable image processor, weights that cannot be had, are damaged, or leave a parameter at random.
    """

    def __init__(
        self, name: str, weights: str | None = None, device: str = "cpu", seed: int = 0, dtype: str = "auto", sha256: str | None = None
    ) -> None:
        import torch

        if weights not in (None, "auto", "untrained"):
            raise ConfigError(
                f"encoder {name} takes its weights from its own directory: set encoder.name={PREFIX}DIRECTORY, and encoder.weights to auto or untrained"
            )
        self.name, self.trained, self.device = name, weights != "untrained", torch.device(device)
        self.config, self.kind = model_class(name)
        self.folder = find_folder(name, with_weights=self.trained)
        self.preprocess = Preprocess(name)
        self.input_size = self.preprocess.size
        digest = self._digest(sha256) if self.trained else None
        self.dtype = checkpoints.resolve_dtype(dtype, self.device)
        with _quiet():
            model = self._load() if self.trained else self._random(seed)
        self.model = model.eval().to(self.device, self.dtype)
        factor, shift = (torch.tensor(v, dtype=torch.float32, device=self.device)[:, None, None] for v in self.preprocess.scale)
        self._factor, self._shift = factor, shift
        self.joint = hasattr(model, "get_image_features")
        self.dim = self.encode(np.zeros((1, *self.input_size), np.uint8)).shape[1]
        source = "the model's own" if self.trained else f"untrained, seed {seed}"
        self._info = EncoderInfo(
            name=name,
            dim=self.dim,
            trained=self.trained,
            weights=source,
            weights_sha256=digest,
            fingerprint=fingerprint({"name": name, "weights": digest or source, "preprocessing": self.preprocess.settings}),
            notice=None if self.trained else f"UNTRAINED {name} (random weights, seed {seed}): these figures say nothing about this model.",
        )

    def _digest(self, expected: str | None) -> str:
        files = _weight_files(self.folder)
        if not files:
            raise WeightsError(f"encoder {self.name}: its model cannot be had: {self.folder} holds no model.safetensors and no pytorch_model.bin")
        if len(files) == 1:
            return checkpoints.check_sha256(files[0], expected)
        digest = hashlib.sha256("".join(checkpoints.file_sha256(f) for f in files).encode()).hexdigest()
        if expected is not None and digest != expected:
            raise WeightsError(
                f"encoder {self.name}: the {len(files)} weight files together have SHA-256 {digest}, expected {expected} (encoder.sha256)"
            )
        return digest

    def _load(self) -> Any:
        from safetensors import SafetensorError

        try:
            model, found = self.kind.from_pretrained(str(self.folder), output_loading_info=True)
            missing = set(found["missing_keys"])
            if missing and all("pooler." in n for n in missing):  # checkpoints of classifiers have no pooler: the first token is what they use
                model, found = self.kind.from_pretrained(str(self.folder), output_loading_info=True, add_pooling_layer=False)
                missing = set(found["missing_keys"])
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise WeightsError(f"encoder {self.name}: its weights cannot be loaded: {_one_line(error)}") from error
        missing |= {str(n[0] if isinstance(n, tuple) else n) for n in found["mismatched_keys"]}
        if missing:
            names = sorted(missing)
            raise WeightsError(
                f"encoder {self.name}: the checkpoint does not fit: {len(names)} parameters missing ({', '.join(names[:3])}"
                f"{', ...' if len(names) > 3 else ''})"
            )
        return model

    def _random(self, seed: int) -> Any:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.kind._from_config(self.config)

    @property
    def info(self) -> EncoderInfo:
        """What a run records of this encoder."""
        return self._info

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W] to float32 [B, dim], unit norm. Rescaling, normalisation and channel repeat happen on the device."""
        import torch

        with torch.inference_mode():
            grey = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(self.device, non_blocking=True)
            x = (grey[:, None].float() * self._factor + self._shift).to(self.dtype).contiguous(memory_format=torch.channels_last)
            features = self._features(self.model.get_image_features(pixel_values=x) if self.joint else self.model(pixel_values=x)).float()
            result: np.ndarray = torch.nn.functional.normalize(features, dim=-1).cpu().numpy()
        return result

    def _features(self, output: Any) -> torch.Tensor:
        import torch

        if isinstance(output, torch.Tensor):
            return output
        for pooled in (getattr(output, "image_embeds", None), getattr(output, "pooler_output", None)):
            if pooled is not None:
                flat: torch.Tensor = pooled.flatten(1)
                return flat
        first: torch.Tensor = output.last_hidden_state[:, 0]
        return first


class HuggingFaceCLIP(HuggingFace):
    """A model of transformers with an image and a text tower in one space."""

    _tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The model's own tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                with _quiet():
                    self._tokenizer = AutoTokenizer.from_pretrained(str(self.folder))
            except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
                raise WeightsError(f"encoder {self.name}: no tokenizer can be read from {self.folder}: {_one_line(error)}") from error
        return self._tokenizer

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """Texts to float32 [n, dim], unit norm; what is longer than the tower's positions is cut off."""
        import torch

        config = self.model.config
        length = int(config.get_text_config().max_position_embeddings)
        # SigLIP was trained on texts padded to the full length, without a mask
        siglip = str(config.model_type).startswith("siglip")
        padding = "max_length" if siglip else True
        tokens = self.tokenizer(list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            inputs = {k: v.to(self.device) for k, v in tokens.items() if k == "input_ids" or (k == "attention_mask" and not siglip)}
            features = self._features(self.model.get_text_features(**inputs)).float()
            result: np.ndarray = torch.nn.functional.normalize(features, dim=-1).cpu().numpy()
        return result


def model_class(name: str) -> tuple[Any, Any]:
    """The model's configuration and the class of transformers for it.

    Raises:
        WeightsError: transformers does not know it, or it sees no images.
    """
    import transformers

    folder = find_folder(name, with_weights=False)
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder))
        kind = transformers.AutoModel._model_mapping[type(config)]
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"encoder {name}: its config.json is not one that transformers knows: {_one_line(error)}") from error
    for saved in config.architectures or ():
        if saved.endswith("VisionModelWithProjection") and hasattr(transformers, saved):
            kind = getattr(transformers, saved)
    if not hasattr(kind, "get_image_features") and getattr(kind, "main_input_name", "") != "pixel_values":
        raise WeightsError(f"encoder {name}: a {config.model_type!r} model has no vision tower")
    return config, kind


def load(name: str, **options: Any) -> HuggingFace:
    """The encoder of `hf:...`; it has `encode_text` where the model has a text tower."""
    _, kind = model_class(name)
    joint = all(hasattr(kind, method) for method in ("get_image_features", "get_text_features"))
    return (HuggingFaceCLIP if joint else HuggingFace)(name, **options)
