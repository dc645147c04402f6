"""The report on a synthetic run: structure, numbers, escaping, what is missing, and that it needs nothing but itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from medsae.artifacts import SCORE_SCHEMA, RunDir
from medsae.config import validate_config
from medsae.errors import ArtifactError
from medsae.naming.scoring import headline as score_headline
from medsae.naming.uniqueness import group_names
from medsae.pipeline import report as stage
from medsae.report import ReportConfig, build_report
from medsae.report.figures import frontier
from medsae.report.format import count, num, percent, signed
from medsae.report.load import read_report_data
from tests.support.synthetic_run import LABELS, NOTICE, make_run

SECTIONS = {"table", "heat-map", "distributions", "reconstruction", "neurons", "rejects", "provenance"}
VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}


class Page(HTMLParser):
    """Elements, attributes and text; complains of tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.text.append(data)
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def ids(self) -> list[str]:
        return [str(a["id"]) for _, a in self.tags if "id" in a]


def render(run: RunDir, data: str, **settings: Any) -> Page:
    return Page(build_report(run, ReportConfig(**settings), data)["report/index.html"].decode())


@pytest.fixture(scope="module")
def files(synthetic: tuple[RunDir, str]) -> dict[str, bytes]:
    return build_report(synthetic[0], ReportConfig(cards=16, images=4), synthetic[1])


@pytest.fixture(scope="module")
def page(files: dict[str, bytes]) -> Page:
    return Page(files["report/index.html"].decode())


def test_sections_and_anchors(page: Page) -> None:
    assert set(page.ids) >= SECTIONS
    assert len(set(page.ids)) == len(page.ids), "ids of the page and of all its figures are unique"
    for link in page.all("a"):
        assert str(link["href"]).startswith("#")
        assert str(link["href"])[1:] in page.ids


def test_the_page_needs_nothing_but_itself(files: dict[str, bytes]) -> None:
    html = files["report/index.html"].decode()
    assert not re.findall(r"""(?:https?:)?//[\w.-]+\.\w+|@import|<script|<iframe|<object""", html)
    sources = re.findall(r"""(?:src|href|xlink:href)="([^"]{0,30})""", html) + re.findall(r"url\(([^)]{0,30})", html)
    assert all(s.startswith(("#", "data:", "'#")) for s in sources), {s for s in sources if not s.startswith(("#", "data:"))}
    assert html.count("data:image/jpeg;base64,") >= 16 * 4


def test_pictures_have_words(page: Page) -> None:
    images = page.all("img")
    assert images
    assert all(re.search(r"activate neuron \d+ most, activation \d", str(i["alt"])) for i in images)
    figures = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(figures) >= 7
    assert all(len(str(f["aria-label"])) > 20 for f in figures)


def test_the_table_is_the_artifacts(page: Page, synthetic: tuple[RunDir, str]) -> None:
    sets = [synthetic[0].read_json(f"measure/{name}/summary.json") for name in ("raw", "standard", "topk-small")]
    rows = {row[0]: row[2:5] for row in page.rows if len(row) == 5 and row[0] in [*LABELS, "Mean"]}
    assert set(rows) == {*LABELS, "Mean"}
    for label in LABELS:
        for cell, summary in zip(rows[label], sets, strict=True):
            best = summary["paper_table"][label]
            assert cell.split() == [num(best["r"]), f"({num(best['entropy'])})", f"#{best['neuron']}"]
    for cell, summary in zip(rows["Mean"], sets, strict=True):
        assert cell.split() == [num(summary["paper_mean"]["r"]), f"({num(summary['paper_mean']['entropy'])})"]


def test_the_best_of_a_row_is_bold(files: dict[str, bytes], synthetic: tuple[RunDir, str]) -> None:
    body = files["report/index.html"].decode().split('id="table"')[1].split("</section>")[0]
    sets = [synthetic[0].read_json(f"measure/{name}/summary.json")["paper_table"] for name in ("raw", "standard", "topk-small")]
    bold = re.findall(r"<strong>([^<]+)</strong>", body)
    assert set(bold) <= {num(max(s[label]["r"] for s in sets)) for label in LABELS}
    assert len(bold) >= len(LABELS)


def test_the_notice_is_said_at_the_top_and_by_every_table(files: dict[str, bytes]) -> None:
    html = files["report/index.html"].decode()
    assert NOTICE in html.split('id="main"')[0].split("</header>")[0]
    for section in re.findall(r'<section id="(?:table|heat-map|distributions|reconstruction|neurons)".*?</section>', html, re.S):
        assert NOTICE in section


