"""Naming and scoring by a service, on a run whose neurons are known, with a scripted OpenAI-compatible server that knows the truth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from medsae.artifacts import RunDir
from medsae.config import RunConfig, validate_config
from medsae.errors import ArtifactError, ConfigError, DataError, ServiceError
from medsae.naming.answers import AnswerLog
from medsae.pipeline import measure, name, score
from tests.support.planted import BRIEF, LABELS, write_planted
from tests.support.scripted import Script, chat, scripted_server

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def measured(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunDir]:
    config, run = write_planted(tmp_path_factory.mktemp("planted"), measure=BRIEF)
    measure.run(config, run)
    return config, run


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def url(script: Script) -> Iterator[str]:
    with scripted_server(script) as address:
        yield address


def with_service(config: RunConfig, url: str, **changes: object) -> RunConfig:
    tree = config.model_dump(mode="json")
    tree["name"] |= {"namer": "medgemma", "url": url, "image_size": 32, "retries": 3, **changes}
    return validate_config(tree)


def fresh(run: RunDir) -> None:
    for folder in ("names", "scores"):
        run.delete(folder)


@pytest.mark.parametrize("recipe", ["quantile", "top", "contrast", "paper"])
def test_the_service_names_the_planted_neurons(measured: tuple[RunConfig, RunDir], url: str, script: Script, recipe: str) -> None:
    config, run = measured
    fresh(run)
    result = name.run(with_service(config, url, recipe=recipe), run)
    rows = {r["neuron"]: r for r in run.read_table("names/standard.parquet").to_pylist()}
    assert [rows[j]["concept"] for j in range(4)] == LABELS
    assert all(r["status"] == "ok" and len(r["prompt_hash"]) == 16 for j, r in rows.items() if j < 4)
    assert result.counts["prompt_tokens"] == 100 * script.answered
    assert result.counts["cached_tokens"] == 60 * script.answered


def test_own_names_score_near_one_and_shuffled_ones_near_a_half(measured: tuple[RunConfig, RunDir], url: str, script: Script) -> None:
    config, run = measured
    fresh(run)
    config = with_service(config, url)
    name.run(config, run)
    tree = config.model_dump(mode="json")
    tree["score"]["methods"] = ["detection", "intruder", "paper"]
    config = validate_config(tree)
    result = score.run(config, run)
    summary = run.read_json("scores/standard.json")
    assert summary["detection"]["mean"]["none"] > 0.9
    assert abs(summary["detection"]["mean"]["shuffled"] - 0.5) < 0.1
    assert summary["detection"]["mean"]["empty"] == 0.5
    assert summary["detection"]["mean"]["best label"] > 0.9
    assert summary["detection"]["gain"]["shuffled"]["low"] > 0.3
    assert summary["paper"]["mean"]["none"] > 0.9
    assert summary["intruder"]["mean"]["none"] > 0.8 > 0.5 > summary["intruder"]["mean"]["shuffled"]
    assert result.counts["failures"] == 0
    asked = script.requests
    # Asked again, everything is known: no request leaves.
    again = score.run(config, run)
    assert script.requests == asked
    assert again.counts["resumed"] > 0


def test_a_broken_off_job_asks_nothing_twice(measured: tuple[RunConfig, RunDir], url: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = measured
    fresh(run)
    config = with_service(config, url, concurrency=1)
    append = AnswerLog.append
    seen = []

    def stop_after_five(self: AnswerLog, key: str, record: dict[str, object]) -> None:
        append(self, key, record)
        seen.append(key)
        if len(seen) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerLog, "append", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        name.run(config, run)
    monkeypatch.undo()
    before = script.answered
    result = name.run(config, run)
    asked = result.counts["neurons"]
    assert result.counts["resumed"] == 5
    # At most the requests that were in flight at the break are asked again.
    assert before >= 5
    assert script.answered - before == asked - 5


def test_full_queues_and_dead_engines_are_waited_out_and_bad_answers_are_counted(
    measured: tuple[RunConfig, RunDir], url: str, script: Script
) -> None:
    config, run = measured
    fresh(run)
    script.faults = [429, 503, 500, chat('{"concept": 3}'), chat('{"descr', finish="length"), 400]
    result = name.run(with_service(config, url, concurrency=1), run)
    assert result.counts["retries"] == 3
    assert result.counts["without_name"] == {"refused": 1, "schema": 1, "truncated": 1}
    rows = run.read_table("names/standard.parquet").to_pylist()
    assert all(bool(r["concept"]) == (r["status"] == "ok") for r in rows)


def test_a_service_that_stays_away_ends_the_stage_with_one_line(measured: tuple[RunConfig, RunDir], url: str, script: Script) -> None:
    config, run = measured
    fresh(run)
    name.run(with_service(config, url), run)
    tree = with_service(config, url, concurrency=1, retries=0).model_dump(mode="json")
    tree["score"]["methods"] = ["detection"]
    script.faults = [503] * 1000
    run.delete("names/.answers")
    for stage in (score, name):
        with pytest.raises(ServiceError, match=r"stopped answering \(http 503, 8 requests in a row\)"):
            stage.run(validate_config(tree), run)


def test_images_that_cannot_be_read_are_counted_and_not_sent(measured: tuple[RunConfig, RunDir], url: str, script: Script, tmp_path: Path) -> None:
    config, run = measured
    fresh(run)
    (tmp_path / "empty").mkdir()
    tree = with_service(config, url).model_dump(mode="json")
    tree["data"]["root"] = str(tmp_path / "empty")
    result = name.run(validate_config(tree), run)
    assert result.counts["without_name"] == {"no readable image": result.counts["neurons"]}
    assert script.requests == 0


def test_naming_and_scoring_share_no_patient(measured: tuple[RunConfig, RunDir], url: str, script: Script) -> None:
    import json

    config, run = measured
    fresh(run)
    name.run(with_service(config, url), run)
    rows = run.read_table("names/standard.parquet").to_pylist()
    shown = {i for r in rows for i in json.loads(r["evidence"])["images"]}
    from medsae.pipeline.activations import read_images

    images = read_images(config, run).images
    naming = set(images.image_id[images.naming])
    patients = set(images.patient[images.naming]) & set(images.patient[~images.naming])
    assert shown <= naming
    assert not patients


def test_what_is_told_beside_the_images_is_warned_of_and_marked(
    measured: tuple[RunConfig, RunDir], url: str, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    import json

    config, run = measured
    fresh(run)
    with caplog.at_level("WARNING", "medsae"):
        name.run(with_service(config, url, metadata=["sex", "projection"], neurons=4), run)
    assert "a name may repeat what it was told" in caplog.text
    told = [part["text"] for part in script.bodies[0]["messages"][0]["content"] if part["type"] == "text"][1:-1]
    assert all("AP" in text for text in told)
    rows = run.read_table("names/standard.parquet").to_pylist()
    assert all(json.loads(r["evidence"])["told"] == ["sex", "projection"] for r in rows)
    # Scoring tells nothing.
    script.bodies.clear()
    score.run(with_service(config, url, metadata=["sex", "projection"], neurons=4), run)
    assert script.bodies
    assert not any("AP" in part["text"] for body in script.bodies for part in body["messages"][0]["content"] if part["type"] == "text")


def test_reports_of_the_csv_are_told_beside_the_images(measured: tuple[RunConfig, RunDir], url: str, script: Script, tmp_path: Path) -> None:
    config, run = measured
    fresh(run)
    reports = Path(config.data.root) / "train.csv"
    files = sorted(p.name for p in Path(config.data.root).glob("*.png"))
    reports.write_text("Path,Report\n" + "".join(f'{f},"No change, {f}.\nStable. {"x" * 600}"\n' for f in files))
    try:
        name.run(with_service(config, url, metadata=["projection"], columns=["Report"], neurons=2), run)
        told = [part["text"] for part in script.bodies[0]["messages"][0]["content"] if part["type"] == "text"][1:-1]
        assert all("projection AP, Report No change, 0" in text and ".png. Stable. x" in text and len(text) < 600 for text in told), told
        with pytest.raises(DataError, match="Remarks"):
            name.run(with_service(config, url, columns=["Remarks"], neurons=2), run)
        reports.write_text("Path,Report\nelsewhere.png,text\n")
        with pytest.raises(DataError, match="say nothing about any of the measured images"):
            name.run(with_service(config, url, columns=["Report"], neurons=2), run)
    finally:
        reports.unlink()


def test_errors_say_what_to_do(measured: tuple[RunConfig, RunDir], tmp_path: Path) -> None:
    config, _ = measured
    with pytest.raises(ArtifactError, match="run `medsae measure` first"):
        name.run(config, RunDir(str(tmp_path)))
    with pytest.raises(ArtifactError, match="run `medsae name` first"):
        score.run(config, RunDir(str(tmp_path)))
    tree = config.model_dump(mode="json")
    tree["name"] |= {"namer": "medgemma", "prompt": "no-such-prompt"}
    with pytest.raises(ConfigError, match="neither one of the package's"):
        name.run(validate_config(tree), RunDir(config.run))


def test_a_killed_job_goes_on_where_it_was(measured: tuple[RunConfig, RunDir], url: str, script: Script, tmp_path: Path) -> None:
    import os
    import signal
    import subprocess
    import sys
    import time

    import ray
    import yaml

    config, run = measured
    fresh(run)
    tree = with_service(config, url, concurrency=1).model_dump(mode="json")
    # The job joins this test's cluster: a SIGKILL leaves no processes behind.
    tree["ray"]["address"] = ray.get_runtime_context().gcs_address
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    script.delay = 0.3
    job = subprocess.Popen([sys.executable, "-m", "medsae.cli", "name", str(tmp_path / "config.yaml")], start_new_session=True)
    try:
        end = time.monotonic() + 300
        while len(AnswerLog(run, "names/.answers/standard").read()) < 3 and time.monotonic() < end:
            assert job.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    kept = len(AnswerLog(run, "names/.answers/standard").read())
    assert kept >= 3
    assert not run.exists("names/standard.parquet")
    script.delay = 0.0
    time.sleep(0.5)
    before = script.answered
    result = name.run(with_service(config, url), run)
    assert result.counts["resumed"] == kept
    assert script.answered - before == result.counts["neurons"] - kept


def test_vocabulary_names_need_no_service_and_are_scored_by_the_text_tower(measured: tuple[RunConfig, RunDir]) -> None:
    config, run = measured
    fresh(run)
    tree = config.model_dump(mode="json")
    tree["encoder"]["name"] = "tests.support.planted:PlantedEncoder"
    tree["name"]["namer"] = "vocabulary"
    config = validate_config(tree)
    name.run(config, run)
    rows = {r["neuron"]: r for r in run.read_table("names/standard.parquet").to_pylist()}
    assert [rows[j]["concept"] for j in range(4)] == LABELS
    assert all(rows[j]["confidence"] > 0.8 for j in range(4))
    score.run(config, run)
    summary = run.read_json("scores/standard.json")["embedding"]
    assert summary["figure"] == "auc"
    assert summary["mean"]["none"] > 0.8
    assert summary["gain"]["shuffled"]["low"] > 0.1
    assert summary["mean"]["empty"] == 0.5
    tree["encoder"]["name"] = "tests.support.planted:WordlessEncoder"
    with pytest.raises(ConfigError, match="has no text tower"):
        name.run(validate_config(tree), run)
