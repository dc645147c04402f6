"""Tiny problems run fastest on one thread; results with one thread are also the same on every machine's scheduler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from medsae.sae import sparse_ops


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def use_products(kind: str) -> None:
    """Has all problems treated as large and sparse ones are (`sparse`), or as small ones (`dense`)."""
    sparse_ops.SMALL, sparse_ops.DENSE_SHARE = (0, 1.0) if kind == "sparse" else (2**60, 0.0)


@pytest.fixture(params=["sparse", "dense"])
def products(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to take products over the active set."""
    before = sparse_ops.SMALL, sparse_ops.DENSE_SHARE
    use_products(request.param)
    yield request.param
    sparse_ops.SMALL, sparse_ops.DENSE_SHARE = before
