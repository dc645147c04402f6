"""The run directory: paths, atomic publishing, the manifest and the embedding table. `docs/artifacts.md` is normative."""

from __future__ import annotations

import hashlib
import json
import posixpath
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from medsae.errors import ArtifactError

RAW = "raw"
"""The name under `measure/`, `names/` and `scores/` of the encoder's own features."""

UNCERTAIN = -1
BLANK = -2

EMBEDDING_FIELDS = [
    pa.field("image_id", pa.string()),
    pa.field("path", pa.string()),
    pa.field("patient_id", pa.string()),
    pa.field("study_id", pa.string()),
    pa.field("view", pa.string()),
    pa.field("projection", pa.string()),
    pa.field("sex", pa.string()),
    pa.field("age", pa.float32()),
    pa.field("split", pa.string()),
    pa.field("pixel_hash", pa.string()),
    pa.field("labels", pa.list_(pa.int8())),
    pa.field("embedding", pa.list_(pa.float32())),
]
EMBEDDING_SCHEMA = pa.schema(EMBEDDING_FIELDS)

REJECT_SCHEMA = pa.schema([("path", pa.string()), ("stage", pa.string()), ("reason", pa.string())])

EXEMPLAR_SCHEMA = pa.schema(
    [
        ("neuron", pa.int32()),
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("activation", pa.float32()),
        ("role", pa.string()),
        ("rank", pa.int32()),
        ("quantile", pa.float32()),
    ]
)

NAME_SCHEMA = pa.schema(
    [
        ("neuron", pa.int32()),
        ("namer", pa.string()),
        ("model", pa.string()),
        ("concept", pa.string()),
        ("description", pa.string()),
        ("kind", pa.string()),
        ("status", pa.string()),
        ("prompt_hash", pa.string()),
        ("confidence", pa.float32()),
        ("evidence", pa.string()),
    ]
)

