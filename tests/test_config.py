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
