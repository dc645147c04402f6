"""What stands before both services: key, body size and queue. And the arguments of the naming service, without an engine."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from medsae.errors import ConfigError
from medsae.pipeline.guard import Guard, api_key

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (extras gpu or cpu)")


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"size": len(await request.body())})


def client(**options: object) -> TestClient:
    app = Starlette(routes=[Route("/", echo, methods=["GET", "POST"])])
    app.add_middleware(Guard, **{"key_env": None, "max_body": 100, "max_in_work": 4, **options})
    return TestClient(app)


def test_the_key_is_asked_for_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "right")
    http = client(key_env="A_KEY")
    assert http.get("/").status_code == 401
    assert http.post("/", content=b"x", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert http.post("/", content=b"x", headers={"Authorization": "Basic right"}).status_code == 401
    assert http.options("/").status_code == 401
    for headers in ({"Authorization": "Bearer right"}, {"X-API-Key": "right"}):
        assert http.post("/", content=b"x", headers=headers).json() == {"size": 1}
    # Health checks alone need none: there is no such page here.
    assert http.get("/healthz").status_code == 404
    assert client(key_env="A_KEY", open_paths=()).get("/healthz").status_code == 401


def test_a_key_that_is_not_set_keeps_the_service_down() -> None:
    with pytest.raises(ConfigError, match="which is not set"):
        api_key("A_VARIABLE_THAT_IS_NOT_SET")
    assert api_key(None) is None


def test_large_bodies_are_refused_announced_or_not() -> None:
    http = client()
    assert http.post("/", content=b"x" * 100).json() == {"size": 100}
    assert http.post("/", content=b"x" * 101).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(11):
            yield b"x" * 10

    assert http.post("/", content=pieces()).status_code == 413


def test_a_full_queue_answers_429_and_frees_again() -> None:
    gate, entered = threading.Event(), threading.Barrier(3)

    def wait(request: Request) -> JSONResponse:
        entered.wait(10)
        gate.wait(10)
        return JSONResponse({})

    app = Starlette(routes=[Route("/", wait, methods=["POST"])])
    app.add_middleware(Guard, key_env=None, max_body=100, max_in_work=2)
    with TestClient(app) as http:
        codes: list[int] = []
        threads = [threading.Thread(target=lambda: codes.append(http.post("/", content=b"x").status_code)) for _ in range(2)]
        for thread in threads:
            thread.start()
        entered.wait(10)
        full = http.post("/", content=b"x")
        assert full.status_code == 429
        assert int(full.headers["Retry-After"]) > 0
        gate.set()
        for thread in threads:
            thread.join(10)
        assert codes == [200, 200]


@needs_vllm
@pytest.mark.parametrize("file", ["naming-gpu.yaml", "naming-cpu.yaml"])
def test_the_serve_files_are_valid(file: str) -> None:
    import importlib
    from pathlib import Path

    import yaml
    from ray.serve.schema import ServeDeploySchema

    from medsae.pipeline.naming_service import llm_config, service_config

    tree = yaml.safe_load((Path(__file__).parents[2] / "deployments" / file).read_text())
    schema = ServeDeploySchema.model_validate(tree)
    application = schema.applications[0]
    module, _, function = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    config = service_config(application.args)
    llm = llm_config(config, gpus=4)
    assert llm.engine_kwargs["enable_prefix_caching"] is True
    assert llm.engine_kwargs["limit_mm_per_prompt"] == {"image": config.images}
    assert llm.deployment_config["autoscaling_config"]["max_replicas"] == config.max_replicas
    # Served on the loopback unless someone decides otherwise.
    assert schema.http_options.host == "127.0.0.1"


@needs_vllm
def test_a_machine_without_gpus_gets_a_cpu_engine_and_arguments_can_be_overridden() -> None:
    from medsae.pipeline.naming_service import llm_config, service_config

    without = llm_config(service_config({"model": "google/medgemma-4b-it", "engine": {"max_num_seqs": 3}}), gpus=0)
    assert without.accelerator_config.kind == "cpu"
    assert without.engine_kwargs["max_num_seqs"] == 3
    fixed = llm_config(service_config({"model": "google/medgemma-4b-it", "replicas": 2, "accelerator": "L4"}), gpus=2)
    assert fixed.accelerator_type == "L4"
    assert fixed.deployment_config["num_replicas"] == 2
