"""The report's figures, drawn by matplotlib as SVG.

Every colour is one of `PALETTE`. In the page each becomes a CSS variable, so that one drawing serves light and dark; the files keep the light colours.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage

from medsae.report.load import Measured

PALETTE = {
    "ink": "#1c2126",
    "muted": "#5d6873",
    "line": "#dce1e6",
    "raw": "#c2761a",
    "sae-1": "#0d7a74",
    "sae-2": "#5b4bc4",
    "sae-3": "#b83280",
    "sae-4": "#5f8f1f",
    "base": "#8a949e",
}
"""CSS variable to its colour in the light scheme."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "medsae",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": PALETTE["ink"],
    "axes.edgecolor": PALETTE["muted"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.titlecolor": PALETTE["ink"],
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": PALETTE["line"],
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def colours(measured: list[Measured]) -> dict[str, str]:
    """Name under `measure/` to its palette entry: raw has its own, baselines share one, SAEs take turns."""
    saes = [m.name for m in measured if not m.is_raw and not m.is_baseline]
    return {m.name: "raw" if m.is_raw else "base" if m.is_baseline else f"sae-{saes.index(m.name) % 4 + 1}" for m in measured}


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def to_svg(figure: Figure) -> bytes:
    """A figure as SVG without a date, so that the same figure gives the same bytes."""
    sink = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return sink.getvalue()


def inline(svg: bytes, name: str, alt: str) -> str:
    """An SVG file as an element of the page: no prologue, no address, ids of its own, colours and font from the page's style sheet."""
    from html import escape

    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--sans)", text)
    for variable, colour in PALETTE.items():
        text = text.replace(colour, f"var(--{variable})")
    label = escape(alt, quote=True)
    return re.sub(r'<svg width="([\d.]+)pt" height="[\d.]+pt"', rf'<svg role="img" aria-label="{label}" style="--width: \1px"', text, count=1)


def dumbbell(raw: Measured | None, saes: list[Measured]) -> Figure:
    """For every label the best raw feature's and the best SAE neuron's correlation, joined; sorted by the first SAE's."""
    sets = ([raw] if raw else []) + saes
    colour = colours(sets)
    labels = [label for label in sets[0].labels if any(m.best(label) for m in sets)]
    labels.sort(key=lambda label: (saes[0].best(label) or {"r": -1.0})["r"])
    with _figure(7.4, 0.9 + 0.3 * len(labels)) as (figure, ax):
        for y, label in enumerate(labels):
            values = [cell["r"] for m in sets if (cell := m.best(label))]
            ax.plot([min(values), max(values)], [y, y], color=PALETTE["line"], linewidth=3.2, solid_capstyle="round", zorder=1)
        for m in sets:
            points = [(cell["r"], y) for y, label in enumerate(labels) if (cell := m.best(label))]
            xs, ys = zip(*points, strict=True) if points else ((), ())
            marker = "D" if m.is_raw else "o"
            ax.scatter(xs, ys, s=30 if m.is_raw else 48, marker=marker, color=PALETTE[colour[m.name]], label=m.title, zorder=3)
        ax.set_yticks(range(len(labels)), labels)
        ax.tick_params(axis="y", colors=PALETTE["ink"], labelsize=9.5)
        ax.set_xlabel("highest correlation of one neuron with the label")
        ax.set_ylim(-0.6, len(labels) - 0.4)
        ax.grid(axis="x")
        ax.grid(False, axis="y")
        ax.spines["left"].set_visible(False)
        figure.legend(loc="outside upper right", ncols=len(sets), handletextpad=0.2)
    return figure


