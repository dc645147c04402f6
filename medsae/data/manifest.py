"""Manifests: which images there are, whose they are, and their labels.

A manifest is an Arrow table with the columns of the embedding artifact except `pixel_hash` and `embedding`.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs

from medsae.artifacts import BLANK, EMBEDDING_FIELDS, REJECT_SCHEMA, UNCERTAIN, resolve
from medsae.data.config import DataConfig
from medsae.errors import DataError

CHEXPERT_LABELS = [
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
]
"""The 14 labels of CheXpert (Irvin et al., 2019, arXiv 1901.07031), in the order of its CSV."""

CHEXPERT_COLUMNS = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA"]

MANIFEST_SCHEMA = pa.schema([f for f in EMBEDDING_FIELDS if f.name not in ("pixel_hash", "embedding")])

_CHEXPERT_PATH = re.compile(r"(?:^|/)([^/]+)/([^/]+)/[^/]+$")
_LABEL_VALUES = {"1": 1, "0": 0, "-1": UNCERTAIN, "": BLANK, "nan": BLANK, "none": BLANK, "true": 1, "false": 0}
_SEX = {"female": "F", "f": "F", "male": "M", "m": "M"}
_VIEWS = {"frontal": "frontal", "lateral": "lateral", "pa": "frontal", "ap": "frontal", "ll": "lateral", "": ""}


@dataclass(frozen=True)
class Manifest:
    """`table` in `MANIFEST_SCHEMA`; `rejects` rows that were left out, with the reason; `other_views` rows of a view that was not asked for."""

    table: pa.Table
    rejects: pa.Table
    label_names: list[str]
    other_views: int


def split_of(patient_id: str, eval_fraction: float) -> str:
    """`train` or `eval`: a patient's place never moves when data is added."""
    draw = int.from_bytes(hashlib.sha256(patient_id.encode()).digest()[:8], "big") / 2.0**64
    return "eval" if draw < eval_fraction else "train"


def image_id_of(path: str) -> str:
    """16 hex digits of the SHA-256 of the image's path relative to the data root."""
    return hashlib.sha256(path.encode()).hexdigest()[:16]


def read_manifest(config: DataConfig) -> Manifest:
    """Reads the CSV files of `config`.

    Raises:
        DataError: no CSV, a column that is missing (named), a label value that is none (column and row named), or no row left.
    """
    if not config.root:
        raise DataError("data.root is not set: give the folder or URI that holds the images and their CSV")
    fs, base = resolve(config.root)
    labels = _label_columns(config)
    pieces, rejects, others = [], [], 0
    for name in _csv_files(config, fs, base):
        piece, rejected, other = _read_csv(config, fs, base, name, labels)
        pieces.append(piece)
        rejects.append(rejected)
        others += other
    table, duplicates = _drop_repeated_rows(pa.concat_tables(pieces))
    rejected = pa.concat_tables([*rejects, duplicates])
    if table.num_rows == 0:
        raise DataError(
            f"{config.root} leaves no image to read: {rejected.num_rows} rows rejected, {others} of another view (data.views={config.views})"
        )
    if config.limit is not None:
        table = table.slice(0, config.limit)
    return Manifest(table, rejected, labels, others)


