"""`cluster.yaml` as Ray's cluster launcher reads it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return tree


def test_it_validates(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


@pytest.mark.parametrize("where", [(), ("available_node_types", "gpu")])
def test_the_validation_sees_a_misspelt_key(cluster: dict[str, Any], where: tuple[str, ...]) -> None:
    wrong = copy.deepcopy(cluster)
    node = wrong
    for key in where:
        node = node[key]
    node["max_wokers"] = 1
    with pytest.raises(Exception, match="max_wokers"):
        validate_config(prepare_config(wrong))


def test_it_runs_the_ray_that_the_package_pins(cluster: dict[str, Any]) -> None:
    import ray

    assert f"ray:{ray.__version__.rsplit('.', 1)[0]}." in cluster["docker"]["image"]


def test_no_secret_and_no_data_is_copied_to_the_nodes(cluster: dict[str, Any]) -> None:
    assert {"**/.env", "**/runs", "/data"} <= set(cluster["rsync_exclude"])