def test_cards_show_the_artifacts(page: Page, synthetic: tuple[RunDir, str]) -> None:
    data = read_report_data(synthetic[0])
    m = data.saes[0]
    chosen = m.ranked(16)
    assert {cell["neuron"] for cell in (m.best(label) for label in LABELS) if cell} <= set(chosen)
    assert [a["id"] for a in page.all("article")][:16] == [f"standard-{n}" for n in chosen]
    text = " ".join(page.text)
    names = {r["neuron"]: r for r in synthetic[0].read_table("names/standard.parquet").to_pylist()}
    assert all(names[n]["description"] in text for n in chosen)


def test_the_frontier_is_the_artifact(page: Page, files: dict[str, bytes], synthetic: tuple[RunDir, str]) -> None:
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 6 and row[1] in ("standard", "topk")}
    told = synthetic[0].read_json("sae/frontier.json")
    assert rows == {
        r["name"]: [r["architecture"], count(r["dict_size"]), num(r["l0"], 1), num(r["fvu"], 3), percent(r["dead_share"], 1)] for r in told
    }
    assert b"standard, 160" in files["report/frontier.svg"]


def test_a_line_of_the_frontier_is_an_architecture_and_size_and_its_axes_follow_the_spread() -> None:
    points = [(a, m, l0, l0**-0.5) for a in ("topk", "standard") for m in (64, 128) for l0 in (32.0, 4.0, 8.0)]
    rows = [dict(zip(("architecture", "dict_size", "l0", "fvu"), p, strict=True)) for p in points]
    (ax,) = frontier(rows).axes
    assert [line.get_label() for line in ax.lines] == ["topk, 64", "topk, 128", "standard, 64", "standard, 128"]
    assert list(ax.lines[0].get_xdata()) == [4, 8, 32]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert ax.get_ylim()[0] == 0
    rows[0] |= {"fvu": 1e-3}
    (ax,) = frontier(rows).axes
    assert ax.get_yscale() == "log"
    # An autoencoder that is silent or without error has no place on the axes; one point is no frontier.
    assert frontier([rows[0], {**rows[1], "l0": 0.0}]) is None


def test_one_autoencoder_has_no_frontier(tmp_path: Path) -> None:
    run, data = make_run(tmp_path, n=60, m=20)
    assert "report/frontier.svg" not in build_report(run, ReportConfig(cards=1), data)
    run.delete("sae/frontier.json")
    assert read_report_data(run).frontier == []


def test_rejects_are_counted_by_reason(page: Page) -> None:
    assert ["truncated or damaged image", "extract", "2"] in page.rows
    assert ["empty file", "extract", "1"] in page.rows


def test_figures_are_files_and_the_same_run_gives_the_same_bytes(files: dict[str, bytes], synthetic: tuple[RunDir, str]) -> None:
    assert {f.split("/")[1] for f in files} >= {
        "index.html",
        "best-per-label.svg",
        "heat-map-standard.svg",
        "distribution-entropy.svg",
        "training-fvu.svg",
    }
    assert build_report(synthetic[0], ReportConfig(cards=16, images=4), synthetic[1]) == files


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    run, data = make_run(tmp_path, concept=evil, labels=['A"><b onload="x">', "B & C", "</svg></style>D"], n=60, m=20)
    page = render(run, data, title=evil)
    assert "script" not in [tag for tag, _ in page.tags]
    assert not [a for _, a in page.tags if any(key.startswith("on") for key in a)]
    assert evil in "".join(page.text)


def test_what_is_missing_is_said_or_left_out(tmp_path: Path) -> None:
    run, data = make_run(tmp_path, names=False, notice=None, n=60, m=20)
    for path in ("sae/standard/training.jsonl", "measure/raw", "rejects.parquet"):
        run.delete(path)
    shutil.rmtree(Path(data) / "patient00000")
    text = " ".join(render(run, data).text)
    assert "have no names yet" in text
    assert "holds no training log" in text
    assert "nothing to compare with" in text
    assert "1 images could not be shown: file is missing" in text
    assert "every input was used" in text
    assert NOTICE not in text
    shutil.rmtree(data)
    assert "could not be shown" in " ".join(render(run, data).text)
    assert "data.root is not set" in " ".join(render(run, "").text)


def test_undefined_correlations_are_dashes(tmp_path: Path) -> None:
    run, data = make_run(tmp_path, n=60, m=20, labels=["Edema", "Fracture"])
    summary = run.read_json("measure/standard/summary.json")
    summary["paper_table"]["Fracture"] = {"neuron": None, "r": None, "entropy": None}
    run.write_json("measure/standard/summary.json", summary)
    row = next(r for r in render(run, data).rows if r[0] == "Fracture")
    assert row[3] == "–"


def interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


@pytest.mark.parametrize(
    ("ends", "words"),
    [((0.02, 0.2), "more closely than"), ((-0.2, -0.02), "less closely than"), ((-0.1, 0.2), "No clear difference")],
)
def test_the_headline_claims_what_the_interval_allows(tmp_path: Path, ends: tuple[float, float], words: str) -> None:
    run, data = make_run(tmp_path, n=60, m=20)
    difference = interval(sum(ends) / 2, *ends)
    cell = {"r": 0.4, "baseline_r": 0.3, "difference": difference, "entropy": 2.0, "baseline_entropy": 2.1}
    told = {
        "name": "standard",
        "baseline": "raw",
        "correlation": difference,
        "entropy": interval(-0.1, -0.3, 0.1),
        "labels": {"Edema": cell, "Fracture": cell},
        "labels_won": 2,
        "labels_used": 2,
        "labels_left_out": ["Pneumonia"],
        "equal_candidates": None,
    }
    untrained = {**told, "baseline": "baseline-untrained", "correlation": interval(0.01, -0.02, 0.04)}
    run.write_json("measure/headline.json", {**told, "comparisons": [told, untrained]})
    page = render(run, data)
    text = " ".join(page.text)
    assert words in text.split("Encoder")[0]
    assert "Against an untrained SAE of the same shape it is +0.01 (−0.02 to 0.04)" in text
    assert ("training adds nothing" in text) == (ends[0] > 0)
    assert signed(difference) in text
    assert "1 of 14 labels are left out" in text
    assert "comparison" in page.ids
    assert next(r for r in page.rows if r[:3] == ["Edema", "0.40", "0.30"])


def test_planted_findings(tmp_path: Path) -> None:
    run, data = make_run(tmp_path, n=60, m=20)
    rows = [
        {
            "name": "effusion",
            "neurons": [3, 3],
            "r": interval(0.8, 0.7, 0.9),
            "positive": 9,
            "auroc": 0.97,
            "detected": True,
            "found": True,
            "absorbed_by": [],
            "split_over": 2,
        },
        {
            "name": "nodule",
            "neurons": [5, 7],
            "r": interval(0.1, 0.0, 0.2),
            "positive": 4,
            "auroc": 0.6,
            "detected": False,
            "found": False,
            "absorbed_by": ["effusion"],
            "split_over": 1,
        },
        {
            "name": "fracture",
            "neurons": [-1, -1],
            "r": None,
            "positive": 0,
            "auroc": None,
            "detected": False,
            "found": False,
            "absorbed_by": [],
            "split_over": 0,
        },
    ]
    versus = {"findings": 2, "won_r": 1, "by_finding": {"effusion": {"r": interval(0.2, 0.1, 0.3), "auroc": 0.1}}}
    table = {
        "rule": "the rule",
        "findings": rows,
        "nuisances": [],
        "n_findings": 2,
        "n_detected": 1,
        "n_found": 1,
        "mean_auroc": 0.8,
        "versus_raw": versus,
    }
    run.write_json("measure/standard/calibration.json", table)
    concepts = [
        {
            "name": "effusion",
            "neurons": [3, 3],
            "r": interval(0.7, 0.6, 0.8),
            "auroc": 0.9,
            "names": ["pleural effusion"] * 2,
            "named": True,
            "bearer": {"neuron": 3, "name": "pleural effusion", "r": [0.7, 0.6]},
        },
        {"name": "sex", "neurons": [4, -1], "r": None, "auroc": None, "names": [None, None], "named": False, "bearer": None},
    ]
    run.write_json(
        "names/standard.json",
        {**group_names([(3, "pleural effusion")]), "planted": {"rule": "a rule", "of": 2, "named": 1, "carried": 1, "concepts": concepts}},
    )
    page = render(run, data)
    planted = {r[0]: r for r in page.rows if len(r) == 7}
    assert planted["effusion"][1:] == ["#3", "+0.70 (0.60 to 0.80)", "0.90", "pleural effusion", "yes", "#3 pleural effusion (0.70, 0.60)"]
    assert planted["sex"][1:] == ["#4", "–", "–", "no name", "no", "none"]
    text = " ".join(page.text)
    assert "1 of 2 findings found" in text
    assert "ahead of raw features on 1 of 2" in text
    found = {r[0]: r for r in page.rows if r[0] in ("effusion", "nodule", "fracture") and len(r) == 9}
    assert found["effusion"][4] == "+0.20 (0.10 to 0.30)"
    assert [found[k][7] for k in ("effusion", "nodule", "fracture")] == ["found", "not found, goes with effusion", "too rare to say"]


