"""The report: artifacts to one self-contained HTML page and figure files."""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from medsae.artifacts import RunDir
from medsae.report import figures
from medsae.report.config import ReportConfig
from medsae.report.findings import calibration_rows, headline, probing_table, score_rows
from medsae.report.format import count, median, num, percent, signed
from medsae.report.load import Measured, ReportData, read_report_data
from medsae.report.names import extremes, name_scores, shared_names
from medsae.report.thumbnails import Thumbnails

HEAT_MAP_NEURONS = 40
TRAINING_KEYS = {
    "loss": "loss",
    "loss.mse": "reconstruction loss",
    "fvu": "unexplained variance (FVU)",
    "l0": "active neurons an image (L0)",
    "dead_share": "share of dead neurons",
}
TOP_LABELS = 4


def build_report(run: RunDir, config: ReportConfig, data_root: str) -> dict[str, bytes]:
    """Makes the report of a run from its artifacts and the images of `data_root`, and writes nothing.

    Returns:
        Path relative to the run to content: `report/index.html`, which needs no other file, and the figures (`report/*.svg`).

    Raises:
        ArtifactError: nothing was measured yet, or an artifact lacks what `docs/artifacts.md` promises.
    """
    data = read_report_data(run)
    files: dict[str, bytes] = {}
    page = _Page(data, config, Thumbnails(data_root), files)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(num=num, percent=percent, count=count, signed=signed)
    template = environment.from_string(_resource("report.html"))
    html = template.render(page.context(), css=Markup(_resource("report.css")))
    files["report/index.html"] = html.encode()
    return files


def _resource(name: str) -> str:
    return resources.files("medsae.report").joinpath(name).read_text()


