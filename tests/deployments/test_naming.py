"""The naming service on the real vLLM engine behind a real Ray Serve app over HTTP, with a tiny random-weight stand-in for MedGemma."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from medsae.artifacts import RunDir
from medsae.config import validate_config
from medsae.pipeline import name as name_stage
from tests.support.radiographs import write_measured
from tests.support.tiny_gemma3 import ENGINE, ENVIRONMENT, write_tiny_gemma3

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (extras gpu or cpu)"),
]


@pytest.fixture(scope="module")
def service(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service's URL."""
    from medsae.pipeline.naming_service import naming_service

    model = write_tiny_gemma3(tmp_path_factory.mktemp("gemma") / "tiny")
    args = {"model": str(model), "images": 8, "engine": ENGINE, "environment": ENVIRONMENT}
    with naming_service(args, port=8127, timeout=240) as url:
        yield url


@pytest.mark.timeout(300)
def test_a_handful_of_neurons_is_named_end_to_end(service: str, tmp_path: Path) -> None:
    root, run_uri = write_measured(tmp_path, neurons=6)
    config = validate_config(
        {
            "run": run_uri,
            "data": {"root": root},
            "sae": [{"name": "standard"}],
            "name": {"namer": "medgemma", "url": service, "images": 4, "image_size": 56, "max_tokens": 600},
        }
    )
    run = RunDir(run_uri)
    result = name_stage.run(config, run)
    rows = run.read_table("names/standard.parquet").to_pylist()
    assert len(rows) == run.read_table("measure/standard/neurons.parquet").to_pandas()["alive"].sum()
    # Random weights say noise, but noise that follows the schema: each answer is a name or an explicit "no shared concept".
    assert {r["status"] for r in rows} <= {"ok", "no shared concept"}
    assert all(bool(r["concept"]) == (r["status"] == "ok") for r in rows)
    assert result.counts["prompt_tokens"] > 0