def test_scores_of_names_and_shared_names(tmp_path: Path) -> None:
    run, data = make_run(tmp_path, n=60, m=20)
    blank = {
        "namer": "vocabulary",
        "method": "embedding",
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "n": 40,
        "failures": 0,
        "low": 0.4,
        "high": 0.6,
    }
    rows = [
        {**blank, "neuron": n, "control": control, "balanced_accuracy": 0.5, "auc": auc}
        for n in range(20)
        for control, auc in (("none", 0.5 + n / 50), ("shuffled", 0.49), ("empty", 0.5))
    ]
    run.write_table("scores/standard.parquet", pa.Table.from_pylist(rows, schema=SCORE_SCHEMA))
    run.write_json("scores/standard.json", score_headline(rows))
    names = run.read_table("names/standard.parquet")
    concepts = ["chest", *(f"concept {n // 2}" for n in range(1, 20))]
    run.write_table("names/standard.parquet", names.set_column(3, "concept", pa.array(concepts)))
    run.write_json("names/standard.json", group_names(list(enumerate(concepts))))
    files = build_report(run, ReportConfig(), data)
    page = Page(files["report/index.html"].decode())
    assert "report/distribution-name-scores.svg" in files
    ends = [r for r in page.rows if r[-1] in ("best", "worst")]
    assert [r[1] for r in ends] == [*(f"#{n}" for n in range(19, 14, -1)), *(f"#{n}" for n in range(4, -1, -1))]
    assert ends[0][2:] == ["0.88", "0.49", "0.50", "best"]
    text = " ".join(page.text)
    assert "would fit every radiograph: chest (#0)" in text
    assert any(r[0] == "concept 3" and r[1:] == ["2", "#6 #7"] for r in page.rows)
    assert "(shuffled 0.49, empty 0.50)" in text


def test_an_unmeasured_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="run `medsae measure` first"):
        build_report(RunDir(str(tmp_path)), ReportConfig(), "")
    run, data = make_run(tmp_path, n=60, m=20)
    run.write_table("measure/standard/neurons.parquet", run.read_table("measure/standard/neurons.parquet").drop_columns(["entropy"]))
    with pytest.raises(ArtifactError, match="no column 'entropy'"):
        build_report(run, ReportConfig(), data)


def test_the_stage_writes_and_clears(tmp_path: Path) -> None:
    run, data = make_run(tmp_path, n=60, m=20)
    run.write_bytes("report/heat-map-old.svg", b"<svg/>")
    result = stage.run(validate_config({"run": run.uri, "data": {"root": data}}), run)
    assert set(run.list("report")) == set(result.outputs)
    assert result.counts["figures"] == len(result.outputs) - 1


def test_numbers_for_people() -> None:
    assert [num(-0.126), num(None), num(float("nan")), num(np.float64(1))] == ["−0.13", "–", "–", "1.00"]
    assert [percent(0.0513, 1), percent(None), count(8192), count(None)] == ["5.1 %", "–", "8\u202f192", "–"]
    assert [signed(interval(0.1, -0.02, 0.2)), signed(None), signed({"value": None})] == ["+0.10 (−0.02 to 0.20)", "–", "–"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page is not rendered")
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_it_renders(files: dict[str, bytes], tmp_path: Path, width: int) -> None:
    """Rendered by a real browser: figures and pictures have a size and the page does not scroll sideways."""
    html = files["report/index.html"].decode()
    # `load` waits for every picture that is not lazy, so the page is whole when the probe runs, whatever the machine's speed.
    html = html.replace('loading="lazy"', "")
    probe = """<script>addEventListener("load", () => { const r = document.createElement("pre"); r.id = "probe";
      r.textContent = JSON.stringify({overflow: document.documentElement.scrollWidth - innerWidth, images: [...document.images].filter(i => !i.naturalWidth).length,
      flat: [...document.querySelectorAll("svg[role=img]")].filter(s => s.getBoundingClientRect().height < 80).length, font: getComputedStyle(document.body).fontFamily});
      document.body.append(r); });</script></body>"""
    (tmp_path / "page.html").write_text(html.replace("</body>", probe))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    shot = tmp_path / "page.png"
    common = [str(CHROMIUM), *flags]
    dom = subprocess.run([*common, "--dump-dom", f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom)
    assert found, "the page did not load"
    told = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert told["overflow"] <= 0
    assert told["images"] == 0
    assert told["flat"] == 0
    subprocess.run([*common, f"--screenshot={shot}", f"file://{tmp_path}/page.html"], capture_output=True, timeout=120, check=True)
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.std() > 5, "a blank page"
