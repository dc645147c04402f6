"""Names that several neurons share, and names that say nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

EMPTY_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "at",
        "chest",
        "concept",
        "feature",
        "features",
        "finding",
        "findings",
        "image",
        "images",
        "in",
        "lung",
        "lungs",
        "normal",
        "of",
        "on",
        "or",
        "pattern",
        "radiograph",
        "radiographs",
        "radiology",
        "shared",
        "structure",
        "structures",
        "study",
        "the",
        "thorax",
        "thoracic",
        "unknown",
        "unspecified",
        "view",
        "visible",
        "with",
        "x-ray",
        "x-rays",
        "xray",
        "none",
    ]
)
"""Words that fit every chest radiograph: a name of nothing else says nothing."""


def canonical(concept: str) -> str:
    """Words of a name, lower case, without plural s and punctuation, in alphabetical order: `Pleural effusions` and `effusion, pleural` are one."""
    words = re.findall(r"[\w-]+", concept.casefold())
    return " ".join(sorted({_singular(w) for w in words if w not in ("a", "an", "the", "of", "with", "in", "on", "and")}))


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "is", "us")) else word


def says_nothing(concept: str) -> bool:
    """Whether a name holds no word that would not fit every chest radiograph."""
    return all(word in EMPTY_WORDS for word in re.findall(r"[\w-]+", concept.casefold()))


def group_names(names: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """What `names/NAME.json` holds: `distinct` names, the `unique` share of neurons whose name is theirs alone, `shared` groups, `say_nothing` neurons."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for neuron, concept in names:
        groups.setdefault(canonical(concept), []).append((neuron, concept))
    shared = sorted((g for g in groups.values() if len(g) > 1), key=lambda g: (-len(g), g[0][0]))
    alone = sum(len(g) == 1 for g in groups.values())
    return {
        "names": len(names),
        "distinct": len(groups),
        "unique": alone / len(names) if names else None,
        "shared": [{"concept": g[0][1], "neurons": sorted(n for n, _ in g)} for g in shared],
        "say_nothing": sorted(n for n, c in names if says_nothing(c)),
    }
