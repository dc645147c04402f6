"""The naming service on the real vLLM engine behind a real Ray Serve app over HTTP, with a tiny random-weight stand-in for MedGemma."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

from medsae.artifacts import RunDir
from medsae.config import RunConfig, validate_config
from medsae.errors import ConfigError
from medsae.naming.images import data_url
from medsae.pipeline import measure, score
from medsae.pipeline import name as name_stage
from tests.support.planted import write_planted
from tests.support.tiny_gemma3 import ENGINE, ENVIRONMENT, write_tiny_gemma3

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(420),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (extras gpu or cpu)"),
]

KEY = "a-key-for-the-tests"
QUEUE = 40
NEURONS = 200


@pytest.fixture(scope="module")
def planted(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunDir]:
    """A measured run with 200 neurons."""
    config, run = write_planted(tmp_path_factory.mktemp("planted"), images=240, neurons=NEURONS)
    measure.run(config, run)
    return config, run


@pytest.fixture(scope="module")
def service(planted: tuple[RunConfig, RunDir], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service's URL. It asks for a key, which its processes find in their environment."""
    import ray

    from medsae.pipeline.naming_service import naming_service

    model = write_tiny_gemma3(tmp_path_factory.mktemp("gemma") / "tiny")
    args = {
        "model": str(model),
        "images": 8,
        "image_size": 56,
        "data_root": planted[0].data.root,
        "engine": ENGINE,
        "environment": ENVIRONMENT,
        "max_queued": QUEUE,
        "max_body_mb": 1,
    }
    assert ray.is_initialized()
    os.environ["MEDSAE_API_KEY"] = KEY
    with naming_service(args, port=8127, timeout=300) as url:
        yield url
    del os.environ["MEDSAE_API_KEY"]