class _Page:
    """Turns what was read into what the template shows."""

    def __init__(self, data: ReportData, config: ReportConfig, thumbnails: Thumbnails, files: dict[str, bytes]) -> None:
        self.data, self.config, self.thumbnails, self.files = data, config, thumbnails, files
        self.colours = figures.colours(data.everything)

    def context(self) -> dict[str, Any]:
        data = self.data
        cards = {m.name: self.cards(m) for m in data.saes}
        return {
            "title": self.config.title,
            "data": data,
            "notice": data.notice,
            "facts": self.facts(),
            "headline": headline(data),
            "colours": self.colours,
            "table": self.table({name: {c["neuron"] for c in found} for name, found in cards.items()}),
            "means": [m.summary.get("paper_mean") or {} for m in data.all],
            "dumbbell": self.figure("best-per-label", figures.dumbbell(data.raw, data.saes), self.dumbbell_alt()),
            "heat_maps": self.heat_maps(),
            "comparison": self.comparison(),
            "calibrations": [(m, rows) for m in data.saes if (rows := calibration_rows(m))],
            "probing": probing_table(data),
            "probing_curves": self.figure("probing", figures.probing_curves(data.everything), self.probing_alt()),
            "distributions": self.distributions(),
            "frontier": self.frontier(),
            "training": self.training(),
            "scored": [row for m in data.all for row in score_rows(m)],
            "score_distribution": self.score_distribution(),
            "extremes": {m.name: extremes(m) for m in data.saes},
            "shared_names": {m.name: told for m in data.saes if (told := shared_names(m))},
            "cards": cards,
            "unreadable": len(self.thumbnails.failures),
            "unreadable_reasons": sorted(set(self.thumbnails.failures.values())),
            "rejects": sorted(data.rejects.items(), key=lambda item: (-item[1], item[0])),
            "config_yaml": yaml.safe_dump(data.manifest.get("config") or {}, sort_keys=False, allow_unicode=True),
        }

    def figure(self, name: str, figure: Figure | None, alt: str) -> Markup | None:
        """Keeps a figure as a file and returns it as an element of the page."""
        if figure is None:
            return None
        svg = figures.to_svg(figure)
        self.files[f"report/{name}.svg"] = svg
        return Markup(figures.inline(svg, name, alt))

    def facts(self) -> list[tuple[str, str]]:
        data, manifest = self.data, self.data.manifest
        encoder, summary = data.encoder, data.saes[0].summary
        facts = [
            ("Encoder", f"{encoder.get('name', 'unknown')}, {encoder.get('dim', '?')} features"),
            ("Weights", "trained" if encoder.get("trained") else "not trained"),
            (
                "Images measured",
                f"{count(summary.get('n_images'))} ({ {'eval': 'held-out patients', 'train': 'training patients'}.get(str(summary.get('split')), 'all patients') })",
            ),
            ("Labels", str(len(data.labels))),
        ]
        facts += [(f"SAE {m.name}", f"{count(m.n_neurons)} neurons") for m in data.saes]
        facts.append(("Left out", f"{count(sum(data.rejects.values()))} files"))
        facts.append(("Seed", str(manifest.get("seed", "–"))))
        facts.append(("MedSAE", str((manifest.get("versions") or {}).get("medsae", "–"))))
        started = [s["started"] for s in manifest.get("stages", {}).values() if s.get("started")]
        if started:
            facts.append(("Run begun", min(started)[:10]))
        return facts

    def table(self, carded: dict[str, set[int]]) -> list[dict[str, Any]]:
        """The paper's table: a row a label, a cell a feature set; `best` marks the highest correlation of the row."""
        rows = []
        for label in self.data.labels:
            cells = [(m, m.best(label)) for m in self.data.all]
            top = max((round(cell["r"], 2) for _, cell in cells if cell), default=math.nan)
            positives = (self.data.saes[0].summary.get("label_counts") or {}).get(label, {}).get("positive")
            rows.append(
                {
                    "label": label,
                    "positives": positives,
                    "cells": [
                        {
                            "r": cell["r"],
                            "entropy": cell["entropy"],
                            "neuron": cell["neuron"],
                            "best": round(cell["r"], 2) == top,
                            "anchor": f"{m.name}-{cell['neuron']}" if cell["neuron"] in carded.get(m.name, ()) else None,
                        }
                        if cell
                        else None
                        for m, cell in cells
                    ],
                }
            )
        return rows

    def dumbbell_alt(self) -> str:
        parts = []
        for label in self.data.labels:
            values = [f"{m.title} {num(cell['r'])}" for m in self.data.all if (cell := m.best(label))]
            parts.append(f"{label}: {', '.join(values)}")
        return "Highest correlation of one neuron with each label. " + "; ".join(parts)

    def probing_alt(self) -> str:
        parts = [
            f"{m.title} {num(value, 3)} with {k}"
            for m in self.data.everything
            for k, found in (m.summary.get("probing") or {}).items()
            if (value := found.get("mean")) is not None
        ]
        return f"Mean AUROC over labels by number of neurons in the probe: {', '.join(parts)}."

    def heat_maps(self) -> list[dict[str, Any]]:
        found = []
        for m in self.data.saes:
            neurons = m.ranked(HEAT_MAP_NEURONS)
            if not neurons:
                continue
            alt = f"Heat map of the correlations of {len(neurons)} neurons of {m.name} with {len(m.labels)} labels, both clustered; all values are in measure/{m.name}/neurons.parquet."
            figure = figures.heat_map(m, self.colours[m.name], neurons)
            found.append({"name": m.name, "count": len(neurons), "svg": self.figure(f"heat-map-{m.name}", figure, alt)})
        return found

    def distributions(self) -> list[dict[str, Any]]:
        """Entropy of neurons that pass the paper's rule, highest correlation, monosemanticity, and how often neurons fire, SAEs beside baselines."""
        sets = self.data.everything
        panels = [
            (
                "entropy",
                "Entropy over labels",
                "entropy (lower: one label only)",
                sets,
                lambda m: m.columns["entropy"][m.columns["alive"].astype(bool)],
                False,
            ),
            ("correlation", "Highest correlation", "highest r of a neuron with any label", sets, lambda m: m.columns["top_r"], False),
            (
                "frequency",
                "How often neurons fire",
                "share of images a neuron fires on",
                [m for m in sets if not m.is_signed],
                lambda m: m.columns["frequency"],
                True,
            ),
        ]
        if any(np.isfinite(m.columns.get("monosemanticity", np.array([np.nan])).astype(np.float64)).any() for m in sets):
            panels.append(("monosemanticity", "Monosemanticity", "monosemanticity score", sets, lambda m: m.columns["monosemanticity"], False))
        found = []
        for key, title, xlabel, of, values, log in panels:
            medians = [f"{m.title} {num(median(values(m)), 3)}" for m in of]
            alt = f"{title}: share of neurons over {xlabel}. Medians: {', '.join(medians)}."
            svg = self.figure(f"distribution-{key}", figures.ridges(of, values, xlabel, log), alt)
            found.append({"title": title, "svg": svg, "medians": list(zip(of, medians, strict=True))})
        return found

    def score_distribution(self) -> dict[str, Any] | None:
        """Scores of names, SAE beside raw; None where no name was scored."""
        sets = [m for m in self.data.all if m.scores]
        if not sets:
            return None
        method = next(iter(sets[0].scores.values()))["method"]
        medians = [f"{m.title} {num(median(name_scores(m)), 3)} ({len(m.scores)} names)" for m in sets]
        alt = f"Scores of names by {method}: share of neurons. Medians: {', '.join(medians)}."
        figure = figures.ridges(sets, name_scores, "AUC of the name" if method == "embedding" else "balanced accuracy of the name")
        return {"svg": self.figure("distribution-name-scores", figure, alt), "medians": list(zip(sets, medians, strict=True)), "method": method}

    def comparison(self) -> dict[str, Any] | None:
        """The split-selected differences of `measure/headline.json`; None where the run has none."""
        told = self.data.headline
        if told is None:
            return None
        main = self.data.find(told["name"]) or self.data.saes[0]
        null = (main.summary.get("null") or {}).get("labels") or {}
        rows = [{"label": label, **cell, "null": null.get(label) or {}} for label, cell in told["labels"].items() if cell]
        rows.sort(key=lambda row: -row["difference"]["value"])
        points = [(row["label"], row["difference"]) for row in rows] + [("Mean over labels", told["correlation"])]
        alt = "Difference of split-selected correlation, SAE minus raw, with 95 % intervals. " + "; ".join(f"{x}: {signed(d)}" for x, d in points)
        figure = figures.forest(points, self.colours[main.name], f"correlation of {main.title} minus raw features")
        titles = {m.name: m.title for m in self.data.everything}
        return {
            "told": told,
            "rows": rows,
            "null": main.summary.get("null") or {},
            "svg": self.figure("forest", figure, alt),
            "others": [
                {**c, "a": titles.get(c["name"], c["name"]), "b": titles.get(c["baseline"], c["baseline"])} for c in told.get("comparisons") or []
            ],
        }

    def frontier(self) -> dict[str, Any] | None:
        """Reconstruction against sparsity over the run's autoencoders, on the training split; None for fewer than two."""
        rows = self.data.frontier
        if len(rows) < 2:
            return None
        points = "; ".join(f"{row['name']} L0 {num(row['l0'], 1)} FVU {num(row['fvu'], 3)}" for row in rows)
        svg = self.figure(
            "frontier",
            figures.frontier(rows),
            f"Unexplained variance over active neurons an image, a line an architecture and dictionary size. {points}.",
        )
        return {"svg": svg, "rows": rows}

    def training(self) -> list[Markup]:
        found = []
        for key, title in TRAINING_KEYS.items():
            svg = self.figure(f"training-{key}", figures.training_curve(self.data.saes, key, title), f"Training curve: {title}.")
            if svg is not None:
                found.append(svg)
        return found

    def cards(self, m: Measured) -> list[dict[str, Any]]:
        cards = []
        for neuron in m.ranked(self.config.cards):
            order = [int(c) for c in np.argsort(-np.nan_to_num(np.abs(m.r[neuron])), kind="stable")[:TOP_LABELS]]
            strongest = max((abs(float(m.r[neuron, c])) for c in order if np.isfinite(m.r[neuron, c])), default=1.0) or 1.0
            bars = [(m.labels[c], float(m.r[neuron, c]), 100 * abs(float(np.nan_to_num(m.r[neuron, c]))) / strongest) for c in order]
            named = m.names.get(neuron)
            images = [
                {"uri": self.thumbnails.uri(row["path"]), "activation": row["activation"]}
                for row in m.exemplars.get(neuron, [])[: self.config.images]
            ]
            cards.append(
                {
                    "neuron": neuron,
                    "id": f"{m.name}-{neuron}",
                    "name": named,
                    "told": json.loads(named["evidence"] or "{}").get("told") if named else None,
                    "images": images,
                    "bars": bars,
                    "wins": [label for label in m.labels if (cell := m.best(label)) and cell["neuron"] == neuron],
                    **{key: float(m.columns[key][neuron]) for key in ("top_r", "entropy", "frequency")},
                    "score": m.scores.get(neuron),
                    "confound": self.confound(m, neuron),
                    "top_label": str(m.columns["top_label"][neuron]),
                    "n_active": int(m.columns["n_active"][neuron]) if "n_active" in m.columns else None,
                }
            )
        return cards

    def confound(self, m: Measured, neuron: int) -> tuple[str, float] | None:
        """The confound that explains a neuron better than its label does, and its correlation."""
        if "confounded" not in m.columns or not bool(m.columns["confounded"][neuron]):
            return None
        name = str(m.columns["top_confound"][neuron])
        column = m.columns.get(f"confound_{name}")
        return (name, float(column[neuron])) if column is not None else None
