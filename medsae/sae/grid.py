"""Grids: one entry of the configuration that stands for an autoencoder a combination of values."""

from __future__ import annotations

import itertools
import math
from typing import Any

from pydantic import ValidationError

from medsae.sae.config import SAEConfig

KEY = "grid"
LARGEST = 1000
"""Combinations of one grid; more is a slip of the pen."""
SHORT = {"dict_size": "m", "k": "k"}
"""Options whose value is told from its name without a mark between; `architecture` goes without a name."""


def expand(entries: Any) -> Any:
    """The entries of `sae` with each `grid` replaced by its combinations, the last option varying fastest.

    `{architecture: topk, grid: {dict_size: [512, 1024], k: [4, 8]}}` gives topk-m512-k4, topk-m512-k8, topk-m1024-k4, topk-m1024-k8. Entries without a
    grid, and what is not a list of mappings, stay as they are.

    Raises:
        ValueError: one line on what is wrong with a grid.
    """
    if not isinstance(entries, list):
        return entries
    out: list[Any] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, dict) and KEY in entry:
            out += _combinations(entry, f"entry {index}")
        else:
            out.append(entry)
    return out


def _combinations(entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
    grid, rest = entry[KEY], {key: value for key, value in entry.items() if key != KEY}
    _check(grid, rest, where)
    found = []
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        stem = [] if "architecture" in point and "name" not in rest else [str(rest.get("name", rest.get("architecture", "standard")))]
        name = "-".join(stem + [_word(key, value) for key, value in point.items()])
        combined = {**rest, **point, "name": name}
        try:
            SAEConfig.model_validate(combined)
        except ValidationError as error:
            problems = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}".removeprefix(": ") for e in error.errors()]
            raise ValueError(f"{where}, grid point {name}: {'; '.join(problems)}") from None
        found.append(combined)
    return found


def _word(key: str, value: Any) -> str:
    """What a name says of an option: k8, m512, lr_0.001, or the architecture."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if key == "architecture":
        return text
    return f"{SHORT[key]}{text}" if key in SHORT else f"{key}_{text}"


def _check(grid: Any, rest: dict[str, Any], where: str) -> None:
    example = "for example grid: {dict_size: [512, 1024], k: [4, 8]}"
    if not isinstance(grid, dict) or not grid:
        raise ValueError(f"{where}: grid must be a mapping of options to lists of values, {example}")
    for key, values in grid.items():
        if key not in SAEConfig.model_fields or key in ("name", "groups"):
            raise ValueError(f"{where}: grid cannot vary {key!r}; it takes options of an SAE, {example}")
        if not isinstance(values, list) or not values or any(isinstance(v, list | dict) or v is None for v in values):
            raise ValueError(f"{where}: grid.{key} must be a list of numbers or words, {example}")
        if len({_word(key, v) for v in values}) != len(values):
            raise ValueError(f"{where}: grid.{key} holds a value twice: {values}")
        if key in rest:
            raise ValueError(f"{where}: {key} stands in grid and beside it; keep one")
    count = math.prod(len(values) for values in grid.values())
    if count > LARGEST:
        raise ValueError(f"{where}: grid has {count} combinations, at most {LARGEST} are taken; shorten its lists")
