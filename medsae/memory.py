"""Memory that a process has freed stays with it."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt` (malloc.h)."""


def keep_freed_memory(limit: int = 2**25) -> bool:
    """Lets glibc keep freed blocks of up to `limit` bytes (32 MiB is the most that it takes) instead of giving each back to the system; returns whether it took.

    By default every array over 128 KiB to 32 MiB is mapped afresh, and each of its pages is a fault when it is first written: a quarter of the time of code that
    makes many such arrays. For worker processes: what is kept counts as theirs. Where the C library is another one, nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, limit)) & bool(mallopt(M_TRIM_THRESHOLD, limit))