def heat_map(m: Measured, colour: str, neurons: list[int]) -> Figure:
    """Correlations of neurons (columns) with labels (rows), both in the order of average-linkage clustering.

    The colour's strength is |r|: one hue above zero, the other below, so that zero is the page itself.
    """
    r = np.nan_to_num(m.r[neurons]).T
    rows, columns = _leaf_order(r), _leaf_order(r.T)
    r = r[rows][:, columns]
    top = max(float(np.abs(r).max()), 1e-9)
    with _figure(10.6, 1.25 + 0.25 * len(rows)) as (figure, ax):
        # One collection: hundreds of patches of their own take seconds.
        cells = [[(j + x, i + y) for x, y in ((-0.47, -0.46), (0.47, -0.46), (0.47, 0.46), (-0.47, 0.46))] for i, j in np.ndindex(r.shape)]
        shades = [to_rgba(PALETTE[colour if value >= 0 else "raw"], abs(float(value)) / top) for value in r.ravel()]
        mesh = ax.add_collection(PolyCollection(cells, facecolors=shades, linewidths=0), autolim=False)
        mesh.set_in_layout(False)
        ax.set_xlim(-0.5, len(columns) - 0.5)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_yticks(range(len(rows)), [m.labels[i] for i in rows])
        ax.set_xticks(range(len(columns)), [str(neurons[j]) for j in columns], rotation=90)
        ax.tick_params(axis="y", colors=PALETTE["ink"], labelsize=9)
        ax.tick_params(axis="x", length=0, labelsize=7.5)
        ax.set_xlabel("neuron")
        ax.grid(False)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        _heat_key(ax, colour, top)
    return figure


def _heat_key(ax: Axes, colour: str, top: float) -> None:
    """Nine swatches from -top to +top above the map, at the right."""
    key = ax.inset_axes((0.78, 1.02, 0.22, 0.05 * 14 / max(ax.get_ylim()[0] + 0.5, 1)))
    for k, value in enumerate(np.linspace(-1, 1, 9)):
        hue = PALETTE[colour] if value >= 0 else PALETTE["raw"]
        key.add_patch(matplotlib.patches.Rectangle((k, 0), 1, 1, facecolor=hue, alpha=abs(float(value)), linewidth=0))
    key.set_xlim(0, 9)
    key.set_ylim(0, 1)
    key.set_yticks([])
    key.set_xticks([0.5, 4.5, 8.5], [f"r = −{top:.2f}", "0", f"+{top:.2f}"])
    key.xaxis.tick_top()
    key.tick_params(axis="x", length=0, labelsize=8)
    key.grid(False)
    for spine in key.spines.values():
        spine.set_visible(False)


def _leaf_order(profiles: np.ndarray) -> list[int]:
    if len(profiles) < 3:
        return list(range(len(profiles)))
    return [int(i) for i in leaves_list(linkage(profiles, "average", optimal_ordering=True))]


def ridges(sets: list[Measured], values: Callable[[Measured], np.ndarray], xlabel: str, log: bool = False) -> Figure | None:
    """How one figure of the neurons is distributed, a row for each of `sets` with its median; None where no neuron has the figure.

    Rows have the same height, whatever the number of neurons.
    """
    colour = colours(sets)
    data = {m.name: v[np.isfinite(v)] for m in sets for v in [np.asarray(values(m), dtype=np.float64)]}
    if log:
        data = {name: np.log10(v[v > 0]) for name, v in data.items()}
    shown = [m for m in sets if len(data[m.name])]
    if not shown:
        return None
    everything = np.concatenate(list(data.values()))
    low, high = float(everything.min()), float(everything.max())
    edges = np.linspace(low, high if high > low else low + 1e-6, 31)
    with _figure(3.5, 0.75 + 0.36 * len(shown)) as (figure, ax):
        for row, m in enumerate(reversed(shown)):
            share, _ = np.histogram(data[m.name], edges)
            heights = row + 0.82 * share / share.max()
            hue = PALETTE[colour[m.name]]
            ax.stairs(heights, edges, baseline=row, fill=True, color=hue, alpha=0.3, linewidth=0)
            ax.stairs(heights, edges, baseline=row, color=hue, linewidth=1.2)
            middle = float(np.median(data[m.name]))
            ax.plot([middle, middle], [row, row + 0.82], color=hue, linewidth=2.2, solid_capstyle="butt")
        ax.set_yticks([row + 0.3 for row in range(len(shown))], [m.title for m in reversed(shown)])
        ax.tick_params(axis="y", colors=PALETTE["ink"])
        ax.set_ylim(-0.06, len(shown))
        ax.set_xlabel(xlabel)
        ax.grid(axis="x")
        ax.grid(False, axis="y")
        ax.spines["left"].set_visible(False)
        if log:
            ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
            ax.xaxis.set_major_formatter(lambda x, _: f"{100 * 10**x:.2g} %")
    return figure


