"""The naming service on the real vLLM engine behind a real Ray Serve app over HTTP, with a tiny random-weight stand-in for MedGemma."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from PIL import Image

from medsae.artifacts import RunDir
from medsae.config import RunConfig, validate_config
from medsae.errors import ConfigError
from medsae.naming.answers import AnswerLog
from medsae.naming.client import parse_answer
from medsae.naming.images import data_url
from medsae.naming.prompts import NAME_ANSWER
from medsae.pipeline import measure, score
from medsae.pipeline import name as name_stage
from tests.support.planted import BRIEF, write_planted
from tests.support.ports import free_port
from tests.support.tiny_gemma3 import ENGINE, ENVIRONMENT, write_tiny_gemma3

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.ray,
    pytest.mark.slow,
    # Two Serve instances or engines at a time would starve each other on a small machine.
    pytest.mark.xdist_group("serve"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (extras gpu or cpu)"),
]

KEY_ENV = "MEDSAE_TEST_NAMING_KEY"
"""Set in `conftest.py`, before Ray starts."""
KEY = os.environ[KEY_ENV]
QUEUE = 40
NEURONS = 200
PATIENCE = 600
"""Seconds that are waited for something which a quick machine has in a few: nothing here is timed."""


@pytest.fixture(scope="module")
def planted(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunDir]:
    """A measured run with 200 neurons."""
    config, run = write_planted(tmp_path_factory.mktemp("planted"), images=240, neurons=NEURONS, measure=BRIEF)
    measure.run(config, run)
    return config, run


@pytest.fixture(scope="module")
def service(planted: tuple[RunConfig, RunDir], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service's URL. It asks for a key, which its processes find in their environment. One engine for all tests of this module."""
    from medsae.pipeline.naming_service import naming_service

    model = write_tiny_gemma3(tmp_path_factory.mktemp("gemma") / "tiny")
    args = {
        "model": str(model),
        "images": 8,
        "image_size": 56,
        "data_root": planted[0].data.root,
        "api_key_env": KEY_ENV,
        "engine": ENGINE,
        "environment": ENVIRONMENT,
        "max_queued": QUEUE,
        "max_body_mb": 1,
    }
    with naming_service(args, port=free_port(), timeout=PATIENCE) as url:
        yield url


@pytest.fixture(scope="module")
def http(service: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service, timeout=PATIENCE, trust_env=False, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


@pytest.fixture
def image() -> str:
    return data_url(Image.linear_gradient("L").resize((60, 50)), 56)


def configured(config: RunConfig, service: str, **name: object) -> RunConfig:
    tree = config.model_dump(mode="json")
    tree["name"] |= {
        "namer": "medgemma",
        "url": service,
        "api_key_env": KEY_ENV,
        "select": "all",
        "images": 4,
        "image_size": 56,
        "max_tokens": 600,
        **name,
    }
    tree["score"] |= {"methods": ["detection", "intruder"], "images": 5, "neurons": 16}
    return validate_config(tree)


def wait_for(what: Callable[[], bool], alive: Callable[[], bool] = lambda: True) -> None:
    """Polls until `what` holds; fails when `alive` no longer does, or after `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert alive(), "what was waited for ended before"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


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
    assert {found[3]["status"], found[5]["status"]} <= {"ok", "no shared concept", "empty"}  # random weights may say nothing
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


def test_without_the_key_nothing_is_answered(service: str) -> None:
    for path, headers in (("/v1/models", {}), ("/v1/models", {"Authorization": "Bearer another"})):
        assert httpx.get(service + path, headers=headers, trust_env=False).status_code == 401
    assert httpx.get(service + "/v1/models", headers={"X-API-Key": KEY}, trust_env=False).json()["data"][0]["id"] == "medgemma"


def test_limits_say_what_is_too_much(http: httpx.Client, image: str) -> None:
    assert http.post("/v1/names", json={"neurons": [{"images": [image] * 9}]}).status_code == 422
    assert http.post("/v1/names", json={"neurons": []}).status_code == 422
    assert http.post("/v1/names", json={"neurons": [{"images": ["x" * 2**21]}]}).status_code == 413
    answer = http.post("/v1/names", json={"neurons": [{"picture": image}]})
    assert answer.status_code == 422
    # An error never repeats the request: it may hold a patient's image.
    assert image[30:60] not in answer.text


def test_an_answer_of_another_shape_is_no_name(http: httpx.Client) -> None:
    """The service is asked for something else than the schema, as a server does that does not know schemas."""
    body = {"model": "medgemma", "messages": [{"role": "user", "content": "x"}], "structured_outputs": {"choice": ["edema", "nodule"]}}
    told = http.post("/v1/chat/completions", json=body).json()
    assert told["choices"][0]["message"]["content"] in ("edema", "nodule")
    answer = parse_answer(told, NAME_ANSWER, None)
    assert (answer.status, answer.value) == ("schema", None)
    assert answer.completion_tokens > 0


def test_a_full_queue_says_429_and_when_to_come_back(http: httpx.Client) -> None:
    body = {"model": "medgemma", "messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "ignore_eos": True}
    count = QUEUE + 20
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda _: http.post("/v1/chat/completions", json=body), range(count)))
    codes = [a.status_code for a in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= QUEUE
    assert all(int(a.headers["Retry-After"]) > 0 for a in answers if a.status_code == 429)


def engine_processes() -> list[psutil.Process]:
    """The engine core of vLLM among this test's own descendants."""
    return [p for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(p.cmdline()[:1])]


def test_two_hundred_neurons_are_named_through_the_death_of_the_job_and_of_the_engine(
    planted: tuple[RunConfig, RunDir], service: str, tmp_path: Path
) -> None:
    import ray

    config, run = planted
    config = configured(config, service, retries=60)
    log = AnswerLog(run, "names/.answers/standard")

    # A job of its own process, killed when it has some of the answers. It joins this test's cluster, so it leaves no processes behind.
    tree = config.model_dump(mode="json")
    tree["ray"]["address"] = ray.get_runtime_context().gcs_address
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    job = subprocess.Popen([sys.executable, "-m", "medsae.cli", "name", str(tmp_path / "config.yaml")], start_new_session=True)
    try:
        wait_for(lambda: len(log.read()) >= NEURONS // 10, lambda: job.poll() is None)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    kept = len(log.read())
    assert not run.exists("names/standard.parquet")

    # A second job goes on; the engine dies under it.
    killed: list[int] = []

    def kill_in_the_middle() -> None:
        wait_for(lambda: len(log.read()) >= kept + NEURONS // 5)
        for process in engine_processes():
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_in_the_middle, daemon=True)
    thread.start()
    result = name_stage.run(config, run)
    thread.join(PATIENCE)
    assert killed
    assert result.counts["resumed"] == kept
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
    # Everything was written as it came: a third job asks for nothing.
    again = name_stage.run(config, run)
    assert again.counts["resumed"] == again.counts["neurons"]
    assert again.counts["requests"] == 0


def test_the_engine_scores_names(planted: tuple[RunConfig, RunDir], service: str) -> None:
    config, run = planted
    name_stage.run(configured(config, service, namer="label"), run)  # random weights may have named nothing
    config = configured(config, service)
    result = score.run(config, run)
    rows = run.read_table("scores/standard.parquet").to_pylist()
    assert result.counts["scored"] > 0
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
