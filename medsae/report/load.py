"""What the report reads: the artifacts of a run, as small typed objects. Optional artifacts may be missing."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from medsae.artifacts import RAW, RunDir
from medsae.errors import ArtifactError


@dataclass(frozen=True)
class Measured:
    """One set of features as measured: an SAE's neurons, or the encoder's own (`raw`).

    `r` float64 [m, C]: Pearson correlation of every neuron with every label, NaN where undefined. `order`: neurons, best first.
    """

    name: str
    summary: dict[str, Any]
    columns: dict[str, np.ndarray]
    labels: list[str]
    r: np.ndarray
    exemplars: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    names: dict[int, dict[str, Any]] = field(default_factory=dict)
    scores: dict[int, dict[str, Any]] = field(default_factory=dict)
    score_means: dict[str, Any] = field(default_factory=dict)
    name_figures: dict[str, Any] = field(default_factory=dict)
    training: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] | None = None

    @property
    def is_raw(self) -> bool:
        return self.name == RAW

    @property
    def is_baseline(self) -> bool:
        return self.name.startswith("baseline-")

    @property
    def is_signed(self) -> bool:
        """Features that have a sign: how often they are above zero says nothing."""
        return self.is_raw or self.name in {"baseline-rotation", "baseline-pca", "baseline-ica"}

    @property
    def title(self) -> str:
        return "raw features" if self.is_raw else self.name.removeprefix("baseline-")

    @property
    def n_neurons(self) -> int:
        return len(self.r)

    def best(self, label: str) -> dict[str, Any] | None:
        """The paper's cell of a label: the neuron of highest r, its r and entropy; None where no neuron has one."""
        cell = self.summary.get("paper_table", {}).get(label)
        return cell if cell and _finite(cell.get("r")) else None

    def ranked(self, count: int) -> list[int]:
        """Neurons worth a card: the best of every label first, then by highest correlation; at most `count`, in order of that correlation."""
        top = np.nan_to_num(self.columns["top_r"].astype(np.float64), nan=-np.inf)
        winners = [cell["neuron"] for cell in map(self.best, self.labels) if cell is not None]
        winners.sort(key=lambda neuron: -top[neuron])
        chosen = dict.fromkeys(winners[:count])
        for neuron in np.argsort(-top, kind="stable"):
            if len(chosen) >= count or not math.isfinite(top[neuron]):
                break
            chosen.setdefault(int(neuron))
        return sorted(chosen, key=lambda neuron: -top[neuron])


@dataclass(frozen=True)
class ReportData:
    """All that the report shows of a run. `baselines`: what else was measured the same way; `frontier`: rows of `sae/frontier.json`."""

    manifest: dict[str, Any]
    raw: Measured | None
    saes: list[Measured]
    baselines: list[Measured]
    rejects: Counter[tuple[str, str]]
    headline: dict[str, Any] | None
    frontier: list[dict[str, Any]]

    @property
    def all(self) -> list[Measured]:
        return ([self.raw] if self.raw else []) + self.saes

    @property
    def everything(self) -> list[Measured]:
        """Raw features, SAEs, baselines."""
        return self.all + self.baselines

    def find(self, name: str) -> Measured | None:
        """What was measured under a name."""
        return next((m for m in self.everything if m.name == name), None)

    @property
    def labels(self) -> list[str]:
        return self.all[0].labels

    @property
    def encoder(self) -> dict[str, Any]:
        return dict(self.manifest.get("encoder") or {})

    @property
    def notice(self) -> str | None:
        notice = self.encoder.get("notice")
        return str(notice) if notice else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _optional_json(run: RunDir, path: str) -> dict[str, Any] | None:
    return run.read_json(path) if run.exists(path) else None


def _optional_table(run: RunDir, path: str) -> pa.Table | None:
    return run.read_table(path) if run.exists(path) else None


def _read_names(run: RunDir, name: str) -> dict[int, dict[str, Any]]:
    """One name a neuron: an `ok` name goes before none, another namer's before the mere label."""
    table = _optional_table(run, f"names/{name}.parquet")
    found: dict[int, dict[str, Any]] = {}
    for row in table.to_pylist() if table is not None else []:
        known = found.get(row["neuron"])
        if known is None or _name_rank(row) > _name_rank(known):
            found[row["neuron"]] = row
    return found


def _name_rank(row: dict[str, Any]) -> tuple[bool, bool]:
    return row["status"] == "ok", row["namer"] != "label"


METHODS = ("detection", "embedding", "paper", "labels")
"""Ways of scoring a name, the most telling first: a card shows one."""