def probing_curves(sets: list[Measured]) -> Figure | None:
    """Mean AUROC over labels of probes on the 1, 2 and 5 strongest neurons, and beside them on all features and on the reconstruction.

    None where nothing was probed. A baseline's name stands at the end of its line, as all have one colour.
    """
    colour = colours(sets)

    def mean(m: Measured, key: str) -> float:
        value = ((m.summary.get("probing") or {}).get(key) or {}).get("mean")
        return float(value) if isinstance(value, int | float) else np.nan

    keys = ("1", "2", "5")
    curves = {m.name: [mean(m, k) for k in keys] for m in sets}
    shown = [m for m in sets if np.isfinite(curves[m.name]).any()]
    if not shown:
        return None
    rest = (("linear_features", "all\nfeatures"), ("linear_reconstruction", "recon-\nstruction"))
    with _figure(7.4, 3.2) as (figure, ax):
        for m in shown:
            hue = PALETTE[colour[m.name]]
            style: dict[str, Any] = {"color": hue, "linewidth": 1.2 if m.is_baseline else 2.0, "marker": "D" if m.is_raw else "o", "markersize": 5}
            ax.plot(range(len(keys)), curves[m.name], label=None if m.is_baseline else m.title, zorder=2 if m.is_baseline else 3, **style)
            ax.plot([len(keys) + 0.3 + i for i in range(len(rest))], [mean(m, k) for k, _ in rest], zorder=3, **{**style, "linewidth": 0.0})
        labelled = sorted(((curves[m.name][-1], m.title) for m in shown if m.is_baseline and np.isfinite(curves[m.name][-1])), reverse=True)
        spread = 0.06 * float(np.ptp(ax.get_ylim()))
        place = np.inf
        for value, title in labelled:
            place = min(value, place - spread)
            ax.annotate(title, (len(keys) - 1, value), (len(keys) - 0.92, place), color=PALETTE["muted"], fontsize=8, va="center")
        ax.axvline(len(keys) - 0.22, color=PALETTE["line"], linewidth=1)
        ax.set_xticks([*range(len(keys)), *(len(keys) + 0.3 + i for i in range(len(rest)))], [*keys, *(text for _, text in rest)])
        ax.set_xlabel("neurons in the probe", x=0.26)
        ax.set_ylabel("AUROC, mean over labels")
        ax.set_xlim(-0.25, len(keys) + len(rest) - 0.4)
        figure.legend(loc="outside upper right", ncols=len(shown), handletextpad=0.4)
    return figure


def training_curve(saes: list[Measured], key: str, title: str) -> Figure | None:
    """One logged quantity over training, a curve an SAE; None where none logged it or it was zero throughout."""
    colour = colours(saes)
    curves = {m.name: _curve(m.training, key) for m in saes}
    if not any(len(x) > 1 and np.any(y) for x, y in curves.values()):
        return None
    with _figure(3.5, 2.2) as (figure, ax):
        for m in saes:
            x, y = curves[m.name]
            ax.plot(x, y, color=PALETTE[colour[m.name]], linewidth=1.6, label=m.title)
        positive = np.concatenate([y for _, y in curves.values()])
        if positive.min() > 0 and positive.max() / positive.min() > 50:
            ax.set_yscale("log")
        else:
            ax.set_ylim(min(0.0, float(positive.min())))
        ax.set_title(title)
        ax.set_xlabel("epoch" if any("epoch" in row for m in saes for row in m.training) else "step")
    return figure


MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")


def frontier(rows: list[dict[str, Any]]) -> Figure | None:
    """FVU over L0, a line an architecture and dictionary size; rows of `sae/frontier.json`. None where fewer than two can be drawn.

    Colours tell architectures apart, or dictionary sizes where there is one architecture. An axis is logarithmic where its values spread over more than a
    factor of three (L0) or ten (FVU).
    """
    rows = [row for row in rows if row["l0"] > 0 and row["fvu"] > 0]
    if len(rows) < 2:
        return None
    architectures = list(dict.fromkeys(row["architecture"] for row in rows))
    sizes = sorted({row["dict_size"] for row in rows})
    with _figure(7.4, 4.2) as (figure, ax):
        for architecture in architectures:
            for size in sizes:
                line = sorted((row["l0"], row["fvu"]) for row in rows if (row["architecture"], row["dict_size"]) == (architecture, size))
                if not line:
                    continue
                turn = architectures.index(architecture) if len(architectures) > 1 else sizes.index(size)
                look: Any = {
                    "color": PALETTE[f"sae-{turn % 4 + 1}"],
                    "marker": MARKERS[sizes.index(size) % len(MARKERS)],
                    "linestyle": DASHES[turn // 4 % 4],
                }
                ax.plot(*zip(*line, strict=True), linewidth=1.6, markersize=6, label=f"{architecture}, {size}", **look)
        _spread_axis(ax, "x", [row["l0"] for row in rows], 3)
        _spread_axis(ax, "y", [row["fvu"] for row in rows], 10)
        ax.set_xlabel("active neurons an image (L0)")
        ax.set_ylabel("unexplained variance (FVU)")
        ax.grid(True, axis="both")
        figure.legend(loc="outside right upper", title="architecture, neurons", alignment="left")
    return figure


def _spread_axis(ax: Axes, which: str, values: list[float], factor: float) -> None:
    """A logarithmic axis with plain numbers where values spread over more than `factor`; otherwise one that begins at zero, with room above."""
    low, high = min(values), max(values)
    if high / low <= factor:
        ax.set(**{f"{which}lim": (0, 1.08 * high)})
        return
    ax.set(**{f"{which}scale": "log"})
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _curve(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row.get("epoch", row.get("step", i)), row[key]) for i, row in enumerate(rows) if isinstance(row.get(key), int | float)]
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(axis=1)]
    return array[:, 0], array[:, 1]


def forest(rows: list[tuple[str, dict[str, float]]], colour: str, xlabel: str) -> Figure | None:
    """Differences with their intervals (`value`, `low`, `high`), a row each; the last is the mean, drawn apart. None without rows."""
    rows = [(label, d) for label, d in rows if all(isinstance(d.get(k), int | float) for k in ("value", "low", "high"))]
    if not rows:
        return None
    with _figure(7.4, 0.9 + 0.28 * len(rows)) as (figure, ax):
        for y, (_, d) in enumerate(reversed(rows)):
            mean = y == 0
            ax.plot([d["low"], d["high"]], [y, y], color=PALETTE[colour], linewidth=3 if mean else 1.8, solid_capstyle="round", zorder=2)
            ax.scatter([d["value"]], [y], s=70 if mean else 34, marker="D" if mean else "o", color=PALETTE[colour], zorder=3)
        ax.axvline(0, color=PALETTE["muted"], linewidth=1, zorder=1)
        ax.axhline(0.5, color=PALETTE["line"], linewidth=1)
        ax.set_yticks(range(len(rows)), [label for label, _ in reversed(rows)])
        ax.tick_params(axis="y", colors=PALETTE["ink"], labelsize=9.5)
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.set_xlabel(xlabel)
        ax.grid(axis="x")
        ax.grid(False, axis="y")
        ax.spines["left"].set_visible(False)
    return figure
