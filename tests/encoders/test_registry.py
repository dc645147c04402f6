"""Encoders by name: built in, by entry point, by module:Class; the page's own example; light imports; the batch size."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_encoders import Projection

from medsae.encoders import encoder_names, find_batch_size, load_encoder, load_preprocess
from medsae.encoders.conformance import check_encoder
from medsae.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "encoders.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's example as an installed package: its module, and the entry point that the page shows."""
    blocks = dict(re.findall(r"```(python|toml)\n(.*?)```", PAGE.read_text().split("## An encoder of your own")[1], re.DOTALL))
    assert len([line for line in blocks["python"].splitlines() if line.strip()]) <= 20
    (tmp_path / "thumbnail.py").write_text(blocks["python"])
    group, entry = re.fullmatch(r'\[project\.entry-points\."(.+)"\]\n(.+)\n', blocks["toml"]).groups()  # type: ignore[union-attr]
    info = tmp_path / "thumbnail-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thumbnail\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "thumbnail", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["thumbnail", "thumbnail:Thumbnail"])
def test_the_page_s_example_runs(name: str, example: Path) -> None:
    assert "thumbnail" in encoder_names()
    encoder = load_encoder(name)
    check_encoder(encoder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8))
    pixels = load_preprocess(name)(image)
    np.testing.assert_array_equal(pixels, encoder.preprocess(image))
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(pixels[None])), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("medclip", "'medclip' is not known; there are medclip-resnet50, medclip-vit, phantom-clip"),
        ("nowhere_at_all:Class", "cannot be imported: No module named 'nowhere_at_all'"),
        ("toy_encoders:Nothing", "cannot be imported: .*has no attribute 'Nothing'"),
        (":Class", "cannot be imported"),
    ],
)
@pytest.mark.parametrize("function", [load_encoder, load_preprocess])
def test_a_name_that_leads_nowhere(function: Any, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        function(name)
    assert "\n" not in str(caught.value)


def test_options_reach_a_plug_in() -> None:
    a, b, c = (load_encoder("toy_encoders:Projection", seed=s) for s in (1, 1, 2))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16), dtype=np.uint8)
    np.testing.assert_array_equal(a.encode(pixels), b.encode(pixels))
    assert np.abs(a.encode(pixels) - c.encode(pixels)).max() > 0


def test_preprocessing_of_medclip_needs_no_torch() -> None:
    program = (
        "import sys; from medsae.encoders import load_preprocess; from PIL import Image;"
        "load_preprocess('medclip-resnet50')(Image.new('L', (300, 200))); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(("dtype", "good"), [("float64", False), ("half", False), ("bfloat16", True)])
def test_dtypes(dtype: str, good: bool) -> None:
    from medsae.encoders.weights import resolve_dtype

    if good:
        assert resolve_dtype(dtype, torch.device("cpu")) is torch.bfloat16
        assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
        assert resolve_dtype("auto", torch.device("cuda")) is torch.bfloat16
    else:
        with pytest.raises(ConfigError, match=f"{dtype!r} is not known"):
            resolve_dtype(dtype, torch.device("cpu"))


class Holds(Projection):
    """Memory for so many images."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.tried = room, list[int]()

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        self.tried.append(len(pixels))
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().encode(pixels)


@pytest.mark.parametrize(
    ("room", "found", "tried"), [(300, 128, [32, 64, 128, 256, 512]), (10**6, 4096, [32 << i for i in range(8)]), (40, 32, [32, 64])]
)
def test_the_batch_grows_until_memory_is_short(room: int, found: int, tried: list[int]) -> None:
    encoder = Holds(room)
    assert find_batch_size(encoder) == found
    assert encoder.tried == tried


def test_a_batch_that_never_fits_is_said() -> None:
    with pytest.raises(ConfigError, match="not even 1 image"):
        find_batch_size(Holds(0))
    assert find_batch_size(Holds(5)) == 4
