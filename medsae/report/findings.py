"""What the numbers say, in words and rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from medsae.report.format import count, num, signed
from medsae.report.load import Measured, ReportData


def _mean(m: Measured, key: str) -> float:
    value = (m.summary.get("paper_mean") or {}).get(key)
    return float(value) if value is not None else math.nan


def best_sae(data: ReportData) -> Measured:
    """The SAE of the highest mean correlation of the paper's table."""
    return max(data.saes, key=lambda m: np.nan_to_num(_mean(m, "r"), nan=-np.inf))


def headline(data: ReportData) -> dict[str, Any]:
    """A claim, the figures behind it and what keeps it from being more than that.

    With `measure/headline.json` the claim is what the interval allows; without it, only what the paper's own figure shows, with a caution.
    """
    return _tested(data, data.headline) if data.headline is not None else _untested(data)


def _tested(data: ReportData, told: dict[str, Any]) -> dict[str, Any]:
    main = data.find(told["name"]) or data.saes[0]
    r, entropy = told.get("correlation") or {}, told.get("entropy") or {}
    used = told.get("labels_used") or 0
    if not used or not all(isinstance(r.get(k), int | float) for k in ("value", "low", "high")):
        claim = "These images cannot tell the SAE’s neurons from raw features: no label varies on both halves of the patients."
        return {"claim": claim, "detail": "More images, or labels that are less rare, are needed.", "caution": None}
    if r["low"] > 0:
        claim = "The SAE’s neurons follow the labels more closely than the encoder’s own features do."
    elif r["high"] < 0:
        claim = "The SAE’s neurons follow the labels less closely than the encoder’s own features do."
    else:
        claim = "No clear difference: the SAE’s neurons follow the labels about as closely as the encoder’s own features do."
    detail = (
        f"Chosen on one half of the patients and reported on the other, the best neuron of {main.title} differs from the best raw feature by r = {signed(r)}, "
        f"mean over {used} labels with its 95 % interval; it is ahead on {told.get('labels_won')} of {used}. Entropy differs by {signed(entropy)}; lower is better."
    )
    return {"claim": claim, "detail": detail, "caution": _cautions(data, main, told) or None}


def _cautions(data: ReportData, main: Measured, told: dict[str, Any]) -> str:
    parts = []
    equal = told.get("equal_candidates")
    if equal:
        parts.append(
            f"With as many candidates on both sides ({count(equal['candidates'])}) the difference is {signed(equal['correlation'])}, range over draws."
        )
    untrained = next((c for c in told.get("comparisons") or [] if (c["name"], c["baseline"]) == (told["name"], "baseline-untrained")), None)
    if untrained:
        against = untrained["correlation"]
        plain = (told.get("correlation") or {}).get("low", 0) > 0 and against["low"] <= 0
        why = ": in correlation, training adds nothing that more candidates do not give" if plain else ""
        parts.append(f"Against an untrained SAE of the same shape it is {signed(against)}{why}.")
    null = (main.summary.get("null") or {}).get("mean")
    if null and null.get("p") is not None:
        parts.append(
            f"The mean of the table’s best correlations, {num(null.get('observed'))}, stands against {num(null.get('null_mean'))} "
            f"when labels are shuffled over patients (p = {num(null['p'], 3)})."
        )
    left = told.get("labels_left_out") or []
    if left:
        parts.append(f"{len(left)} of {len(data.labels)} labels are left out, for they do not vary on both halves: {', '.join(left)}.")
    return " ".join(parts)


