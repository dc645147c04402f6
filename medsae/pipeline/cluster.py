"""Connects to Ray, or starts a cluster of this process's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import ray

from medsae.config import RayConfig

log = logging.getLogger("medsae")


def quiet_ray_data() -> None:
    """Keeps Ray Data's remarks out of the output, unless asked for. Its import sets its level, so this comes after it."""
    if not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("ray.data").setLevel(logging.ERROR)


_keep_open: ContextVar[bool] = ContextVar("keep_open", default=False)


@contextmanager
def shared_session() -> Iterator[None]:
    """Stages inside it share one Ray, which the first that needs it starts: what is wrong before that is said at once."""
    was_there = ray.is_initialized()
    token = _keep_open.set(True)
    try:
        yield
    finally:
        _keep_open.reset(token)
        if not was_there:
            ray.shutdown()


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Ray for the length of a stage, or of the `shared_session` around it. A connection that is already there is used and left alone."""
    if ray.is_initialized():
        yield
        return
    _connect(config)
    try:
        yield
    finally:
        if not _keep_open.get():
            ray.shutdown()


def _connect(config: RayConfig) -> None:
    verbose = log.isEnabledFor(logging.DEBUG)
    inside_job = "RAY_JOB_ID" in os.environ or "RAY_ADDRESS" in os.environ
    if config.address or inside_job:
        ray.init(address=config.address or "auto", log_to_driver=verbose, logging_level=logging.WARNING)
    else:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Logical CPUs only schedule: an actor pool must never hold all of them, or readers starve.
        cpus = config.num_cpus or max(4, os.cpu_count() or 1)
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=verbose, logging_level=logging.WARNING)


def cluster_gpus(config: RayConfig) -> int:
    """GPUs to use: those of the cluster, none where the configuration says so."""
    if config.use_gpu is False:
        return 0
    return int(ray.cluster_resources().get("GPU", 0))