@pytest.fixture(scope="module")
def http(service: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service, timeout=120, trust_env=False, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


@pytest.fixture
def image() -> str:
    return data_url(Image.linear_gradient("L").resize((60, 50)), 56)


def configured(config: RunConfig, service: str, **name: object) -> RunConfig:
    tree = config.model_dump(mode="json")
    tree["name"] |= {"namer": "medgemma", "url": service, "images": 4, "image_size": 56, "max_tokens": 600, **name}
    tree["score"] |= {"methods": ["detection", "intruder"], "images": 5, "neurons": 4}
    return validate_config(tree)


def test_names_stream_line_by_line_with_bad_images_counted(http: httpx.Client, image: str) -> None:
    neurons = [
        {"neuron": 3, "images": [image] * 3},
        {"neuron": 4, "images": ["data:image/png;base64,AAAA"]},
        {"neuron": 5, "exemplars": ["0001.png"]},
    ]
    neurons.append({"neuron": 6, "exemplars": ["../run/manifest.json"]})
    with http.stream("POST", "/v1/names", json={"neurons": neurons, "max_tokens": 600}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("application/x-ndjson")
        lines = [json.loads(line) for line in response.iter_lines()]
    totals = lines.pop()
    assert totals["done"]
    assert sum(totals["statuses"].values()) == 4
    found = {line["neuron"]: line for line in lines}
    assert {found[4]["status"], found[6]["status"]} == {"no readable image"}
    assert {found[3]["status"], found[5]["status"]} <= {"ok", "no shared concept"}
    assert totals["usage"]["requests"] == 2


def test_an_answer_that_is_cut_off_is_no_name(http: httpx.Client, image: str) -> None:
    lines = http.post("/v1/names", json={"neurons": [{"images": [image]}], "max_tokens": 5}).text.splitlines()
    assert json.loads(lines[0])["status"] == "truncated"
    assert json.loads(lines[0])["concept"] == ""


def test_a_name_is_scored_with_a_probability_an_image(http: httpx.Client, image: str) -> None:
    body = {"concept": "edema", "images": [image, image, "data:image/png;base64,AAAA"], "active": [True, False, True]}
    answer = http.post("/v1/names/score", json=body).json()
    assert answer["failures"] == 1
    assert answer["probabilities"][2] is None
    assert 0 < answer["probabilities"][0] < 1
    assert answer["probabilities"][0] == pytest.approx(answer["probabilities"][1])
    assert answer["figures"]["balanced_accuracy"] == 0.5


def test_the_openai_endpoint_answers_and_refuses_with_a_reason(http: httpx.Client, image: str) -> None:
    def chat(content: object, **more: object) -> httpx.Response:
        return http.post(
            "/v1/chat/completions", json={"model": "medgemma", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}
        )

    picture = {"type": "image_url", "image_url": {"url": image}}
    good = chat([{"type": "text", "text": "What is this?"}, picture])
    assert good.status_code == 200
    assert good.json()["usage"]["completion_tokens"] <= 4
    assert chat([picture] * 9).status_code == 400
    assert chat("word " * 5000).status_code == 400
    assert chat("x", model="another").status_code == 404
    # The engine fetches nothing that a request names.
    elsewhere = chat([{"type": "image_url", "image_url": {"url": f"{http.base_url}/-/healthz"}}])
    assert elsewhere.status_code == 400
    assert http.post("/v1/chat/completions", json={"messages": 3}).status_code == 422


def test_limits_say_what_is_too_much(http: httpx.Client, image: str) -> None:
    assert http.post("/v1/names", json={"neurons": [{"images": [image] * 9}]}).status_code == 422
    assert http.post("/v1/names", json={"neurons": []}).status_code == 422
    assert http.post("/v1/names", json={"neurons": [{"images": ["x" * 2**21]}]}).status_code == 413
    answer = http.post("/v1/names", json={"neurons": [{"picture": image}]})
    assert answer.status_code == 422
    # An error never repeats the request: it may hold a patient's image.
    assert image[30:60] not in answer.text


def test_a_full_queue_says_429_and_when_to_come_back(http: httpx.Client, image: str) -> None:
    body = {"model": "medgemma", "messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "ignore_eos": True}
    with concurrent.futures.ThreadPoolExecutor(3 * QUEUE) as pool:
        answers = list(pool.map(lambda _: http.post("/v1/chat/completions", json=body), range(3 * QUEUE)))
    codes = [a.status_code for a in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= QUEUE
    assert all(int(a.headers["Retry-After"]) > 0 for a in answers if a.status_code == 429)


def engine_processes() -> list[psutil.Process]:
    """The engine core of vLLM among this test's own descendants."""
    return [p for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(p.cmdline()[:1])]


def test_two_hundred_neurons_are_named_through_the_death_of_the_engine(planted: tuple[RunConfig, RunDir], service: str, http: httpx.Client) -> None:
    config, run = planted
    config = configured(config, service, select="all", retries=40)
    killed: list[int] = []

    def kill_when_a_quarter_is_named() -> None:
        while not killed:
            lines = sum(len(run.read_bytes(p).splitlines()) for p in run.list("names/.answers/standard", ".jsonl"))
            if lines >= NEURONS // 4:
                for process in engine_processes():
                    killed.append(process.pid)
                    os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.05)

    thread = threading.Thread(target=kill_when_a_quarter_is_named, daemon=True)
    thread.start()
    result = name_stage.run(config, run)
    thread.join(1)
    assert killed
    assert result.counts["retries"] > 0
    rows = run.read_table("names/standard.parquet").to_pylist()
    assert [r["neuron"] for r in rows] == list(range(NEURONS))
    # Random weights say noise, but noise that follows the schema: a name or an explicit "no shared concept", never a failure passed off as one.
    # A neuron that fires on no naming image has nothing to show.
    assert {r["status"] for r in rows} <= {"ok", "no shared concept", "no image", "truncated"}
    asked = [r for r in rows if r["status"] != "no image"]
    assert sum(r["status"] in ("ok", "no shared concept") for r in asked) > 0.9 * len(asked) > 50
    assert all(bool(r["concept"]) == (r["status"] == "ok") for r in rows)
    assert result.counts["cached_tokens"] > 0
    # Everything was written as it came: a second job asks for nothing.
    again = name_stage.run(config, run)
    assert again.counts["resumed"] == again.counts["neurons"]
    assert again.counts["requests"] == 0


def test_names_of_the_engine_are_scored(planted: tuple[RunConfig, RunDir], service: str, http: httpx.Client) -> None:
    config, run = planted
    config = configured(config, service, select="all")
    result = score.run(config, run)
    rows = run.read_table("scores/standard.parquet").to_pylist()
    assert result.counts["failures"] == 0
    assert {r["method"] for r in rows} == {"detection", "intruder"}
    # A model with random weights cannot tell images apart by a name.
    assert all(abs(r["auc"] - 0.5) < 0.5 for r in rows if r["method"] == "detection" and r["control"] == "empty")


def test_a_directory_without_a_model_is_a_users_error(tmp_path: Path) -> None:
    from deployments.naming import build

    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        build({"model": str(tmp_path)})
    with pytest.raises(ConfigError, match="replica"):
        build({"replica": 2})
