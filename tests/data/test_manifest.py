"""Manifests: CheXpert's layout, other CSVs, and one line for whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsae.data.config import DataConfig
from medsae.data.manifest import CHEXPERT_COLUMNS, CHEXPERT_LABELS, MANIFEST_SCHEMA, image_id_of, read_columns, read_manifest, split_of
from medsae.errors import DataError

HEADER = ",".join(CHEXPERT_COLUMNS + CHEXPERT_LABELS)
PREFIX = "CheXpert-v1.0-small/"


def row(path: str, labels: str = ",".join(["1.0", "0.0", "-1.0", ""] + [""] * 10), view: str = "Frontal", projection: str = "AP") -> str:
    return f"{path},Female,61,{view},{projection},{labels}"


def chexpert(folder: Path, rows: list[str], name: str = "train.csv") -> DataConfig:
    (folder / name).write_text("\n".join([HEADER, *rows]) + "\n")
    return DataConfig(root=str(folder))


def test_chexpert_rows(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    config = chexpert(tmp_path, [row(PREFIX + "train/patient00001/study2/view1_frontal.jpg")])
    manifest = read_manifest(config)
    assert manifest.table.schema == MANIFEST_SCHEMA
    [found] = manifest.table.to_pylist()
    assert found["path"] == "train/patient00001/study2/view1_frontal.jpg"
    assert (found["patient_id"], found["study_id"], found["view"], found["projection"]) == ("patient00001", "study2", "frontal", "AP")
    assert (found["sex"], found["age"]) == ("F", 61.0)
    assert found["labels"] == [1, 0, -1, -2] + [-2] * 10
    assert found["image_id"] == image_id_of(found["path"])
    assert manifest.label_names == CHEXPERT_LABELS


def test_a_prefix_that_is_a_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "CheXpert-v1.0-small").mkdir()
    manifest = read_manifest(chexpert(tmp_path, [row(PREFIX + "train/patient1/study1/view1_frontal.jpg")]))
    assert manifest.table["path"].to_pylist() == [PREFIX + "train/patient1/study1/view1_frontal.jpg"]


def test_train_and_valid_are_both_read(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "valid").mkdir()
    chexpert(tmp_path, [row("train/patient1/study1/view1_frontal.jpg")])
    config = chexpert(tmp_path, [row("valid/patient2/study1/view1_frontal.jpg")], "valid.csv")
    assert read_manifest(config).table.num_rows == 2
    assert read_manifest(config.model_copy(update={"csv": ["valid.csv"]})).table.num_rows == 1


@pytest.mark.parametrize(("views", "count"), [("frontal", 2), ("lateral", 1), ("all", 3)])
def test_views(tmp_path: Path, views: str, count: int) -> None:
    (tmp_path / "train").mkdir()
    rows = [row(f"train/p{i}/s/v{i}.jpg", view=v, projection=p) for i, (v, p) in enumerate([("Frontal", "AP"), ("Frontal", "PA"), ("Lateral", "")])]
    config = chexpert(tmp_path, rows).model_copy(update={"views": views})
    manifest = read_manifest(config)
    assert manifest.table.num_rows == count
    assert manifest.other_views == 3 - count
    assert manifest.rejects.num_rows == 0


def test_repeated_and_malformed_paths_are_rejected_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    good = "train/patient1/study1/view1_frontal.jpg"
    manifest = read_manifest(chexpert(tmp_path, [row(good), row(good), row("view.jpg"), row("")]))
    assert manifest.table["path"].to_pylist() == [good]
    reasons = manifest.rejects["reason"].to_pylist()
    assert len(reasons) == 3
    assert sum("earlier row" in r for r in reasons) == 1
    assert sum("no path" in r for r in reasons) == 1


@pytest.mark.parametrize("column", CHEXPERT_COLUMNS + CHEXPERT_LABELS)
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    names = [c for c in CHEXPERT_COLUMNS + CHEXPERT_LABELS if c != column]
    (tmp_path / "train.csv").write_text(",".join(names) + "\n" + ",".join(["a/b/c"] * len(names)) + "\n")
    with pytest.raises(DataError) as caught:
        read_manifest(DataConfig(root=str(tmp_path)))
    assert repr(column) in str(caught.value)
    assert "train.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (HEADER + "\n", "no image"),
        (HEADER + "\na,b\n", "more or fewer fields"),
        (HEADER + "\n" + row("train/p/s/v.jpg", ",".join(["2"] + [""] * 13)) + "\n", "'No Finding', line 2: '2'"),
        (HEADER + "\n" + row("train/p/s/v.jpg", ",".join(["yes"] + [""] * 13)) + "\n", "not a label value"),
    ],
)
def test_unusable_csv_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(DataConfig(root=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_no_csv_and_no_root() -> None:
    with pytest.raises(DataError, match=r"data\.root"):
        read_manifest(DataConfig())
    with pytest.raises(DataError, match=r"train\.csv"):
        read_manifest(DataConfig(root="/nonexistent-folder"))
    with pytest.raises(DataError, match=r"missing\.csv"):
        read_manifest(DataConfig(root="/nonexistent-folder", csv=["missing.csv"]))


def test_any_csv_with_label_columns(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text("file,who,Mass,Edema,age_years,gender\nx/1.png,a,1,0,50,M\nx/2.png,a,,-1,,F\nx/3.png,b,true,False,7,\n")
    (tmp_path / "x").mkdir()
    config = DataConfig(
        format="csv",
        root=str(tmp_path),
        csv=["images.csv"],
        path_column="file",
        label_columns=["Mass", "Edema"],
        patient_column="who",
        age_column="age_years",
        sex_column="gender",
    )
    table = read_manifest(config).table
    assert table["labels"].to_pylist() == [[1, 0], [-2, -1], [1, 0]]
    assert table["patient_id"].to_pylist() == ["a", "a", "b"]
    assert table["sex"].to_pylist() == ["M", "F", ""]
    np.testing.assert_array_equal(table["age"].to_numpy(), np.array([50, np.nan, 7], np.float32))
    with pytest.raises(DataError, match="label_columns"):
        read_manifest(config.model_copy(update={"label_columns": None}))
    with pytest.raises(DataError, match="'nobody'"):
        read_manifest(config.model_copy(update={"patient_column": "nobody"}))


def test_without_a_patient_column_every_image_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("Path,A\n1.png,1\n2.png,0\n")
    table = read_manifest(DataConfig(format="csv", root=str(tmp_path), label_columns=["A"])).table
    assert len(set(table["patient_id"].to_pylist())) == 2


def test_limit(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    config = chexpert(tmp_path, [row(f"train/p{i}/s/v.jpg") for i in range(9)])
    assert read_manifest(config.model_copy(update={"limit": 4})).table.num_rows == 4


@given(st.text(min_size=1, max_size=20), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_split_is_stable_and_monotone_in_the_fraction(patient: str, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert split_of(patient, low) == split_of(patient, low)
    assert not (split_of(patient, low) == "eval" and split_of(patient, high) == "train")


def test_split_share_and_patients_apart(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    rows = [row(f"train/patient{i // 3}/study{i % 3}/view.jpg") for i in range(6000)]
    table = read_manifest(chexpert(tmp_path, rows)).table
    by_patient: dict[str, set[str]] = {}
    for patient, split in zip(table["patient_id"].to_pylist(), table["split"].to_pylist(), strict=True):
        by_patient.setdefault(patient, set()).add(split)
    assert all(len(s) == 1 for s in by_patient.values())
    share = sum("eval" in s for s in by_patient.values()) / len(by_patient)
    assert abs(share - 0.3) < 0.04


def test_chexpert_at_its_full_size(tmp_path: Path) -> None:
    """223,414 rows with the four label values parse whole."""
    (tmp_path / "train").mkdir()
    rng = np.random.default_rng(0)
    values = np.array(["1.0", "0.0", "-1.0", ""])[rng.integers(0, 4, (223_414, 14))]
    lines = [row(f"{PREFIX}train/patient{i // 4:05d}/study{i % 4}/view1_frontal.jpg", ",".join(v)) for i, v in enumerate(values)]
    table = read_manifest(chexpert(tmp_path, lines)).table
    assert table.num_rows == 223_414
    expected = {"1.0": 1, "0.0": 0, "-1.0": -1, "": -2}
    flat = table["labels"].combine_chunks().flatten().to_numpy()
    np.testing.assert_array_equal(flat[:14_000], [expected[v] for v in values[:1000].ravel()])
    assert np.bincount(flat + 2).sum() == 223_414 * 14


def test_further_columns_are_found_by_image(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    path = "train/patient00001/study2/view1_frontal.jpg"
    (tmp_path / "train.csv").write_text(f"{HEADER},Site\n{row(PREFIX + path)},North\n{row(PREFIX + path)},South\n")
    ids, columns = read_columns(DataConfig(root=str(tmp_path)), ["Site", "Sex"])
    at = ids.index(image_id_of(path))
    assert (columns["Site"][at], columns["Sex"][at]) == ("North", "Female")
    assert set(ids) == {image_id_of(path), image_id_of(PREFIX + path)}
    with pytest.raises(DataError, match=r"train\.csv has no column 'Scanner'"):
        read_columns(DataConfig(root=str(tmp_path)), ["Scanner"])
