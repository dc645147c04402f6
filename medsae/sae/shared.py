"""Memory that the workers of one node share: parameters that each updates a part of, and gradients on their way to whoever updates them."""

from __future__ import annotations

import math
import mmap
import os

import torch
from torch import Tensor

from medsae.sae.collective import Collective

TOKEN = 8
"""Bytes at the end by which workers know that they have mapped the same memory."""


def shared_tensor(collective: Collective, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A tensor of zeros in memory that all workers see; None, for all of them, where they do not run on one node (or the system has no memfd).

    It has no name: it is gone when the last of the workers is.
    """
    size = math.prod(shape) * dtype.itemsize
    handle = torch.zeros(3, dtype=torch.int64)
    view, descriptor, token = None, None, os.urandom(TOKEN - 1) + b"\0"
    if collective.rank == 0:
        try:
            descriptor = os.memfd_create("medsae")
            os.ftruncate(descriptor, size + TOKEN)
            view = mmap.mmap(descriptor, size + TOKEN)
            view[size:] = token
            handle[:] = torch.tensor([os.getpid(), descriptor, int.from_bytes(token, "little")])
        except (AttributeError, OSError):
            view = None
    pid, theirs, number = collective.broadcast(handle).tolist()
    if collective.rank != 0 and pid:
        try:
            descriptor = os.open(f"/proc/{pid}/fd/{theirs}", os.O_RDWR)
            view = mmap.mmap(descriptor, size + TOKEN)
            view = view if view[size:] == number.to_bytes(TOKEN, "little") else None
        except (OSError, ValueError):
            view = None
    everyone = bool(collective.min(torch.tensor(view is not None, dtype=torch.int64)))
    if descriptor is not None:
        os.close(descriptor)  # the mapping keeps one of its own
    if not everyone or view is None:
        return None
    return torch.frombuffer(view, dtype=dtype, count=math.prod(shape)).view(shape)
