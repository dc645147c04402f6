"""Calibration on phantoms, where the severity of every finding in every image is known: how far can the metrics be believed?"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from medsae.metrics.comparison import mean_interval
from medsae.metrics.detection import auroc
from medsae.metrics.inference import FOLDS, Interval, Selected
from medsae.metrics.targets import KeyedRows

DETECTED = 0.8
"""AUROC of a finding's best neuron on unseen patients from which the finding counts as detected."""
CARRIED = 0.2
"""|r| from which a neuron carries something: the rule by which neurons count as alive (arXiv 2510.26411)."""
MOST = 50
"""Replicated neurons that are listed for a truth column."""
SPLIT_SHARE = 0.5
"""A neuron carries a share of a finding when it correlates with it more than with any other and at least this share of the best neuron's |r|."""
SIDES = ("_left", "_right")
TEXT_COLUMNS = {"female": ("sex", "Female"), "ap": ("projection", "AP"), "lateral": ("view", "lateral")}
"""Columns that are made of a text column: 1 where it says so, else 0."""
GROUPS = {"lines": ("central_line", "endotracheal_tube", "ecg_leads")}
"""Columns that are made of several: the highest of them."""


def read_truth(data: bytes, findings: Iterable[str]) -> KeyedRows | None:
    """`truth.csv` of a phantom folder: `Path` and numbers, found by image key; None where it holds no severity of the `findings`.

    Columns that are not numbers are left out. A path may begin with the folder's own name, which image ids do not contain: both readings are keys.
    A finding with a column a side (`effusion_left`, `effusion_right`) gets one more column, `effusion`: the worse of both. `TEXT_COLUMNS` and `GROUPS`
    follow where the file has what they are made of.
    """
    rows = list(csv.reader(io.StringIO(data.decode())))
    header, body = rows[0], rows[1:]
    if not set(findings) & set(header) or not body:
        return None
    readings = [p for r in body for p in (r[0], r[0].split("/", 1)[-1])]
    keys = np.array([int(hashlib.sha256(p.encode()).hexdigest()[:16], 16) for p in readings], np.uint64)
    names: list[str] = []
    columns: list[np.ndarray] = []
    for i, name in enumerate(header[1:], start=1):
        try:
            columns.append(np.array([float(r[i]) for r in body]))
        except ValueError:
            continue
        names.append(name)
    for stem in dict.fromkeys(n.removesuffix(SIDES[0]) for n in names if n.endswith(SIDES[0])):
        if stem + SIDES[1] in names:
            columns.append(np.maximum(columns[names.index(stem + SIDES[0])], columns[names.index(stem + SIDES[1])]))
            names.append(stem)
    for name, (text, value) in TEXT_COLUMNS.items():
        if text in header:
            columns.append(np.array([float(r[header.index(text)] == value) for r in body]))
            names.append(name)
    for name, members in GROUPS.items():
        if set(members) <= set(names):
            columns.append(np.max([columns[names.index(m)] for m in members], axis=0))
            names.append(name)
    order = np.argsort(keys)
    return KeyedRows(names, keys[order], np.repeat(np.column_stack(columns), 2, axis=0)[order])


@dataclass(frozen=True)
class TruthColumns:
    """Indices into the truth's columns: whole findings, parts (one side of them) and groups, and all else (nuisances)."""

    findings: list[int]
    sides: list[int]
    nuisances: list[int]

    @classmethod
    def of(cls, names: list[str], findings: Iterable[str]) -> TruthColumns:
        """Sorts column names, given the names of the columns that hold severities."""
        planted = set(findings)
        sided = [i for i, n in enumerate(names) if n in planted and n.endswith(SIDES)]
        stems = {names[i].removesuffix(SIDES[0]).removesuffix(SIDES[1]) for i in sided}
        whole = [i for i, n in enumerate(names) if (n in planted and i not in sided) or n in stems]
        parts = sided + [i for i, n in enumerate(names) if n in GROUPS]
        return cls(whole, parts, [i for i in range(len(names)) if i not in whole and i not in parts])


@dataclass(frozen=True)
class Calibrated:
    """What the comparison of two sets of features needs: per truth column the reported r [K], its bootstrap draws [B, K], AUROC [K] (NaN where
    the column is not a finding or too rare)."""

    name: str
    r: np.ndarray
    draws: np.ndarray
    auroc: np.ndarray


