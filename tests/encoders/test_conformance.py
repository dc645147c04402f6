"""The conformance check catches every way of being wrong that it promises to catch, and passes what is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_encoders import Broken, Projection

from medsae.encoders.conformance import check_encoder
from medsae.errors import ConfigError


class Texts(Projection):
    """With a text tower."""

    def encode_text(self, texts: list[str]) -> np.ndarray:
        rows = np.stack([np.random.default_rng(len(t)).normal(size=self.dim) for t in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def encoder(**methods: Any) -> Projection:
    """A toy encoder with some of its attributes replaced."""
    return type("Wrong", (Projection,), methods)()


def centred_by_batch(self: Any, pixels: np.ndarray) -> np.ndarray:
    x = Projection.encode(self, pixels)
    return x - x.mean(0)


def depends_on_position(self: Any, pixels: np.ndarray) -> np.ndarray:
    return (Projection.encode(self, pixels) + np.arange(len(pixels))[:, None]).astype(np.float32)


def changes_from_call_to_call(self: Any, pixels: np.ndarray) -> np.ndarray:
    self.calls = getattr(self, "calls", 0) + 1
    return Projection.encode(self, pixels) * np.float32(1 + self.calls)


def standardises_each_image(self: Any, pixels: np.ndarray) -> np.ndarray:
    x = pixels.astype(np.float32)
    with np.errstate(invalid="ignore"):
        x = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
    return np.asarray(x.reshape(len(x), -1) @ self.matrix, np.float32)


def drops_an_image(self: Any, pixels: np.ndarray) -> np.ndarray:
    x = Projection.encode(self, pixels)
    return x if len(x) > 1 else x[:0]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"encode": lambda self, p: Projection.encode(self, p).astype(np.float64)}, r"encodes to float64 \(6, 8\), not float32 \(6, 8\)"),
    "one dimension too few": ({"encode": lambda self, p: Projection.encode(self, p)[:, :-1]}, r"encodes to float32 \(6, 7\), not float32 \(6, 8\)"),
    "flat": ({"encode": lambda self, p: Projection.encode(self, p).ravel()}, r"encodes to float32 \(48,\)"),
    "list": ({"encode": lambda self, p: Projection.encode(self, p).tolist()}, "encodes to list"),
    "infinite": ({"encode": lambda self, p: Projection.encode(self, p) * np.inf}, "not finite$"),
    "blank image": ({"encode": standardises_each_image}, "not finite for an image of one grey value"),
    "constant": ({"encode": lambda self, p: np.ones((len(p), self.dim), np.float32)}, "the same embedding"),
    "depends on batch": ({"encode": centred_by_batch}, "when its batch changes"),
    "depends on position": ({"encode": depends_on_position}, "when its batch changes"),
    "drops an image": ({"encode": drops_an_image}, "another number of embeddings"),
    "not repeatable": ({"encode": changes_from_call_to_call}, "other values for the same images"),
    "float pixels": ({"preprocess": staticmethod(lambda i: np.zeros((16, 16), np.float32))}, r"preprocesses to float32 \(16, 16\), not uint8"),
    "wrong size": ({"preprocess": staticmethod(lambda i: np.asarray(i))}, r"preprocesses to uint8 \(300, 240\), not uint8 \(16, 16\)"),
    "colour": ({"preprocess": staticmethod(lambda i: np.zeros((16, 16, 3), np.uint8))}, "preprocesses to uint8"),
    "image": ({"preprocess": staticmethod(lambda i: i)}, "preprocesses to Image"),
    "info of another width": ({"dim": 8, "info": Broken().info.__class__("x", 9, True, "", None, "", None)}, "EncoderInfo whose `dim`"),
    "info a dict": ({"info": {"dim": 8}}, "EncoderInfo"),
}


@pytest.mark.parametrize("case", list(WRONG))
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_wrong_is_named_in_one_line(case: str) -> None:
    methods, message = WRONG[case]
    with pytest.raises(ConfigError, match=message) as caught:
        check_encoder(encoder(**methods))
    assert "\n" not in str(caught.value)


def test_nan_is_caught() -> None:
    with pytest.raises(ConfigError, match="toy_encoders:Broken' returns values that are not finite"):
        check_encoder(Broken())


def test_missing_attributes_are_named() -> None:
    class Bare:
        name = "bare"
        dim = 3

    with pytest.raises(ConfigError, match="encoder 'bare' has no trained, input_size, info, preprocess, encode"):
        check_encoder(Bare())  # type: ignore[arg-type]


def test_a_right_encoder_passes() -> None:
    check_encoder(Projection())
    check_encoder(Texts(), texts=["a", "bc"])


def test_writing_into_the_pixels_is_caught() -> None:
    def scales_in_place(self: Any, pixels: np.ndarray) -> np.ndarray:
        pixels //= 2
        return Projection.encode(self, pixels)

    with pytest.raises(ValueError, match="read-only"):
        check_encoder(encoder(encode=scales_in_place))


@pytest.mark.parametrize(("dtype", "passes"), [("float32", False), ("torch.bfloat16", True), ("float16", True)])
def test_half_precision_may_differ_a_little_with_the_batch(dtype: str, passes: bool) -> None:
    def rounds(self: Any, pixels: np.ndarray) -> np.ndarray:
        x = Projection.encode(self, pixels)
        return x * np.float32(1.004) if len(pixels) == 1 else x

    subject = encoder(encode=rounds, dtype=dtype)
    if passes:
        check_encoder(subject)
        with pytest.raises(ConfigError, match="batch changes"):
            check_encoder(subject, tolerance=1e-4)
    else:
        with pytest.raises(ConfigError, match="batch changes"):
            check_encoder(subject)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda texts: np.ones((len(texts), 8), np.float32), "unit norm"),
        (lambda texts: np.ones((len(texts), 8)), "texts to float64"),
        (lambda texts: np.ones((1, 8), np.float32), r"texts to float32 \(1, 8\)"),
        (lambda texts: np.full((len(texts), 8), np.nan, np.float32), "unit norm"),
    ],
)
def test_texts_are_checked(result: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_encoder(encoder(encode_text=staticmethod(result)), texts=["a", "b"])


def test_texts_without_a_text_tower() -> None:
    with pytest.raises(ConfigError, match="no encode_text"):
        check_encoder(Projection(), texts=["a"])


def test_every_encoder_sees_the_same_images() -> None:
    seen: list[list[tuple[int, int]]] = []

    def note(image: Image.Image) -> np.ndarray:
        seen[-1].append(image.size)
        return np.asarray(image.resize((16, 16)))

    for _ in range(2):
        seen.append([])
        check_encoder(encoder(preprocess=staticmethod(note)))
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 5
