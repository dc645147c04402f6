"""Phantom radiographs: reproducible, in CheXpert's layout, with findings where they belong."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsae.data.phantom import Anatomy, Capture, Findings, Phantom, render, rows, write_phantoms
from medsae.data.phantom.findings import region
from medsae.data.phantom.model import FINDINGS
from medsae.data.phantom.render import scene_of
from medsae.data.phantom.sampling import DEVICES, LABEL_OF, LABELS, UNCERTAIN_SHARE, draw_capture
from medsae.data.phantom.writer import COLUMNS
from medsae.errors import DataError

QUIET = Phantom(Anatomy(seed=11), Findings(), Capture(seed=3, noise=0.0))
"""A healthy man, no noise: two renders differ by what was planted alone."""


def planted(name: str, severity: float = 1.0, **anatomy: object) -> Phantom:
    findings = replace(QUIET.findings, **{name: severity})
    return replace(QUIET, findings=findings, anatomy=replace(QUIET.anatomy, **anatomy))  # type: ignore[arg-type]


def hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one") / "phantoms"
    write_phantoms(path, 40, seed=5, size=96, workers=1)
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "phantoms"
    write_phantoms(again, 40, seed=5, size=96, workers=2)
    assert hashes(again) == hashes(folder)
    write_phantoms(again, 40, seed=6, size=96, workers=1)
    assert hashes(again) != hashes(folder)


def test_layout_is_that_of_chexpert(folder: Path) -> None:
    train, valid, truth = (read(folder / f"{n}.csv") for n in ("train", "valid", "truth"))
    assert len(train) + len(valid) == len(truth) == 40
    assert (folder / "train.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert COLUMNS[5:] == LABELS
    assert len(LABELS) == 14
    for split, table in (("train", train), ("valid", valid)):
        for row in table:
            name, part, patient, study, view = row["Path"].split("/")
            assert (name, part) == ("phantoms", split)
            assert patient.startswith("patient")
            assert study.startswith("study")
            assert view.endswith("_frontal.jpg" if row["Frontal/Lateral"] == "Frontal" else "_lateral.jpg")
            assert row["AP/PA"] in (("AP", "PA") if row["Frontal/Lateral"] == "Frontal" else ("",))
            assert row["Sex"] in ("Male", "Female")
            assert 18 <= int(row["Age"]) <= 90
            assert {row[label] for label in LABELS} <= {"1.0", "0.0", "-1.0", ""}
            with Image.open(folder.parent / row["Path"]) as image:
                assert image.format == "JPEG"
                assert image.mode == "L"
                assert min(image.size) == 96
    patients = [{r["Path"].split("/")[2] for r in t} for t in (train, valid)]
    assert patients[0].isdisjoint(patients[1])


def test_truth_agrees_with_the_labels(folder: Path) -> None:
    truth = {r["Path"]: r for r in read(folder / "truth.csv")}
    for row in read(folder / "train.csv") + read(folder / "valid.csv"):
        severity = {f: float(truth[row["Path"]][f]) for f in FINDINGS}
        assert all(0 <= s <= 1 for s in severity.values())
        for name, label in LABEL_OF.items():
            there = any(s > 0 for f, s in severity.items() if f in (name, f"{name}_left", f"{name}_right"))
            assert there == (row[label] in ("1.0", "-1.0")), (label, row[label])
        assert any(severity[d] for d in DEVICES) == (row["Support Devices"] == "1.0")
        if row["No Finding"] == "1.0":
            assert not any(s for f, s in severity.items() if f not in DEVICES)


def test_prevalences_and_co_occurrences_are_like_chexperts() -> None:
    drawn = list(rows(6000, 1))
    positive = {label: np.array([r.labels[label] == 1.0 for r in drawn]) for label in LABELS}
    # Positive studies of Irvin et al. 2019, table 1, in per cent.
    paper = {
        "No Finding": 8.9,
        "Enlarged Cardiomediastinum": 4.8,
        "Cardiomegaly": 12.3,
        "Lung Lesion": 3.7,
        "Lung Opacity": 49.4,
        "Edema": 26.1,
        "Consolidation": 6.8,
        "Pneumonia": 2.4,
        "Atelectasis": 15.6,
        "Pneumothorax": 9.2,
        "Pleural Effusion": 40.3,
        "Fracture": 3.9,
        "Support Devices": 56.4,
    }
    for label, share in paper.items():
        assert positive[label].mean() * 100 == pytest.approx(share, rel=0.2, abs=4), label
    assert not positive["Pleural Other"].any()

    def lift(a: str, b: str) -> float:
        return float((positive[a] & positive[b]).mean() / (positive[a].mean() * positive[b].mean()))

    assert lift("Edema", "Cardiomegaly") > 1.4
    assert lift("Pleural Effusion", "Atelectasis") > 1.2
    assert lift("Pneumothorax", "Edema") < 0.8


def test_hedged_findings_are_the_slight_ones() -> None:
    drawn = list(rows(4000, 2))
    for name in ("effusion", "atelectasis", "edema"):
        label = LABEL_OF[name]
        hedged = [r.phantom.findings.worst(name) for r in drawn if r.labels[label] == -1.0]
        stated = [r.phantom.findings.worst(name) for r in drawn if r.labels[label] == 1.0]
        assert np.mean(hedged) < np.mean(stated) - 0.2
        assert len(hedged) / (len(hedged) + len(stated)) == pytest.approx(UNCERTAIN_SHARE[name], abs=0.08)


def test_patients_have_several_studies_of_one_body_with_findings_that_evolve() -> None:
    drawn = list(rows(600, 3))
    by_patient: dict[int, list[Phantom]] = {}
    studies: dict[int, set[int]] = {}
    for r in drawn:
        by_patient.setdefault(r.patient, []).append(r.phantom)
        studies.setdefault(r.patient, set()).add(r.study)
    assert all(len({p.anatomy for p in phantoms}) == 1 for phantoms in by_patient.values())
    several = [p for p, s in studies.items() if len(s) > 1]
    assert len(several) > 0.3 * len(studies)
    changed = [len({p.findings for p in by_patient[p]}) > 1 for p in several]
    assert np.mean(changed) > 0.8
    # What one study shows says something about the next.
    effusion = [(a.findings.worst("effusion") > 0, b.findings.worst("effusion") > 0) for p in several for a, b in [by_patient[p][:2]]]
    first, second = np.array(effusion).T
    assert second[first].mean() > second[~first].mean() + 0.1
    assert 0.05 < np.mean([r.phantom.capture.view == "lateral" for r in drawn]) < 0.25


LOCAL = [f for f in FINDINGS if f not in DEVICES and f not in ("edema",)]


@pytest.mark.parametrize("name", LOCAL)
def test_a_finding_changes_the_image_where_it_belongs(name: str) -> None:
    # A large pneumothorax or effusion pushes the heart over: a middling one stays in its place.
    severity = 0.5 if name.startswith(("pneumothorax", "effusion")) else 1.0
    before, after = (render(planted(name, s)).astype(float) for s in (0.0, severity))
    where = region(scene_of(planted(name, severity)), name)
    changed = np.abs(after - before)
    inside, outside = changed[where], changed[~where]
    assert inside.max() > 25, "cannot be seen"
    # Film processing touches the rest, a little; lost volume draws the mediastinum over.
    share = (changed * where).sum() / changed.sum()
    assert share > (0.5 if name.startswith("atelectasis") else 0.75), share
    assert inside.mean() > 2.5 * outside.mean()


@pytest.mark.parametrize("name", [*DEVICES, "edema"])
def test_devices_and_edema_can_be_seen(name: str) -> None:
    before, after = (render(planted(name, s)).astype(float) for s in (0.0, 1.0))
    assert (np.abs(after - before) > 10).sum() > 120


@pytest.mark.parametrize("name", ["effusion_left", "edema", "pneumothorax_right", "cardiomegaly", "consolidation_left", "nodule_right"])
def test_more_severe_is_more_visible(name: str) -> None:
    healthy = render(planted(name, 0.0)).astype(float)
    slight, severe = (np.abs(render(planted(name, s)) - healthy).sum() for s in (0.25, 1.0))
    assert severe > 1.5 * slight > 0


def test_signs_of_findings() -> None:
    healthy, film = render(QUIET).astype(float), scene_of(QUIET).film
    right_base = (film.u < -5) & (film.u > -11) & (film.v > 6) & (film.v < 9)
    assert render(planted("effusion_right")).astype(float)[right_base].mean() > healthy[right_base].mean() + 40
    left_edge = (film.u > 9) & (film.u < 11) & (film.v > -5) & (film.v < 0)
    assert render(planted("pneumothorax_left")).astype(float)[left_edge].mean() < healthy[left_edge].mean() - 5
    lungs = (np.abs(film.u) > 4) & (np.abs(film.u) < 8) & (np.abs(film.v) < 4)
    dark, bright = (render(replace(QUIET, capture=replace(QUIET.capture, exposure=e))).astype(float)[lungs].mean() for e in (1, -1))
    assert dark < healthy[lungs].mean() < bright


def test_nuisances_leave_the_image_a_radiograph() -> None:
    rng = np.random.default_rng(0)
    for view in ("frontal", "lateral"):
        for _ in range(4):
            grey = render(replace(QUIET, capture=draw_capture(rng, True, view)), 128)
            assert grey.dtype == np.uint8
            assert min(grey.shape) == 128
            assert grey.std() > 25
            assert np.percentile(grey, 99) > 120


def test_a_longer_collection_begins_with_the_shorter_one() -> None:
    short, long = list(rows(30, 9)), list(rows(60, 9))
    assert short == long[:30]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"images": 0}, "images"), ({"images": 3, "seed": -1}, "seed"), ({"images": 3, "size": 8}, "size"), ({"images": 3, "workers": 0}, "workers")],
)
def test_bad_arguments_give_one_line(tmp_path: Path, arguments: dict[str, int], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        write_phantoms(tmp_path / "x", **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="other files"):
        write_phantoms(tmp_path, 3, size=64, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_phantoms(tmp_path / "file", 3, size=64, workers=1)