def _read_scores(run: RunDir, name: str) -> dict[int, dict[str, Any]]:
    """Per neuron the row of its own name by the first of `METHODS` that scored any, with its `figure` (the AUC of `embedding`, whose threshold is only a
    median, else the balanced accuracy) and the same of the controls, as `controls`."""
    table = _optional_table(run, f"scores/{name}.parquet")
    rows = table.to_pylist() if table is not None else []
    method = next((m for m in METHODS if any(row["method"] == m for row in rows)), None)
    figure = "auc" if method == "embedding" else "balanced_accuracy"
    mine = {r["neuron"]: {**r, "figure": r[figure], "controls": {}} for r in rows if r["method"] == method and r["control"] == "none"}
    for row in rows:
        if row["method"] == method and row["control"] != "none" and row["neuron"] in mine:
            mine[row["neuron"]]["controls"][row["control"]] = row[figure]
    return mine


def _read_training(run: RunDir, name: str) -> list[dict[str, Any]]:
    path = f"sae/{name}/training.jsonl"
    if name == RAW or not run.exists(path):
        return []
    rows = [json.loads(line) for line in run.read_bytes(path).decode().splitlines() if line.strip()]
    # A dictionary of named losses becomes a column each.
    return [{k: v for row_k, row_v in row.items() for k, v in _flat(row_k, row_v)} for row in rows]


def _flat(key: str, value: Any) -> list[tuple[str, Any]]:
    return [(f"{key}.{k}", v) for k, v in value.items()] if isinstance(value, dict) else [(key, value)]


def read_measured(run: RunDir, name: str) -> Measured:
    """One name under `measure/` with everything that hangs on it.

    Raises:
        ArtifactError: a required artifact is missing or lacks a column.
    """
    summary = run.read_json(f"measure/{name}/summary.json")
    labels = list(summary["labels"])
    table = run.read_table(f"measure/{name}/neurons.parquet")
    missing = [
        c for c in [f"r_{label}" for label in labels] + ["entropy", "top_r", "top_label", "frequency", "dead", "alive"] if c not in table.column_names
    ]
    if missing:
        raise ArtifactError(f"measure/{name}/neurons.parquet has no column {missing[0]!r}; run `medsae measure` again")
    columns = {c: np.asarray(table[c].to_numpy(zero_copy_only=False)) for c in table.column_names}
    r = np.stack([columns.pop(f"r_{label}").astype(np.float64) for label in labels], axis=1)
    exemplars: dict[int, list[dict[str, Any]]] = {}
    examples = _optional_table(run, f"measure/{name}/exemplars.parquet")
    for row in examples.to_pylist() if examples is not None else []:
        if row["role"] != "negative":
            exemplars.setdefault(row["neuron"], []).append(row)
    for rows in exemplars.values():
        rows.sort(key=lambda row: -row["activation"])
    return Measured(
        name=name,
        summary=summary,
        columns=columns,
        labels=labels,
        r=r,
        exemplars=exemplars,
        names=_read_names(run, name),
        scores=_read_scores(run, name),
        score_means=_optional_json(run, f"scores/{name}.json") or {},
        name_figures=_optional_json(run, f"names/{name}.json") or {},
        training=_read_training(run, name),
        calibration=_optional_json(run, f"measure/{name}/calibration.json"),
    )


def read_report_data(run: RunDir) -> ReportData:
    """Everything that the report needs.

    Raises:
        ArtifactError: nothing was measured yet, or an artifact lacks what the contract promises.
    """
    manifest = run.read_manifest()
    measured = [n for n in run.folders("measure") if run.exists(f"measure/{n}/summary.json")]
    trained = [n for n in measured if run.exists(f"sae/{n}/cfg.json")]
    # Folders of SAEs that an earlier configuration of this run had are not this run's result.
    configured = [s["name"] for s in (manifest.get("config") or {}).get("sae") or []]
    saes = [n for n in configured if n in trained] if configured else trained
    if not saes:
        raise ArtifactError(f"{run.path('measure')} holds no measured SAE; run `medsae measure` first")
    rejects = _optional_table(run, "rejects.parquet")
    rows = rejects.to_pylist() if rejects is not None else []
    return ReportData(
        manifest=manifest,
        raw=read_measured(run, RAW) if RAW in measured else None,
        saes=[read_measured(run, n) for n in saes],
        baselines=[read_measured(run, n) for n in measured if n != RAW and n not in trained],
        rejects=Counter((row["stage"], row["reason"]) for row in rows),
        headline=_optional_json(run, "measure/headline.json"),
        frontier=[row for row in run.read_json("sae/frontier.json") if row["name"] in saes] if run.exists("sae/frontier.json") else [],
    )