def read_columns(config: DataConfig, columns: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Image ids and columns of the CSV files as they stand there, blanks as ''; the first row of an image counts.

    The images need not be there, so whether a path begins with the data set's own folder is not known: both readings have an id.

    Raises:
        DataError: no CSV, or a column that is missing.
    """
    if not config.root:
        raise DataError("data.root is not set: give the folder or URI that holds the CSV files")
    fs, base = resolve(config.root)
    path_column = config.path_column if config.format == "csv" else "Path"
    whole: dict[str, tuple[str, ...]] = {}
    stripped: dict[str, tuple[str, ...]] = {}
    for name in _csv_files(config, fs, base):
        table = _strings(fs, posixpath.join(base, name), name, [path_column, *columns])
        for path, *values in zip(table[path_column].to_pylist(), *(table[c].to_pylist() for c in columns), strict=True):
            path = _clean(path)
            whole.setdefault(image_id_of(path), tuple(values))
            stripped.setdefault(image_id_of(path.split("/", 1)[-1]), tuple(values))
    rows = {**stripped, **whole}
    return list(rows), {c: [v[i] for v in rows.values()] for i, c in enumerate(columns)}


def _clean(path: str) -> str:
    return path.strip().replace("\\", "/").lstrip("/")


def _label_columns(config: DataConfig) -> list[str]:
    if config.label_columns is not None:
        if not config.label_columns or len(set(config.label_columns)) != len(config.label_columns):
            raise DataError("data.label_columns must name at least one column, each once")
        return list(config.label_columns)
    if config.format == "csv":
        raise DataError("data.label_columns is not set: format csv needs the names of the label columns")
    return list(CHEXPERT_LABELS)


def _csv_files(config: DataConfig, fs: pafs.FileSystem, base: str) -> list[str]:
    names = config.csv if config.csv is not None else ["train.csv", "valid.csv"]
    there = [n for n in names if fs.get_file_info(posixpath.join(base, n)).type == pafs.FileType.File]
    missing = sorted(set(names) - set(there))
    if config.csv is not None and missing:
        raise DataError(f"{config.root} has no {missing[0]} (data.csv)")
    if not there:
        raise DataError(f"{config.root} has neither train.csv nor valid.csv: set data.root to the folder that holds them, or data.csv")
    return there


def _read_csv(config: DataConfig, fs: pafs.FileSystem, base: str, name: str, labels: list[str]) -> tuple[pa.Table, pa.Table, int]:
    columns: dict[str, str] = {"path": "Path", "view": "Frontal/Lateral", "projection": "AP/PA", "sex": "Sex", "age": "Age"}
    if config.format == "csv":
        given = {
            "path": config.path_column,
            "patient": config.patient_column,
            "study": config.study_column,
            "view": config.view_column,
            "sex": config.sex_column,
            "age": config.age_column,
        }
        columns = {k: v for k, v in given.items() if v is not None}
    table = _strings(fs, posixpath.join(base, name), name, [*columns.values(), *labels])
    found = {key: table[column].to_pylist() for key, column in columns.items()}
    n = table.num_rows
    paths = _strip_prefix(fs, base, [_clean(p) for p in found["path"]])
    empty = [""] * n
    reasons = np.array(["" if p else "no path in this row" for p in paths], dtype=object)
    if config.format == "chexpert":
        patients, studies = _patients_and_studies(paths, reasons)
    else:
        patients = [p or q for p, q in zip(found.get("patient", empty), paths, strict=True)]
        studies = found.get("study", empty)
    view = [_VIEWS.get(v.strip().lower(), "") for v in found.get("view", empty)]
    matrix = np.stack([_label_values(table[c], name, c) for c in labels], axis=1) if n else np.zeros((0, len(labels)), np.int8)
    splits = {p: split_of(p, config.eval_fraction) for p in set(patients)}
    full = pa.table(
        {
            "image_id": [image_id_of(p) for p in paths],
            "path": paths,
            "patient_id": patients,
            "study_id": studies,
            "view": view,
            "projection": [v.strip().upper() for v in found.get("projection", empty)],
            "sex": [_SEX.get(v.strip().lower(), "") for v in found.get("sex", empty)],
            "age": pa.array([_age(v) for v in found.get("age", empty)], pa.float32()),
            "split": [splits[p] for p in patients],
            "labels": pa.ListArray.from_arrays(
                pa.array(np.arange(0, (n + 1) * len(labels), len(labels))[: n + 1], pa.int32()), pa.array(matrix.reshape(-1), pa.int8())
            ),
        },
        schema=MANIFEST_SCHEMA,
    )
    bad = reasons != ""
    wanted = np.array([config.views == "all" or v in (config.views, "") for v in view], dtype=bool).reshape(-1)
    keep = full.filter(pa.array(~bad & wanted))
    rejects = _reject_table([p for p, b in zip(paths, bad, strict=True) if b], [str(r) for r in reasons[bad]])
    return keep, rejects, int((~bad & ~wanted).sum())


def _strings(fs: pafs.FileSystem, path: str, name: str, wanted: list[str]) -> pa.Table:
    """The wanted columns of a CSV, all as strings, blanks as ''."""
    with fs.open_input_stream(path) as stream:
        header = stream.read(1 << 20).decode("utf-8-sig", errors="replace").split("\n", 1)[0]
    if not header.strip():
        raise DataError(f"{name} is empty: its first line must name the columns {', '.join(wanted[:3])}, ...")
    try:
        with fs.open_input_stream(path) as stream:
            table = pacsv.read_csv(
                stream,
                convert_options=pacsv.ConvertOptions(column_types={c: pa.string() for c in wanted}, strings_can_be_null=False),
                parse_options=pacsv.ParseOptions(newlines_in_values=False),
            )
    except pa.ArrowInvalid as error:
        raise DataError(f"{name} is not a CSV that can be read: {_without_content(str(error))}") from error
    missing = [c for c in wanted if c not in table.column_names]
    if missing:
        raise DataError(f"{name} has no column {missing[0]!r}" + (f" (and {len(missing) - 1} more missing)" if len(missing) > 1 else ""))
    return table.select(list(dict.fromkeys(wanted)))


def _without_content(message: str) -> str:
    """What is wrong, without Arrow's quotation of the row, which may hold identifiers."""
    if "columns, got" in message:
        return "a row has more or fewer fields than the first line names"
    return "it is not UTF-8" if "UTF8" in message else "malformed CSV"


def _strip_prefix(fs: pafs.FileSystem, base: str, paths: list[str]) -> list[str]:
    """Drops the data set's own folder from the front of paths where the CSV names it and `root` is that folder."""
    heads = {p.split("/", 1)[0] for p in paths if "/" in p}
    there = {h for h in heads if fs.get_file_info(posixpath.join(base, h)).type == pafs.FileType.Directory}
    return [p.split("/", 1)[1] if "/" in p and p.split("/", 1)[0] not in there else p for p in paths]


def _patients_and_studies(paths: list[str], reasons: np.ndarray) -> tuple[list[str], list[str]]:
    patients, studies = [], []
    for i, path in enumerate(paths):
        match = _CHEXPERT_PATH.search(path)
        patients.append(match[1] if match else "")
        studies.append(match[2] if match else "")
        if not match and not reasons[i]:
            reasons[i] = "path is not of the form .../patient/study/view"
    return patients, studies


def _label_values(column: pa.ChunkedArray, name: str, label: str) -> np.ndarray:
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    codes = []
    for text in encoded.dictionary.to_pylist():
        key = (text or "").strip().lower()
        key = key[:-2] if key.endswith(".0") else key
        if key not in _LABEL_VALUES:
            row = pc.index(column, text).as_py() + 2
            raise DataError(f"{name}, column {label!r}, line {row}: {text!r} is not a label value (1, 0, -1 or blank)")
        codes.append(_LABEL_VALUES[key])
    return np.array(codes, np.int8)[encoded.indices.to_numpy(zero_copy_only=False)] if codes else np.zeros(len(column), np.int8)


def _age(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _drop_repeated_rows(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    ids = table["image_id"].to_numpy(zero_copy_only=False)
    _, first = np.unique(ids, return_index=True)
    keep = np.zeros(len(ids), bool)
    keep[first] = True
    again = table.filter(pa.array(~keep))["path"].to_pylist()
    return table.filter(pa.array(keep)), _reject_table(again, ["this path stands in an earlier row already"] * len(again))


def _reject_table(paths: list[str], reasons: list[str]) -> pa.Table:
    return pa.table({"path": paths, "stage": ["manifest"] * len(paths), "reason": reasons}, schema=REJECT_SCHEMA)