SCORE_SCHEMA = pa.schema(
    [
        ("neuron", pa.int32()),
        ("namer", pa.string()),
        ("control", pa.string()),
        ("method", pa.string()),
        ("balanced_accuracy", pa.float64()),
        ("auc", pa.float64()),
        ("precision", pa.float64()),
        ("recall", pa.float64()),
        ("f1", pa.float64()),
        ("n", pa.int32()),
        ("failures", pa.int32()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """A folder or URI (`s3://`, `gs://`, `file://`) as a pyarrow filesystem and the path in it."""
    try:
        if "://" in uri:
            fs, path = pafs.FileSystem.from_uri(uri)
            return fs, path.rstrip("/")
        import os

        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri)).rstrip("/")
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise ArtifactError(f"{uri!r} cannot be opened as a folder or URI: {str(error).splitlines()[0]}") from error


def sha256(data: bytes) -> str:
    """SHA-256 of `data` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(value: Any) -> str:
    """A short stable hash (16 hex digits) of a JSON-able value; key order does not matter."""
    return sha256(json.dumps(value, sort_keys=True, default=str).encode())[:16]


Strings = list[str]  # inside RunDir, `list` is a method


class RunDir:
    """One run's directory or bucket prefix. All paths are relative to it, with forward slashes."""

    def __init__(self, uri: str) -> None:
        self.fs, self.base = resolve(uri)
        # A worker may run in another folder: what travels to it is the absolute path.
        self.uri = uri if "://" in uri else self.base

    def __reduce__(self) -> tuple[Any, ...]:
        return (RunDir, (self.uri,))

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def path(self, relative: str = "") -> str:
        """The path in `self.fs`; for a local run it is an absolute path of the machine."""
        return posixpath.join(self.base, relative) if relative else self.base

    def exists(self, relative: str) -> bool:
        return self.fs.get_file_info(self.path(relative)).type != pafs.FileType.NotFound

    def list(self, relative: str, suffix: str = "") -> list[str]:
        """Relative paths of the files directly under a folder, sorted; empty where there is no such folder."""
        names = [i.base_name for i in self._entries(relative) if i.type == pafs.FileType.File]
        return sorted(posixpath.join(relative, n) for n in names if n.endswith(suffix) and not n.startswith("."))

    def folders(self, relative: str) -> Strings:
        """Names of the folders directly under a folder, sorted."""
        return sorted(i.base_name for i in self._entries(relative) if i.type == pafs.FileType.Directory)

    def _entries(self, relative: str) -> Any:
        try:
            return self.fs.get_file_info(pafs.FileSelector(self.path(relative), allow_not_found=True))
        except FileNotFoundError:
            return []  # another process removed the folder after it was found

    def read_bytes(self, relative: str) -> bytes:
        try:
            with self.fs.open_input_stream(self.path(relative)) as stream:
                return bytes(stream.read())
        except FileNotFoundError as error:
            raise ArtifactError(f"{self.path(relative)} does not exist; run the stage that writes it first") from error

    def write_bytes(self, relative: str, data: bytes) -> str:
        """Publishes a file atomically and returns its SHA-256."""
        target = self.path(relative)
        self.fs.create_dir(posixpath.dirname(target), recursive=True)
        if self.is_local:
            temporary = posixpath.join(posixpath.dirname(target), f".{posixpath.basename(target)}.{uuid.uuid4().hex}")
            try:
                with self.fs.open_output_stream(temporary) as stream:
                    stream.write(data)
                self.fs.move(temporary, target)
            except BaseException:
                if self.fs.get_file_info(temporary).type != pafs.FileType.NotFound:
                    self.fs.delete_file(temporary)
                raise
        else:
            with self.fs.open_output_stream(target) as stream:
                stream.write(data)
        return sha256(data)

    def delete(self, relative: str) -> None:
        """Removes a file or a folder; nothing happens where there is none."""
        kind = self.fs.get_file_info(self.path(relative)).type
        if kind == pafs.FileType.File:
            self.fs.delete_file(self.path(relative))
        elif kind == pafs.FileType.Directory:
            self.fs.delete_dir(self.path(relative))

    def read_json(self, relative: str) -> Any:
        return json.loads(self.read_bytes(relative))

    def write_json(self, relative: str, value: Any) -> str:
        return self.write_bytes(relative, (json.dumps(value, indent=2, allow_nan=False, default=str) + "\n").encode())

    def read_table(self, relative: str, columns: Strings | None = None) -> pa.Table:
        """One Parquet file as a table."""
        if not self.exists(relative):
            raise ArtifactError(f"{self.path(relative)} does not exist; run the stage that writes it first")
        with self.fs.open_input_file(self.path(relative)) as source:
            return pq.read_table(source, columns=columns)

    def write_table(self, relative: str, table: pa.Table) -> str:
        """Publishes a table as one Parquet file and returns its SHA-256."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        return self.write_bytes(relative, sink.getvalue().to_pybytes())

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; an empty one where the run has not begun."""
        if not self.exists("manifest.json"):
            return {"schema": 1, "stages": {}}
        manifest: dict[str, Any] = self.read_json("manifest.json")
        return manifest

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        self.write_json("manifest.json", manifest)


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of some images with what is known of them.

    `x` float32 [n, d]; `labels` int8 [n, C] with raw values (1, 0, -1 uncertain, -2 blank); `meta` the other columns of the artifact.
    """

    x: np.ndarray
    labels: np.ndarray
    label_names: list[str]
    meta: pa.Table

    def __len__(self) -> int:
        return len(self.x)

    def column(self, name: str) -> np.ndarray:
        """A metadata column (`image_id`, `path`, `patient_id`, ...) as a numpy array."""
        return np.asarray(self.meta.column(name).to_numpy(zero_copy_only=False))


def embedding_parts(run: RunDir) -> list[str]:
    """Relative paths of the embedding parts, in order.

    Raises:
        ArtifactError: when there is none.
    """
    parts = [p for p in run.list("embeddings", ".parquet") if posixpath.basename(p).startswith("part-")]
    if not parts:
        raise ArtifactError(f"{run.path('embeddings')} holds no embeddings; run `medsae extract` first")
    return parts


def as_matrix(column: pa.ChunkedArray, dtype: Any) -> np.ndarray:
    """A column of lists of one length as a matrix [n, length]; raises ValueError where lengths differ."""
    flat = column.combine_chunks()
    if isinstance(flat, pa.ChunkedArray):
        flat = pa.concat_arrays(flat.chunks) if flat.num_chunks else pa.array([], flat.type)
    n = len(flat)
    values = flat.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values.reshape(n, -1) if n else values.reshape(0, 0), dtype=dtype)


def as_embeddings(table: pa.Table, label_names: list[str]) -> Embeddings:
    """A table in the schema of `embeddings/part-*.parquet` as arrays."""
    meta = table.drop_columns(["labels", "embedding"])
    return Embeddings(as_matrix(table["embedding"], np.float32), as_matrix(table["labels"], np.int8), label_names, meta)


def read_part(run: RunDir, part: str, label_names: list[str], split: str | None = None) -> Embeddings:
    """One part of the embeddings, of one split (`train`, `eval`) or of all."""
    table = run.read_table(part)
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    return as_embeddings(table, label_names)


def read_meta(run: RunDir, part: str, label_names: list[str], split: str | None = None) -> Embeddings:
    """As `read_part`, without reading the embeddings: `x` has no columns."""
    table = run.read_table(part, [f.name for f in EMBEDDING_FIELDS if f.name != "embedding"])
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    return Embeddings(np.zeros((table.num_rows, 0), np.float32), as_matrix(table["labels"], np.int8), label_names, table.drop_columns(["labels"]))


def iter_embeddings(run: RunDir, split: str | None = None) -> Iterator[Embeddings]:
    """The parts of the embeddings one after the other; memory is that of one part."""
    names = label_names(run)
    for part in embedding_parts(run):
        yield read_part(run, part, names, split)


def read_embeddings(run: RunDir, split: str | None = None) -> Embeddings:
    """All embeddings of a split in memory (CheXpert at d = 512: 0.46 GB)."""
    table = pa.concat_tables([run.read_table(p) for p in embedding_parts(run)])
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    return as_embeddings(table, label_names(run))


def label_names(run: RunDir) -> list[str]:
    """The label names of a run, in the order of the `labels` column."""
    manifest = run.read_manifest()
    if "labels" not in manifest:
        raise ArtifactError(f"{run.path('manifest.json')} names no labels; run `medsae extract` first")
    return list(manifest["labels"])
