"""On phantoms, whose truth is known: do the neurons that carry what was planted bear its name?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medsae.metrics.calibration import CARRIED


@dataclass(frozen=True)
class Planted:
    """Something planted: its column of `calibration.json`, the names that say it, those that say its opposite (for a neuron that falls where the column
    rises), and what stands for it where the column does not vary. Names in lower case."""

    name: str
    column: str
    names: frozenset[str]
    opposite: frozenset[str] = frozenset()
    instead: Planted | None = None


def _sided(*terms: str) -> frozenset[str]:
    return frozenset(f"{side}{term}" for term in terms for side in ("", "left ", "right "))


PLANTED = (
    Planted("cardiomegaly", "cardiomegaly", frozenset({"enlarged heart", "severe cardiomegaly", "cardiomegaly", "large heart shadow"})),
    Planted("edema", "edema", frozenset({"pulmonary edema", "severe edema", "edema", "interstitial edema"})),
    Planted("effusion", "effusion", _sided("pleural effusion", "large pleural effusion", "small pleural effusion")),
    Planted("pneumothorax", "pneumothorax", _sided("pneumothorax")),
    Planted(
        "consolidation",
        "consolidation",
        _sided("consolidation") | {"consolidation in the upper lobe", "consolidation in the lower lobe", "lobar consolidation"},
    ),
    Planted("atelectasis", "atelectasis", _sided("atelectasis") | {"linear atelectasis", "basal atelectasis"}),
    Planted("nodule", "nodule", _sided("lung nodule")),
    Planted("fracture", "fracture", _sided("rib fracture")),
    Planted("lines and tubes", "lines", frozenset({"central line", "central venous catheter", "endotracheal tube", "ecg leads"})),
    Planted("pacemaker", "pacemaker", frozenset({"pacemaker"})),
    Planted("exposure", "exposure", frozenset({"overexposed image"}), frozenset({"underexposed image"})),
    Planted(
        "rotation",
        "rotation",
        frozenset({"rotated to the left", "rotated patient"}),
        frozenset({"rotated to the right", "rotated patient"}),
    ),
    Planted(
        "view",
        "lateral",
        frozenset({"lateral view"}),
        instead=Planted("view", "ap", frozenset({"ap view", "anteroposterior view"}), frozenset({"pa view", "posteroanterior view"})),
    ),
    Planted("sex", "female", frozenset({"female patient"}), frozenset({"male patient"})),
)
"""The phantom's findings and nuisances that a name is asked for."""

RULE = (
    "the neuron of highest |r| with the truth, chosen on one half of the patients and reported on the other, both ways round; its name is right where r is at "
    f"least {CARRIED} and the neurons of both halves bear a name that says so. It is carried under its name where any neuron with such a name has |r| of at "
    f"least {CARRIED}, of the right sign, on each half"
)


def planted_names(calibration: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """What `names/NAME.json` holds under `planted`.

    Args:
        calibration: `calibration.json` of the same features.
        names: neuron to name, of those that have one.

    Returns:
        `rule`; `named` and `carried` of `of`; and `concepts`, each with `name`, `column`, `neurons` (one a half), `r` (as in `calibration.json`, or None),
        `auroc`, `names` (of these neurons, None where there is none), `named` (bool) and `bearer`: the strongest neuron whose name says so (`neuron`, `name`,
        `r` on each half), or None.
    """
    rows = {row["name"]: row for part in ("findings", "sides", "nuisances") for row in calibration.get(part) or []}
    concepts = [_concept(planted, rows, names) for planted in PLANTED]
    return {"rule": RULE, "of": len(concepts), "named": _count(concepts, "named"), "carried": _count(concepts, "bearer"), "concepts": concepts}


def _concept(planted: Planted, rows: Mapping[str, Mapping[str, Any]], names: Mapping[int, str]) -> dict[str, Any]:
    row = rows.get(planted.column) or {}
    if not row.get("r") and planted.instead is not None:
        return _concept(planted.instead, rows, names)
    r, neurons, signs = row.get("r"), list(row.get("neurons") or []), list(row.get("signs") or [])
    borne = [names.get(n) for n in neurons]
    says = [_says(planted, name, sign) for name, sign in zip(borne, signs, strict=True)]
    bearers = [
        {"neuron": one["neuron"], "name": names[one["neuron"]], "r": one["r"]}
        for one in row.get("replicated") or []
        if _says(planted, names.get(one["neuron"]), one["r"][0])
    ]
    return {
        "name": planted.name,
        "column": planted.column,
        "neurons": neurons,
        "r": r,
        "auroc": row.get("auroc"),
        "names": borne,
        "named": r is not None and r["value"] >= CARRIED and bool(says) and all(says),
        "bearer": bearers[0] if bearers else None,
    }


def _says(planted: Planted, name: str | None, sign: float) -> bool:
    return name is not None and name.casefold() in (planted.names if sign > 0 else planted.opposite)


def _count(concepts: list[dict[str, Any]], key: str) -> int:
    return sum(bool(c[key]) for c in concepts)