def reported_auroc(chosen: Selected, activations: dict[int, np.ndarray], truth: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """AUROC of presence (severity above 0) by the chosen neuron on the half that played no part in the choice, mean of both [K].

    An activation counts with the sign that its r had where the neuron was chosen.
    """
    out = np.full((FOLDS, truth.shape[1]), np.nan)
    for f in range(FOLDS):
        rows = fold == 1 - f
        for k, j in enumerate(chosen.neurons[f]):
            if j >= 0:
                severity = truth[rows, k]
                out[f, k] = auroc(chosen.sign[f, k] * activations[int(j)][rows], np.where(np.isnan(severity), np.nan, severity > 0))
    return np.asarray(out.mean(0))


def replicated(first: np.ndarray, second: np.ndarray) -> list[dict[str, Any]]:
    """Neurons whose correlations [m] with a truth column reach `CARRIED` with one sign on both halves of the patients, the strongest `MOST` by the weaker half."""
    first, second = np.nan_to_num(first), np.nan_to_num(second)
    weaker = np.where(first * second > 0, np.minimum(np.abs(first), np.abs(second)), 0.0)
    order = np.argsort(-weaker, kind="stable")[:MOST]
    return [{"neuron": int(j), "r": [round(float(first[j]), 4), round(float(second[j]), 4)]} for j in order if weaker[j] >= CARRIED]


def calibration(
    calibrated: Calibrated, chosen: Selected, halves: list[np.ndarray], whole: np.ndarray, truth: np.ndarray, names: list[str], columns: TruthColumns
) -> dict[str, Any]:
    """The figures of `calibration.json`.

    Args:
        calibrated: reported figures of the chosen neurons.
        chosen: the choice by |r| with each truth column on each half.
        halves, whole: correlations [m, K] with the truth on each half and on all images.
        truth: severities [N, K].
        names: of the K columns.
        columns: which of them are findings.
    """
    rivals = columns.findings
    strength = np.abs(np.nan_to_num(whole))
    owner = np.array(rivals)[strength[:, rivals].argmax(1)] if rivals else np.zeros(len(whole), int)

    def row(k: int, finding: bool) -> dict[str, Any]:
        present = truth[:, k] > 0
        out: dict[str, Any] = {"name": names[k], "neurons": chosen.neurons[:, k].tolist(), "signs": np.sign(chosen.sign[:, k]).astype(int).tolist()}
        defined = np.isfinite(calibrated.r[k])
        out["r"] = Interval.of(calibrated.r[k], calibrated.draws[:, k]).as_dict() if defined else None
        out["auroc"] = float(calibrated.auroc[k])
        out["replicated"] = replicated(halves[0][:, k], halves[1][:, k])
        if finding:
            out["positive"] = int(present.sum())
        if k not in rivals:
            return out
        stronger = set()
        for f in range(FOLDS):
            j = chosen.neurons[f, k]
            if j >= 0:
                there = np.abs(np.nan_to_num(halves[1 - f][j, rivals]))
                if there.max() > there[rivals.index(k)]:
                    stronger.add(names[rivals[int(there.argmax())]])
        best = strength[:, k].max(initial=0.0)
        out["detected"] = bool(calibrated.auroc[k] >= DETECTED)
        out["found"] = out["detected"] and not stronger
        out["absorbed_by"] = sorted(stronger)
        out["split_over"] = int(((owner == k) & (strength[:, k] >= SPLIT_SHARE * best)).sum()) if best > 0 else 0
        return out

    findings = [row(k, True) for k in columns.findings]
    used = [k for k in columns.findings if np.isfinite(calibrated.r[k])]
    return {
        "name": calibrated.name,
        "rule": f"detected: AUROC of at least {DETECTED} on patients that played no part in the choice of the neuron; found: detected, and the neuron "
        "correlates with no other finding more",
        "findings": findings,
        "sides": [row(k, True) for k in columns.sides],
        "nuisances": [row(k, False) for k in columns.nuisances],
        "n_findings": len(used),
        "n_detected": sum(bool(f["detected"]) for f in findings),
        "n_found": sum(bool(f["found"]) for f in findings),
        "mean_r": mean_interval(calibrated.r, calibrated.draws, used),
        "mean_auroc": float(np.nanmean(calibrated.auroc[used])) if used else None,
    }


def versus(ours: Calibrated, base: Calibrated, names: list[str], columns: TruthColumns) -> dict[str, Any]:
    """How often and by how much our best neuron beats the baseline's on the planted findings."""
    used = [k for k in columns.findings if np.isfinite(ours.r[k] + base.r[k])]
    auc = ours.auroc - base.auroc
    return {
        "baseline": base.name,
        "findings": len(used),
        "won_r": sum(bool(ours.r[k] > base.r[k]) for k in used),
        "won_auroc": sum(bool(auc[k] > 0) for k in used),
        "mean_r": mean_interval(ours.r - base.r, ours.draws - base.draws, used),
        "mean_auroc": float(np.nanmean(auc[used])) if used else None,
        "by_finding": {
            names[k]: {"r": Interval.of(ours.r[k] - base.r[k], ours.draws[:, k] - base.draws[:, k]).as_dict(), "auroc": float(auc[k])} for k in used
        },
    }
