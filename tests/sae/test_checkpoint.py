"""Saved autoencoders: folding, round trip, bad files, and the same outputs in sae-lens and dictionary-learning."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medsae.artifacts import RunDir
from medsae.errors import ArtifactError
from medsae.sae import SAE, SAEConfig, Trainer, load, save, train
from medsae.sae.config import OPTIONS
from medsae.sae.data import Scaling, fit_scaling
from medsae.sae.model import fold, reconstruction
from medsae.sae.registry import ARCHITECTURES

ALL = sorted(ARCHITECTURES)
FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = sorted(path.name for path in FIXTURES.iterdir() if (path / "outputs.safetensors").exists())
N, D, M = 200, 9, 24


def raw() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (0.1 * rng.normal(size=(N, D)) + rng.normal(size=D)).astype(np.float32)  # a narrow cone, like normalised embeddings


def trained(name: str) -> tuple[Trainer, Scaling, np.ndarray]:
    x = raw()
    scaling = fit_scaling(x)
    extra: dict[str, Any] = {"k": 4} if "k" in OPTIONS[name] else {}
    trainer = Trainer(SAEConfig(architecture=name, dict_size=M, epochs=5, batch_size=40, **extra), D, N)  # type: ignore[arg-type]
    train([trainer], torch.from_numpy(scaling.apply(x)), 0)
    return trainer, scaling, x


@pytest.fixture(scope="module")
def autoencoders() -> dict[str, tuple[Trainer, Scaling, np.ndarray]]:
    return {name: trained(name) for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_loads_on_raw_embeddings(name: str, tmp_path: Path, autoencoders: dict[str, Any]) -> None:
    trainer, scaling, x = autoencoders[name]
    parts = trainer.sae.export()
    run = RunDir(str(tmp_path))
    hashes = save(fold(*parts, scaling, {"note": 1}), run, f"sae/{name}", trainer.log)
    assert set(hashes) == {f"sae/{name}/{f}" for f in ("cfg.json", "sae_weights.safetensors", "training.jsonl")}
    loaded = load((run, name))
    assert (loaded.d, loaded.m, loaded.metadata) == (D, M, {"note": 1})
    scaled = fold(*parts, Scaling(np.zeros(D), 1.0, 1.0), {})
    inputs = scaling.apply(x)
    code = loaded.encode(x)
    assert code.dtype == np.float32
    assert code.shape == (N, M)
    np.testing.assert_allclose(code, scaled.encode(inputs), rtol=1e-3, atol=2e-3)
    back = scaled.decode(scaled.encode(inputs)) / scaling.scale + scaling.mean
    np.testing.assert_allclose(loaded.decode(code), back, rtol=1e-4, atol=1e-4)
    as_tensor = loaded.encode(torch.from_numpy(x))
    assert isinstance(as_tensor, torch.Tensor)
    assert isinstance(loaded.decode(as_tensor), torch.Tensor)
    np.testing.assert_array_equal(as_tensor.numpy(), code)
    same = load(str(tmp_path / "sae" / name)).encode(x)
    np.testing.assert_array_equal(same, code)
    assert [json.loads(line) for line in (tmp_path / "sae" / name / "training.jsonl").read_text().splitlines()] == trainer.log


@pytest.mark.parametrize("name", ALL)
def test_inference_is_as_sparse_as_training(name: str, autoencoders: dict[str, Any]) -> None:
    trainer, scaling, x = autoencoders[name]
    code = fold(*trainer.sae.export(), scaling, {}).encode(x)
    assert (code > 0).sum(1).mean() == pytest.approx(trainer.log[-1]["l0"], rel=0.35)
    assert code.min() >= 0


def test_topk_is_exactly_k_and_read_only_input_is_fine(autoencoders: dict[str, Any]) -> None:
    trainer, scaling, x = autoencoders["topk"]
    x = x.copy()
    x.setflags(write=False)
    code = fold(*trainer.sae.export(), scaling, {}).encode(x)
    assert (code > 0).sum(1).max() <= 4


def test_reconstruction_sums_add_up(autoencoders: dict[str, Any]) -> None:
    trainer, scaling, x = autoencoders["gated"]
    sae = fold(*trainer.sae.export(), scaling, {})
    mean = torch.from_numpy(scaling.mean)
    whole = reconstruction(sae, torch.from_numpy(x), mean, chunk=64)
    parts = [reconstruction(sae, torch.from_numpy(part), mean) for part in np.array_split(x, 3)]
    for key, value in whole.items():
        torch.testing.assert_close(sum(p[key] for p in parts), value, rtol=1e-6, atol=0)
    assert float(whole["variance"]) == pytest.approx(N * scaling.variance, rel=1e-9)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no folder", "holds no cfg.json; run `medsae fit` first"),
        ("no weights", "does not exist"),
        ("cut weights", "damaged SAE"),
        ("not json", "damaged SAE"),
        ("architecture", "architecture 'temporal' cannot be loaded"),
        ("missing tensor", "SAE weights lack W_dec"),
        ("shape", r"SAE weight b_enc is \(3,\), not \(8,\)"),
        ("k", "a topk SAE needs k between 1 and 8, not None"),
        ("normalised", "inputs normalised by 'layer_norm'"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, damage: str, message: str) -> None:
    folder = tmp_path / "sae"
    if damage != "no folder":
        shutil.copytree(FIXTURES / "saelens_topk", folder)
        config, weights = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
        config |= {"architecture": {"architecture": "temporal"}, "k": {"k": None}, "normalised": {"normalize_activations": "layer_norm"}}.get(
            damage, {}
        )
        if damage == "missing tensor":
            weights.pop("W_dec")
        if damage == "shape":
            weights["b_enc"] = torch.zeros(3)
            config |= {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": False}
        (folder / "cfg.json").write_text(json.dumps(config) if damage != "not json" else "{")
        save_file(weights, folder / "sae_weights.safetensors")
        if damage == "no weights":
            (folder / "sae_weights.safetensors").unlink()
        if damage == "cut weights":
            (folder / "sae_weights.safetensors").write_bytes((folder / "sae_weights.safetensors").read_bytes()[:100])
    with pytest.raises(ArtifactError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_wrong_widths_are_one_line(autoencoders: dict[str, Any]) -> None:
    trainer, scaling, _ = autoencoders["standard"]
    sae = fold(*trainer.sae.export(), scaling, {})
    with pytest.raises(ArtifactError, match=rf"\(3, 5\) do not fit an SAE of width {D}"):
        sae.encode(np.zeros((3, 5), np.float32))
    with pytest.raises(ArtifactError, match=rf"do not fit an SAE of {M} neurons"):
        sae.decode(torch.zeros(3, 5))


@pytest.mark.parametrize("name", GOLDEN)
def test_reads_what_the_peers_save(name: str) -> None:
    """Golden files of the real packages (`fixtures/write_peers.py`)."""
    expected = load_file(FIXTURES / name / "outputs.safetensors")
    sae = load(FIXTURES / name)
    code = sae.encode(expected["x"])
    assert 0 < int((code > 0).sum()) < code.numel()
    torch.testing.assert_close(code, expected["code"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(code), expected["reconstruction"], rtol=1e-5, atol=1e-5)


def test_golden_files_cover_the_formats() -> None:
    assert len([n for n in GOLDEN if n.startswith("saelens_")]) == 4
    assert len([n for n in GOLDEN if n.startswith("dl_")]) == 7


def test_pickles_with_code_are_not_run(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "dl_AutoEncoder", tmp_path / "bad")
    torch.save({"encoder.weight": print}, tmp_path / "bad" / "ae.pt")
    with pytest.raises(ArtifactError, match="damaged or not of dictionary-learning"):
        load(tmp_path / "bad")


def peers_python() -> str | None:
    """A Python that has sae-lens: this one, or the one that MEDSAE_PEERS_PYTHON names."""
    named = os.environ.get("MEDSAE_PEERS_PYTHON")
    return named or (sys.executable if importlib.util.find_spec("sae_lens") else None)


@pytest.mark.skipif(peers_python() is None, reason="sae-lens is not installed here; set MEDSAE_PEERS_PYTHON to a Python that has it")
@pytest.mark.slow
def test_sae_lens_loads_what_is_saved_here(tmp_path: Path, autoencoders: dict[str, Any]) -> None:
    run, folders = RunDir(str(tmp_path)), []
    for name, (trainer, scaling, x) in autoencoders.items():
        sae: SAE = fold(*trainer.sae.export(), scaling, {"sae": {"architecture": name}})
        save(sae, run, f"sae/{name}")
        code = sae.encode(torch.from_numpy(x))
        folders.append(str(tmp_path / "sae" / name))
        save_file({"x": torch.from_numpy(x), "code": code, "reconstruction": sae.decode(code)}, f"{folders[-1]}/outputs.safetensors")
    command = [str(peers_python()), str(FIXTURES / "write_peers.py"), "check", *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("same outputs:") == len(ALL)
