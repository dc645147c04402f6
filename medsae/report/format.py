"""Numbers for people."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def num(value: Any, digits: int = 2) -> str:
    """A number for people, with a true minus; an en dash where it is undefined."""
    if not isinstance(value, int | float | np.number) or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def percent(value: Any, digits: int = 0) -> str:
    """A share as a percentage."""
    return "–" if num(value) == "–" else f"{num(100 * value, digits)} %"


def count(value: Any) -> str:
    """An integer with thin spaces between thousands."""
    return "–" if num(value) == "–" else f"{int(value):,}".replace(",", "\u202f")


def signed(interval: Any, digits: int = 2) -> str:
    """A difference with its interval, `{value, low, high}`, as words: `+0.10 (0.02 to 0.18)`."""
    if not isinstance(interval, dict) or num(interval.get("value")) == "–":
        return "–"
    sign = "+" if interval["value"] >= 0 else ""
    return f"{sign}{num(interval['value'], digits)} ({num(interval.get('low'), digits)} to {num(interval.get('high'), digits)})"


def median(values: np.ndarray) -> float:
    """The median of what is finite; NaN of nothing."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan
