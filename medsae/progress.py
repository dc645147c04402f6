"""Progress with rate and time left, on standard error."""

import sys

from tqdm import tqdm


def progress(total: int | None, desc: str, unit: str, initial: int = 0) -> "tqdm[None]":
    """A progress bar; on something that is not a terminal, a line at most every 10 s."""
    tty = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        initial=initial,
        file=sys.stderr,
        mininterval=0.2 if tty else 10.0,
        dynamic_ncols=tty,
        ncols=None if tty else 100,
        ascii=None if tty else True,
    )
