"""RunConfig: YAML, overrides, and one line for whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from medsae.config import RunConfig, load_config, validate_config
from medsae.errors import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    assert load_config(path).run.startswith("runs/")


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"run": "a", "sae": [{"name": "x", "dict_size": 64}]}))
    config = load_config(path, ["run=b", "sae.0.dict_size=128", "data.root=s3://bucket/x", "encoder.seed=7", "name.url="])
    assert (config.run, config.sae[0].dict_size, config.data.root, config.encoder.seed, config.name.url) == ("b", 128, "s3://bucket/x", 7, None)


def test_without_a_file() -> None:
    assert load_config(None) == RunConfig()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run"], "key=value"),
        (["=3"], "key=value"),
        (["nonsense=1"], "nonsense"),
        (["data.nonsense=1"], r"data\.nonsense"),
        (["data.eval_fraction=2"], r"data\.eval_fraction"),
        (["data.format=dicom"], r"data\.format"),
        (["sae.0.dict_size=8"], "index"),
        (["run.x=1", "run=y"], "run"),
        (["encoder.sha256=abc"], r"encoder\.sha256"),
    ],
)
def test_wrong_overrides_are_one_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("sae: []\n" if overrides[0].startswith("sae.0") else "run: a\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)


def test_sae_names_are_unique_and_not_raw() -> None:
    for names in (["a", "a"], ["raw"]):
        with pytest.raises(ConfigError, match="unique"):
            validate_config({"sae": [{"name": n} for n in names]})


def test_a_grid_is_an_autoencoder_a_combination(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("sae:\n- {architecture: topk, epochs: 3, grid: {dict_size: [512, 1024], k: [4, 8, 16]}}\n- {name: plain, dict_size: 64}\n")
    found = [(s.name, s.architecture, s.dict_size, s.k, s.epochs) for s in load_config(path).sae]
    assert found == [(f"topk-m{m}-k{k}", "topk", m, k, 3) for m in (512, 1024) for k in (4, 8, 16)] + [("plain", "standard", 64, None, 200)]
    # Overrides reach into the grid; what was resolved (as the manifest holds it) resolves to itself.
    config = load_config(path, ["sae.0.grid.k=[2]", "sae.0.epochs=9", "sae.0.name=try"])
    assert [(s.name, s.k, s.epochs) for s in config.sae[:2]] == [("try-m512-k2", 2, 9), ("try-m1024-k2", 2, 9)]
    assert validate_config(config.model_dump(mode="json")) == config
    config = load_config(None, ["sae=[{grid: {architecture: [standard, gated], l1: [0.5, 2], lr: [1.0e-3]}}]"])
    assert [s.name for s in config.sae] == [f"{a}-l1_{v}-lr_0.001" for a in ("standard", "gated") for v in ("0.5", "2")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{grid: [1]}", "entry 0: grid must be a mapping"),
        ("{grid: {}}", "entry 0: grid must be a mapping"),
        ("{grid: {size: [1]}}", "grid cannot vary 'size'"),
        ("{grid: {name: [a, b]}}", "grid cannot vary 'name'"),
        ("{grid: {dict_size: 8}}", "grid.dict_size must be a list"),
        ("{grid: {dict_size: []}}", "grid.dict_size must be a list"),
        ("{grid: {dict_size: [[8]]}}", "grid.dict_size must be a list"),
        ("{grid: {dict_size: [8, 8]}}", "grid.dict_size holds a value twice"),
        ("{dict_size: 8, grid: {dict_size: [8, 16]}}", "dict_size stands in grid and beside it"),
        ("{architecture: topk, grid: {dict_size: [8, 64], k: [4, 32]}}", "grid point topk-m8-k32: .* k = 32 is above dict_size = 8"),
        ("{grid: {k: [4]}}", "grid point standard-k4: .* standard takes no k"),
        ("{grid: {lr: [high]}}", "grid point standard-lr_high: lr: .* valid number"),
        (f"{{grid: {{dict_size: {list(range(1, 60))}, batch_size: {list(range(1, 60))}}}}}", "3481 combinations, at most 1000"),
        ("{grid: {dict_size: [8]}}, {name: standard-m8}", "unique"),
    ],
)
def test_a_wrong_grid_is_one_line(entry: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [f"sae=[{entry}]"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "just text"])
def test_unusable_yaml_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config("no-such-file.yaml")
