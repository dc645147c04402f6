"""Jobs and submission: the scripts in this process, and every stage as a real job of a real head."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from jobs.job import ALL, main
from medsae.artifacts import RunDir
from medsae.errors import ConfigError, ServiceError
from medsae.pipeline.stage import STAGES
from medsae.pipeline.submit import submit
from tests.support.synthetic_run import draw_image, make_run

ROOT = Path(__file__).parents[2]


def test_every_stage_has_a_script() -> None:
    for stage in [*STAGES, "run"]:
        done = subprocess.run([sys.executable, "-m", f"jobs.{stage}", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        assert f"jobs.{stage}" in done.stdout
    assert tuple(STAGES) == ALL


def test_a_users_error_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("report", [str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "c.yaml").write_text(f"run: {tmp_path}/run\n")
    assert main("report", [str(tmp_path / "c.yaml"), "sede=3"]) == 2
    assert "sede" in capsys.readouterr().err
    assert main("report", [str(tmp_path / "c.yaml")]) == 2
    assert "run `medsae measure` first" in capsys.readouterr().err


def test_a_job_does_its_stage(tmp_path: Path) -> None:
    run, data = make_run(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"run": run.uri, "data": {"root": data}}))
    assert main("report", [str(tmp_path / "c.yaml"), "report.cards=2"]) == 0
    assert run.read_bytes("report/index.html").count(b"<article") == 2
    assert "report" in run.read_manifest()["stages"]


def test_submit_refuses_before_it_submits(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="sead"):
        submit(config, ["sead=2"])
    with pytest.raises(ConfigError, match="'fitt' is not a stage"):
        submit(config, stages=["fitt"])
    with pytest.raises(ConfigError, match="lies outside"):
        submit(config, working_dir=ROOT)
    with pytest.raises(ConfigError, match="holds no jobs/"):
        submit(config, working_dir=tmp_path)
    (tmp_path / "jobs").mkdir()
    with pytest.raises(ServiceError, match="no Ray job server answers"):
        submit(config, address=f"http://127.0.0.1:{free_port()}", working_dir=tmp_path)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[str]:
    """A Ray head of this test's own, as a child that is ended by its pid; gives the dashboard's address."""
    dashboard, gcs = free_port(), free_port()
    # Not under tmp_path: a socket's path may have 107 characters at most.
    sockets = tempfile.mkdtemp(prefix="ray")
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=4", "--object-store-memory=200000000"]
    command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--include-dashboard=true", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={sockets}"]
    # A job runs `python` as the head finds it: here, this environment's.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (tmp_path / "head.log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "RAY_AUTH_MODE": "disabled", "PATH": path})
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(120):
            try:
                if httpx.get(f"{address}/api/version", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                assert child.poll() is None, (tmp_path / "head.log").read_text()[-2000:]
            time.sleep(0.5)
        yield address
    finally:
        # The head takes half a minute to end its own children; they are this test's, so they are ended here.
        family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        child.terminate()
        _, left = psutil.wait_procs(family, timeout=5)
        for process in left:
            process.kill()
        child.wait(30)
        shutil.rmtree(sockets, ignore_errors=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working directory as it is uploaded: the jobs, a configuration, nothing else; the data lie outside it."""
    folder = tmp_path / "project"
    (folder / "jobs").mkdir(parents=True)
    for script in (ROOT / "jobs").glob("*.py"):
        (folder / "jobs" / script.name).write_bytes(script.read_bytes())
    data = tmp_path / "data"
    rows = ["Path,Sex,Age,Frontal/Lateral,AP/PA,Cardiomegaly,Edema"]
    for i in range(48):
        path = f"train/patient{i:05d}/study1/view1_frontal.jpg"
        draw_image(data / path, i, 64)
        rows.append(f"{path},Male,60,Frontal,AP,{float(i % 3 == 0)},{float(i % 2)}")
    (data / "train.csv").write_text("\n".join(rows) + "\n")
    tree = {
        "run": str(tmp_path / "run"),
        "data": {"root": str(data), "format": "csv", "label_columns": ["Cardiomegaly", "Edema"], "path_column": "Path", "eval_fraction": 0.5},
        "encoder": {"name": "toy_encoders:Projection"},
        "sae": [{"dict_size": 32, "epochs": 2, "batch_size": 16}],
        "measure": {"baselines": [], "bootstrap": 100, "permutations": 10, "draws": 10},
    }
    (folder / "trial.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_as_a_job_of_a_real_head(head: str, project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "medsae")
    runtime_env = {"env_vars": {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}}
    ids = submit(project / "trial.yaml", ["seed=3"], head, working_dir=project, runtime_env=runtime_env)
    assert len(ids) == len(STAGES)
    run = RunDir(str(tmp_path / "run"))
    assert set(run.read_manifest()["stages"]) == set(STAGES)
    assert run.read_manifest()["seed"] == 3
    assert run.exists("report/index.html")
    assert any("extract: " in r.message for r in caplog.records), "the job's log is passed on"

    # The same by Ray's own command: nothing is left to do. A user's error ends a job as failed.
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", head, "--working-dir", str(project)]
    command += ["--runtime-env-json", json.dumps(runtime_env), "--"]
    again = subprocess.run([*command, "python", "-m", "jobs.run", "trial.yaml", "seed=3"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert "every stage is up to date" in again.stdout + again.stderr
    with pytest.raises(ServiceError, match=r"extract: job .* ended as FAILED"):
        submit(project / "trial.yaml", ["data.root=/nowhere"], head, ["extract", "fit"], working_dir=project, runtime_env=runtime_env)