def _untested(data: ReportData) -> dict[str, Any]:
    main, raw = best_sae(data), data.raw
    if raw is None:
        claim = f"The best neurons of {main.title} reach a mean correlation of {num(_mean(main, 'r'))} with the labels."
        return {"claim": claim, "detail": "The encoder’s own features were not measured, so there is nothing to compare with.", "caution": None}
    pairs = [(a["r"], b["r"]) for label in data.labels if (a := main.best(label)) and (b := raw.best(label))]
    ahead = sum(a > b for a, b in pairs)
    if not pairs:
        return {"claim": "No label has a defined correlation on these images.", "detail": "See the label counts in the table.", "caution": None}
    claim = f"On {ahead} of {len(pairs)} labels one SAE neuron has a higher correlation than any raw feature; whether that is more than chance was not measured."
    detail = (
        f"On average the best neuron of {main.title} correlates with r = {num(_mean(main, 'r'))} at entropy {num(_mean(main, 'entropy'))}, "
        f"the best raw feature with r = {num(_mean(raw, 'r'))} at entropy {num(_mean(raw, 'entropy'))}."
    )
    caution = (
        f"The best of {count(main.n_neurons)} neurons stands beside the best of {count(raw.n_neurons)} features, chosen on the images it is reported on. "
        "More candidates reach a higher maximum by chance alone."
    )
    return {"claim": claim, "detail": detail, "caution": caution}


def calibration_rows(m: Measured) -> dict[str, Any] | None:
    """The planted findings of a phantom run and what became of each; None where the truth is not known."""
    table = m.calibration
    if not table or not table.get("findings"):
        return None
    versus = table.get("versus_raw") or {}
    rows = []
    for f in table["findings"]:
        absorbed = ", ".join(f.get("absorbed_by") or [])
        if f.get("r") is None:
            verdict = "too rare to say"
        elif f.get("found"):
            verdict = "found"
        elif f.get("detected"):
            verdict = f"detected, shared with {absorbed}" if absorbed else "detected"
        else:
            verdict = f"not found, goes with {absorbed}" if absorbed else "not found"
        neurons = dict.fromkeys(n for n in f.get("neurons") or [] if n >= 0)
        names = dict.fromkeys(m.names[n]["concept"] for n in neurons if n in m.names and m.names[n]["status"] == "ok")
        gain = (versus.get("by_finding") or {}).get(f["name"]) or {}
        rows.append({**f, "verdict": verdict, "carriers": list(neurons), "names": list(names), "gain": gain.get("r")})
    rows.sort(key=lambda row: -(row["r"]["value"] if row["r"] else -1.0))
    return {"rows": rows, "versus": versus, **{k: table.get(k) for k in ("n_findings", "n_detected", "n_found", "mean_auroc", "rule", "nuisances")}}


def score_rows(m: Measured) -> list[dict[str, Any]]:
    """A row a method and control: mean score of the neurons' own names, of the control, and the gain."""
    rows = []
    for method, told in m.score_means.items():
        means = told.get("mean") or {}
        for control, gain in (told.get("gain") or {}).items():
            interval = {"value": gain["mean"], "low": gain["low"], "high": gain["high"]} if gain else None
            same = {"title": m.title, "method": method, "neurons": told.get("neurons"), "own": means.get("none"), "failures": told.get("failures")}
            rows.append({**same, "control": control, "score": means.get(control), "gain": interval})
    return rows


def probing_table(data: ReportData) -> dict[str, Any] | None:
    """AUROC of use: zero-shot, the best neuron alone, all features, and the SAE's reconstruction; None where nothing of it was measured."""
    columns: list[tuple[str, dict[str, Any]]] = []
    zero = data.saes[0].summary.get("zero_shot")
    if zero:
        columns.append(("zero-shot prompts", zero))
        columns += [(f"{m.title}: zero-shot, reconstruction", found) for m in data.saes if (found := m.summary.get("zero_shot_reconstruction"))]
    sets = ([data.raw] if data.raw else []) + data.saes
    for key, title in (("1", "one neuron"), ("5", "five neurons"), ("linear_features", "all features"), ("linear_reconstruction", "reconstruction")):
        columns += [(f"{m.title}: {title}", found) for m in sets if (found := (m.summary.get("probing") or {}).get(key))]
    if not columns:
        return None
    rows = [(label, [_auroc(values.get(label)) for _, values in columns]) for label in data.labels]
    means = [_auroc(values["mean"]) if "mean" in values else _average([row[i] for _, row in rows]) for i, (_, values) in enumerate(columns)]
    return {"titles": [title for title, _ in columns], "rows": rows, "means": means}


def _auroc(value: Any) -> float:
    value = value.get("value") if isinstance(value, dict) else value
    return float(value) if isinstance(value, int | float) else math.nan


def _average(values: list[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan
