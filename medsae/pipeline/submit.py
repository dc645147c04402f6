"""Submits a run to a Ray cluster: a stage a job, one after the other."""

from __future__ import annotations

import asyncio
import logging
import os
import posixpath
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsae.config import load_config
from medsae.errors import ConfigError, ServiceError
from medsae.pipeline.stage import STAGES

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

log = logging.getLogger("medsae")

EXCLUDES = [".git", ".venv", ".env", ".env.*", "/runs", "/data", "*.pem", "*.key", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"]
"""What is never uploaded with the working directory, besides what `.gitignore` names: secrets, images, runs, environments."""


def submit(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    address: str = "http://127.0.0.1:8265",
    stages: Sequence[str] = tuple(STAGES),
    working_dir: str | Path = ".",
    runtime_env: dict[str, Any] | None = None,
) -> list[str]:
    """Submits each stage as a job, waits for it and passes on its log; stops at the first that fails.

    Args:
        config_path: inside `working_dir`, which is uploaded (Ray's limit: 512 MiB) and holds `jobs/`.
        overrides: `key=value`. `run` and `data.root` must name places that every node of the cluster sees.
        address: the cluster's dashboard, `http://HOST:8265`.
        stages: in this order.
        working_dir: folder to upload.
        runtime_env: what the jobs' environment has besides (`pip`, `env_vars`, ...).

    Returns:
        The ids of the jobs.

    Raises:
        ConfigError: the configuration is wrong, lies outside `working_dir` or names a stage that is none; found before anything is submitted.
        ServiceError: the cluster does not answer, or a job did not succeed.
    """
    root = Path(working_dir).resolve()
    path = Path(config_path).resolve()
    load_config(path, list(overrides))
    unknown = [s for s in stages if s not in STAGES]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is not a stage; there are {', '.join(STAGES)}")
    if not path.is_relative_to(root):
        raise ConfigError(
            f"configuration {config_path} lies outside {working_dir}, which is what the cluster gets; move it there or submit from its folder"
        )
    if not (root / "jobs").is_dir():
        raise ConfigError(f"{root} holds no jobs/; submit from the repository's folder")
    client = _client(address)
    environment = {"excludes": EXCLUDES, **(runtime_env or {}), "working_dir": str(root)}
    arguments = [posixpath.join(*path.relative_to(root).parts), *overrides]
    ids: list[str] = []
    for stage in stages:
        entrypoint = shlex.join(["python", "-m", f"jobs.{stage}", *arguments])
        try:
            job = client.submit_job(entrypoint=entrypoint, runtime_env=environment, metadata={"medsae.stage": stage})
        except (RuntimeError, ValueError, OSError) as error:
            raise ServiceError(f"{address} refused the job of {stage}: {' '.join(str(error).split())[:300]}") from error
        log.info("%s: submitted as %s", stage, job)
        ids.append(job)
        asyncio.run(_follow(client, job))
        status = client.get_job_status(job)
        if status.value != "SUCCEEDED":
            raise ServiceError(f"{stage}: job {job} ended as {status.value}; its log is above, and in `ray job logs {job} --address {address}`")
    return ids


def _client(address: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    # The commands of Ray send their token only in this mode; a cluster without authentication ignores it.
    if os.path.exists(os.path.expanduser("~/.ray/auth_token")):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ServiceError(f"no Ray job server answers at {address}: give the dashboard's address, for example http://HOST:8265") from error


async def _follow(client: JobSubmissionClient, job: str) -> None:
    """Passes the job's log on, line by line, until the job ends; goes back to waiting where the connection is cut."""
    rest = ""
    async for text in client.tail_job_logs(job):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            log.info("%s", line)
    if rest:
        log.info("%s", rest)
    while not client.get_job_status(job).is_terminal():
        await asyncio.sleep(1)
