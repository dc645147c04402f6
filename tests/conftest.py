"""Fixtures shared by the tests: one small Ray cluster a session."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SUPPORT = str(Path(__file__).parent / "support")
"""Helpers that tests and the Ray workers they start import by name."""
sys.path.insert(0, SUPPORT)
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (SUPPORT, os.environ.get("PYTHONPATH", "")) if p)
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
# Of the naming service's tests: a service's processes find it in the environment that Ray was started in.
os.environ.setdefault("MEDSAE_TEST_NAMING_KEY", "a-key-for-the-tests")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines or clusters come first: `--dist loadfile` deals files out in this order, and a long one must not be the last."""
    rank = {"vllm": 0, "slow": 1, "ray": 2}
    first: dict[str, int] = {}
    for item in items:
        here = min((rank[m.name] for m in item.iter_markers() if m.name in rank), default=3)
        first[item.nodeid.split("::")[0]] = min(here, first.get(item.nodeid.split("::")[0], 3))
    items.sort(key=lambda item: first[item.nodeid.split("::")[0]])


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with four logical CPUs; logical CPUs may exceed cores, so that actor pools never starve readers."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=400 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()
