"""MedCLIP: strict loading of every form of checkpoint, refusal of every bad one, and an untouched package."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medsae.encoders import load_preprocess, medclip, weights
from medsae.encoders.conformance import check_encoder
from medsae.errors import WeightsError

NAMES = list(medclip.VARIANTS)
pytestmark = pytest.mark.usefixtures("small_text_tower")

TO_TRANSFORMERS_4 = (
    ("attention.q_proj.", "attention.self.query."),
    ("attention.k_proj.", "attention.self.key."),
    ("attention.v_proj.", "attention.self.value."),
    ("attention.o_proj.", "attention.output.dense."),
    ("attention.relative_position_bias.relative_position_bias_table", "attention.self.relative_position_bias_table"),
    ("attention.relative_position_bias.relative_position_index", "attention.self.relative_position_index"),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as transformers 4 would have saved it."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("vision_model.model.encoder."):
            for new, old in TO_TRANSFORMERS_4:
                name = name.replace(new, old)
        renamed[name] = tensor
    renamed["text_model.model.embeddings.position_ids"] = torch.arange(512)[None]  # a buffer that transformers 4 saved
    return renamed


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    """Both variants with weights of seed 5."""
    return {name: medclip.build(name, seed=5) for name in NAMES}


@pytest.fixture(scope="module")
def checkpoints(models: dict[str, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A `pytorch_model.bin` of each variant, as the official ones are."""
    files = {}
    for name in NAMES:
        files[name] = tmp_path_factory.mktemp(name) / weights.WEIGHTS_NAME
        torch.save(old_names(models[name].state_dict()), files[name])
    return files


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 224, 224), dtype=np.uint8)


