"""RunConfig: the whole configuration of a run, from YAML and `key=value` overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from medsae.data.config import DataConfig
from medsae.encoders.config import EncoderConfig
from medsae.errors import ConfigError
from medsae.metrics.config import MeasureConfig
from medsae.naming.config import NameConfig, ScoreConfig
from medsae.report.config import ReportConfig
from medsae.sae.config import FitConfig, SAEConfig
from medsae.sae.grid import expand
from medsae.settings import Section


class RayConfig(Section):
    """The cluster that the stages run on."""

    address: str | None = None
    """Address of a running cluster; `auto` finds the one this process belongs to; default: a cluster of this process's own."""
    num_cpus: int | None = Field(None, gt=0)
    """Logical CPUs of an own cluster; default: the machine's cores, at least 4."""
    train_workers: int = Field(1, ge=1)
    """Ray Train (DDP) workers of `fit`."""
    use_gpu: bool | None = None
    """Put encoder actors and training workers on GPUs; default: when the cluster has any."""


class RunConfig(Section):
    """One run, from radiographs to report."""

    run: str = "runs/default"
    """The run directory, or a bucket prefix (`s3://`, `gs://`)."""
    seed: int = 0
    """Seed of everything that draws at random."""
    data: DataConfig = DataConfig()
    encoder: EncoderConfig = EncoderConfig()
    sae: list[SAEConfig] = Field(default_factory=lambda: [SAEConfig()], min_length=1)
    """The sparse autoencoders to train and measure. `grid` in an entry, a list an option, stands for every combination (`docs/sae.md`)."""
    fit: FitConfig = FitConfig()
    measure: MeasureConfig = MeasureConfig()
    name: NameConfig = NameConfig()
    score: ScoreConfig = ScoreConfig()
    report: ReportConfig = ReportConfig()
    ray: RayConfig = RayConfig()

    @field_validator("sae", mode="before")
    @classmethod
    def _grids(cls, entries: Any) -> Any:
        return expand(entries)

    @model_validator(mode="after")
    def _unique_names(self) -> RunConfig:
        names = [s.name for s in self.sae]
        if len(set(names)) != len(names) or "raw" in names:
            raise ValueError(f"sae names must be unique and not 'raw', got {names}; set `name` of each")
        return self


def _assign(tree: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {assignment!r} is not of the form key=value, for example encoder.weights=untrained")
    value = yaml.safe_load(text) if text else None
    *parents, last = key.split(".")
    node: Any = tree
    for name in parents:
        if isinstance(node, list):
            node = node[_index(node, name, key)]
        else:
            node = node.setdefault(name, {})
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override {key!r}: {'.'.join(parents)} has no keys of its own")


def _index(node: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"override {key!r}: {name!r} is not an index below {len(node)}")
    return int(name)


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a YAML file and applies `key=value` overrides (`sae.0.dict_size=1024`).

    Raises:
        ConfigError: one line that names the key and what is wrong with it.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text()) or {}
        except OSError as error:
            raise ConfigError(f"configuration {path} cannot be read: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"configuration {path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"configuration {path} must be a mapping of keys to values")
    for assignment in overrides:
        _assign(tree, assignment)
    return validate_config(tree)


def validate_config(tree: dict[str, Any]) -> RunConfig:
    """A mapping as a RunConfig; raises ConfigError with one line."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = [f"{'.'.join(str(p) for p in e['loc']) or 'configuration'}: {e['msg']}" for e in error.errors()]
        raise ConfigError("; ".join(problems)) from error
