"""One synthetic run, shared by tests that only read."""

from __future__ import annotations

import pytest

from medsae.artifacts import RunDir
from tests.support.synthetic_run import make_run


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, str]:
    """A run with two SAEs, and its `data.root`."""
    return make_run(tmp_path_factory.mktemp("report"), saes=("standard", "topk-small"))