def as_form(form: str, checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as the official archive, an archive that holds a folder, a directory with the file, or a directory with the archive."""
    if form == "file":
        return checkpoint
    if form == "directory":
        (folder / weights.WEIGHTS_NAME).hardlink_to(checkpoint)
        return folder
    archive = folder / ("download.zip" if form != "archive with a folder" else "unpacked.zip")
    with zipfile.ZipFile(archive, "w") as sink:
        sink.write(checkpoint, f"pretrained/{weights.WEIGHTS_NAME}" if form == "archive with a folder" else weights.WEIGHTS_NAME)
        sink.writestr("config.json", "{}")
    return folder if form == "directory with archive" else archive


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


FORMS = ["file", "archive", "archive with a folder", "directory", "directory with archive"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_checkpoint_is_read(form: str, tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}
    (tmp_path / "made").mkdir()
    torch.save(state, tmp_path / "made" / weights.WEIGHTS_NAME)
    read = weights.read_state_dict(weights.find(str(as_form(form, tmp_path / "made" / weights.WEIGHTS_NAME, tmp_path))))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[n], state[n]) for n in state)


@pytest.mark.parametrize(("name", "form"), [("medclip-resnet50", "archive"), ("medclip-vit", "file")])
def test_a_checkpoint_gives_every_parameter(
    name: str, form: str, models: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path, pixels: np.ndarray
) -> None:
    path = as_form(form, checkpoints[name], tmp_path)
    encoder = medclip.MedCLIP(name, str(path), seed=1)
    assert same(encoder.model, models[name])
    assert encoder.trained
    assert encoder.info.notice is None
    holder = path if path.is_file() else weights.find(str(path))
    assert encoder.info.weights_sha256 == hashlib.sha256(holder.read_bytes()).hexdigest()
    with torch.inference_mode():
        x = ((torch.from_numpy(pixels)[:, None].double() / 255 - medclip.MEAN) / medclip.STD).float()
        expected = models[name].encode_image(x.repeat(1, 3, 1, 1)).numpy()
    np.testing.assert_allclose(encoder.encode(pixels), expected, atol=1e-6)
    ids, mask = np.array([[2, 7, 9, 3], [2, 5, 3, 0]]), np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.inference_mode():
        text = models[name].text_model(torch.from_numpy(ids), torch.from_numpy(mask))
    np.testing.assert_allclose(encoder.encode_tokens(ids, mask), torch.nn.functional.normalize(text, dim=-1).numpy(), atol=1e-6)


def test_names_of_transformers_5_load_too(models: dict[str, Any]) -> None:
    model = medclip.build("medclip-vit", seed=1)
    medclip.load_checkpoint(model, "medclip-vit", models["medclip-vit"].state_dict())
    assert same(model, models["medclip-vit"])


@pytest.mark.parametrize("name", NAMES)
def test_the_other_variant_is_refused(name: str, checkpoints: dict[str, Path]) -> None:
    other = next(n for n in NAMES if n != name)
    with pytest.raises(WeightsError, match=f"other variant: set encoder.name={other}"):
        medclip.MedCLIP(name, str(checkpoints[other]))


@pytest.mark.parametrize("name", NAMES)
def test_every_single_parameter_is_needed(name: str, models: dict[str, Any]) -> None:
    """Taking away any one tensor is noticed and named; only the known buffers may be absent."""
    model, state = models[name], models[name].state_dict()
    parameters = [n for n, _ in model.named_parameters()] + [n for n, _ in model.named_buffers() if n.endswith(("running_mean", "running_var"))]
    for lost in [n for i, n in enumerate(parameters) if i % 7 == 0 or "projection" in n or "relative" in n]:
        with pytest.raises(WeightsError, match=f"1 missing \\({re.escape(lost)}\\)"):
            medclip.load_checkpoint(model, name, {n: t for n, t in state.items() if n != lost})
    medclip.load_checkpoint(model, name, {n: t for n, t in state.items() if not n.endswith(medclip.BUFFERS)})


def test_a_parameter_too_many_or_of_another_shape_is_refused(models: dict[str, Any]) -> None:
    model = models["medclip-resnet50"]
    state = model.state_dict()
    with pytest.raises(WeightsError, match=r"1 unexpected \(vision_model.model.fc.bias\)"):
        medclip.load_checkpoint(model, "medclip-resnet50", {**state, "vision_model.model.fc.bias": torch.zeros(512)})
    with pytest.raises(WeightsError, match=r"1 of another shape \(vision_model.model.fc.weight\)"):
        medclip.load_checkpoint(model, "medclip-resnet50", {**state, "vision_model.model.fc.weight": torch.zeros(256, 2048)})


def test_a_refused_checkpoint_leaves_the_model_as_it_was(models: dict[str, Any]) -> None:
    model = models["medclip-resnet50"]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(WeightsError):
        medclip.load_checkpoint(model, "medclip-resnet50", {n: torch.ones_like(t) for n, t in list(before.items())[1:]})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.001])
@pytest.mark.parametrize("form", ["file", "archive"])
def test_a_truncated_file_is_refused(form: str, keep: float, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    whole = tmp_path / "made" / weights.WEIGHTS_NAME
    torch.save({f"vision_model.model.layer{i}.weight": torch.rand(100, 100) for i in range(5)}, whole)
    data = as_form(form, whole, tmp_path).read_bytes()
    short = tmp_path / "short.bin"
    short.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(WeightsError, match=r"short.bin is (truncated|damaged)") as caught:
        medclip.MedCLIP("medclip-resnet50", str(short))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>quota exceeded</html>", b"PK\x03\x04" + bytes(100), bytes(1000)])
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.bin") as caught:
        medclip.MedCLIP("medclip-vit", str(path))
    assert "\n" not in str(caught.value)


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("form", ["torch zip", "torch legacy", "bare pickle", "archive"])
def test_code_in_a_pickle_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.bin"
    content = {"vision_model.model.conv1.weight": torch.zeros(1), "x": Payload(mark)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    elif form == "archive":
        buffer = io.BytesIO()
        torch.save(content, buffer)
        with zipfile.ZipFile(path, "w") as sink:
            sink.writestr(weights.WEIGHTS_NAME, buffer.getvalue())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch zip")
    with pytest.raises(WeightsError, match=r"evil\.bin holds pickled code, which is never run") as caught:
        medclip.MedCLIP("medclip-resnet50", str(path))
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    if form != "archive":  # the payload works: loading the file without care would have run it
        pickle.loads(path.read_bytes()) if form == "bare pickle" else torch.load(path, weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, torch.zeros(3)])
def test_a_checkpoint_that_is_no_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(WeightsError, match="not a state_dict"):
        medclip.MedCLIP("medclip-vit", str(tmp_path / "x.bin"))


def test_sha256_is_checked(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["medclip-resnet50"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match=f"SHA-256 {digest}, expected {'0' * 64}"):
        medclip.MedCLIP("medclip-resnet50", str(path), sha256="0" * 64)
    assert weights.check_sha256(path, digest) == digest


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nothing\.bin does not exist"):
        medclip.MedCLIP("medclip-vit", str(tmp_path / "nothing.bin"))
    with pytest.raises(WeightsError, match=r"holds no pytorch_model\.bin and no \.zip"):
        medclip.MedCLIP("medclip-vit", str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_auto_without_a_network_says_what_to_fetch_and_where_to_put_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSAE_CACHE", str(tmp_path))
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there: no packet leaves the machine
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(WeightsError) as caught:
        medclip.MedCLIP(name)
    constants = medclip.package().constants
    pointer = {"medclip-resnet50": constants.PRETRAINED_URL_MEDCLIP_RESNET, "medclip-vit": constants.PRETRAINED_URL_MEDCLIP_VIT}[name]
    message = str(caught.value)
    assert "\n" not in message
    assert pointer in message
    assert str(tmp_path / name / "download.zip") in message
    assert not list((tmp_path / name).glob("*")) if (tmp_path / name).exists() else True


def test_auto_takes_the_archive_that_was_put_there(
    checkpoints: dict[str, Path], models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSAE_CACHE", str(tmp_path))
    (tmp_path / "medclip-vit").mkdir()
    as_form("archive", checkpoints["medclip-vit"], tmp_path / "medclip-vit")
    encoder = medclip.MedCLIP("medclip-vit", "auto", dtype="bfloat16")
    expected: Any = copy.deepcopy(models["medclip-vit"])
    expected.vision_model.to(torch.bfloat16)
    assert same(encoder.model, expected), "images in bfloat16, texts in float32"
    assert encoder.info.weights == "official checkpoint"


@pytest.mark.parametrize("name", NAMES)
def test_untrained_is_said_to_be_so_and_follows_the_seed(name: str, models: dict[str, Any], pixels: np.ndarray) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    encoder = medclip.MedCLIP(name, "untrained", seed=5)
    assert torch.equal(before, torch.random.get_rng_state()), "the caller's random state is left alone"
    assert same(encoder.model, models[name])
    if name == "medclip-resnet50":
        assert not same(medclip.build(name, seed=6), models[name])
    assert not encoder.trained
    assert encoder.info.notice is not None
    assert encoder.info.notice.startswith(f"UNTRAINED {name}")
    embeddings = encoder.encode(pixels)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    check_encoder(encoder)


def test_constants_are_the_package_s() -> None:
    constants = medclip.package().constants
    assert (constants.IMG_MEAN, constants.IMG_STD, constants.IMG_SIZE) == (medclip.MEAN, medclip.STD, medclip.SIZE)
    assert constants.WEIGHTS_NAME == weights.WEIGHTS_NAME


def test_the_installed_package_is_left_as_it_is() -> None:
    spec = importlib.util.find_spec("medclip.modeling_medclip")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    before = {p: hashlib.sha256(p.read_bytes()).digest() for p in folder.glob("*.py")}
    modelling = medclip.package()
    bindings = dict(vars(modelling))
    medclip.build("medclip-resnet50", 0)
    assert vars(modelling) == bindings, "constructors are replaced only while they run"
    assert before == {p: hashlib.sha256(p.read_bytes()).digest() for p in folder.glob("*.py")}
    assert sys.modules["medclip"].__path__ == [str(folder)]


def test_a_failed_build_restores_the_package_too(monkeypatch: pytest.MonkeyPatch) -> None:
    modelling = medclip.package()
    bindings = dict(vars(modelling))
    with pytest.raises(RuntimeError, match="stop"), medclip._constructors_from_configs(modelling):
        raise RuntimeError("stop")
    assert vars(modelling) == bindings


@pytest.mark.parametrize("size", [(224, 224), (320, 320), (300, 200), (201, 333), (31, 17), (1, 1), (900, 40)])
def test_preprocessing_pads_to_a_square(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(100, 256, size[::-1], dtype=np.uint8))
    pixels = load_preprocess("medclip-vit")(image)
    assert pixels.shape == (224, 224)
    assert pixels.dtype == np.uint8
    colour = Image.merge("RGB", [image] * 3)
    np.testing.assert_array_equal(pixels, medclip.preprocess(colour))
    if max(size) <= 224:  # never enlarged, only padded
        assert np.count_nonzero(pixels) == size[0] * size[1]


def test_text_without_a_tokenizer_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSAE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    encoder = medclip.MedCLIP("medclip-resnet50", "untrained")
    with pytest.raises(WeightsError, match=r"put its vocab\.txt") as caught:
        encoder.encode_text(["small effusion"])
    assert str(tmp_path / "bio_clinicalbert") in str(caught.value)


def test_text_with_a_tokenizer_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bio_clinicalbert"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "small", "effusion", "no"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setenv("MEDSAE_CACHE", str(tmp_path))
    encoder = medclip.MedCLIP("medclip-resnet50", "untrained")
    embeddings = encoder.encode_text(["small effusion", "no"])
    expected = encoder.encode_tokens(np.array([[2, 5, 6, 3], [2, 7, 3, 0]]), np.array([[1, 1, 1, 1], [1, 1, 1, 0]]))
    np.testing.assert_array_equal(embeddings, expected)
    shutil.rmtree(folder)
