"""What the report says of names: how they score, the best and the worst, and which are shared or empty."""

from __future__ import annotations

from typing import Any

import numpy as np

from medsae.report.load import Measured

EXTREMES = 5
GROUPS = 12


def name_scores(m: Measured) -> np.ndarray:
    """Scores of the neurons' own names [scored neurons], by the method that their cards show."""
    return np.array([row["figure"] for row in m.scores.values()], np.float64)


def extremes(m: Measured, count: int = EXTREMES) -> list[dict[str, Any]]:
    """The names that hold up best, then those that hold up worst, each with its controls; no name twice."""
    scored = sorted((r for n, r in m.scores.items() if np.isfinite(r["figure"]) and n in m.names), key=lambda r: (-r["figure"], r["neuron"]))
    best = scored[:count]
    worst = scored[max(len(best), len(scored) - count) :]
    rows = [("best", r) for r in best] + [("worst", r) for r in worst]
    return [
        {"end": end, "neuron": r["neuron"], "concept": m.names[r["neuron"]]["concept"], **{k: r[k] for k in ("figure", "controls")}}
        for end, r in rows
    ]


def shared_names(m: Measured, count: int = GROUPS) -> dict[str, Any] | None:
    """Names that several neurons bear, the most frequent first, and names that say nothing; None where no names were compared."""
    told = m.name_figures
    if not told:
        return None
    groups = [g for g in told.get("shared") or [] if g["neurons"]]
    empty = [{"neuron": n, "concept": m.names[n]["concept"]} for n in told.get("say_nothing") or [] if n in m.names]
    return {**told, "groups": groups[:count], "more": max(0, len(groups) - count), "empty": empty}
