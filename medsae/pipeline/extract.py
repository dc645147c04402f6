"""extract: manifest -> decode on CPU tasks -> encode on an actor pool -> Parquet parts.

The manifest is cut into parts, in its own order. A part is one row of the Ray data set from end to end (its images packed as an Arrow stream), so no
batching, bundling or splitting can mix or tear parts; it becomes one file, published by a rename: whatever is retried, killed or restarted, an image_id
is written once. A part that is there already, from the same images and the same encoder settings, is not made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from PIL import Image

from medsae.artifacts import EMBEDDING_SCHEMA, REJECT_SCHEMA, RunDir, embedding_parts, fingerprint, resolve
from medsae.config import RunConfig
from medsae.data.config import DataConfig
from medsae.data.manifest import Manifest, read_manifest
from medsae.encoders import find_batch_size, load_encoder, load_preprocess
from medsae.encoders.config import EncoderConfig
from medsae.errors import ArtifactError, DataError, MedSAEError
from medsae.memory import keep_freed_memory
from medsae.pipeline.cluster import cluster_gpus, quiet_ray_data, ray_session
from medsae.pipeline.stage import StageResult, hash_outputs
from medsae.progress import progress

PLAN_KEY, ENCODER_KEY = b"medsae.plan", b"medsae.encoder"


@dataclass(frozen=True)
class Part:
    """A run of manifest rows that becomes one file."""

    index: int
    table: pa.Table
    plan: str

    @property
    def file(self) -> str:
        return f"embeddings/part-{self.index:05d}.parquet"


def run(config: RunConfig, run: RunDir) -> StageResult:
    """Embeds every image of the manifest.

    Raises:
        MedSAEError: the manifest cannot be read, the encoder cannot be loaded, or no image could be decoded.
    """
    load_preprocess(config.encoder.name)  # an unknown encoder is said before anything starts
    manifest = read_manifest(config.data)
    parts = plan_parts(manifest, config.data, config.encoder)
    todo = _clean_and_find_missing(run, parts)
    images = sum(p.table.num_rows for p in parts)
    fresh = sum(p.table.num_rows for p in todo)
    seconds = 0.0
    if todo:
        with ray_session(config.ray):
            gpus = cluster_gpus(config.ray)
            seconds = _extract(config, run, todo, images, gpus)
    return _finish(run, manifest, parts, {"images": images, "encoded": fresh, "resumed": images - fresh, "encode_seconds": round(seconds, 2)})


def plan_parts(manifest: Manifest, data: DataConfig, encoder: EncoderConfig) -> list[Part]:
    """Cuts the manifest into parts; `plan` names all that decides a part's content."""
    n = manifest.table.num_rows
    rows = encoder.rows_per_part or max(32, min(2048, math.ceil(n / 16)))
    settings = {
        "encoder": encoder.model_dump(mode="json", exclude={"batch_size", "actors", "rows_per_part"}),
        "root": data.root,
        "max_pixels": data.max_pixels,
        "labels": manifest.label_names,
    }
    parts = []
    for index, start in enumerate(range(0, n, rows)):
        table = manifest.table.slice(start, rows).combine_chunks()
        content = fingerprint(table.to_pydict())
        parts.append(Part(index, table, fingerprint({**settings, "rows": content})))
    return parts


def _clean_and_find_missing(run: RunDir, parts: list[Part]) -> list[Part]:
    """Removes files of another plan and returns the parts that have none."""
    wanted = {p.file: p for p in parts}
    for file in run.list("embeddings", ".parquet"):
        part = wanted.get(file)
        if part is not None and (_footer(run, file).get(PLAN_KEY) or b"").decode() == part.plan:
            del wanted[file]
        else:
            run.delete(file)
    return [p for p in parts if p.file in wanted]


def _footer(run: RunDir, file: str) -> dict[bytes, bytes]:
    with run.fs.open_input_file(run.path(file)) as source:
        return dict(pq.read_schema(source).metadata or {})


def pack(table: pa.Table) -> pa.Buffer:
    """A table as one Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def unpack(value: pa.Scalar) -> pa.Table:
    """The table inside a row's `payload`, without a copy."""
    return pa.ipc.open_stream(value.as_buffer()).read_all()


def _rows(part: str, payload: pa.Buffer) -> pa.Table:
    array = pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, payload.size], np.int64)), payload])
    return pa.table({"part": [part], "payload": array})


def decode_part(rows: pa.Table, data: DataConfig, encoder_name: str, reduced: bool = False) -> pa.Table:
    """A part's manifest rows to rows with the encoder's 8-bit pixels, or a reason. Holds no weights."""
    from medsae.data import radiograph

    keep_freed_memory()
    fs, base = resolve(data.root)
    preprocess = load_preprocess(encoder_name)
    reduce_to = 2 * max(preprocess(Image.new("L", (8, 8))).shape) if reduced else 0
    table = unpack(rows["payload"][0])
    pixels: list[bytes] = []
    hashes: list[str] = []
    reasons: list[str] = []
    shape = (0, 0)
    for path in table["path"].to_pylist():
        content, digest, reason = b"", "", ""
        try:
            array = preprocess(radiograph.load(fs, f"{base}/{path}", data.max_pixels, reduce_to))
            shape, content = array.shape, array.tobytes()
            digest = hashlib.sha256(content).hexdigest()[:16]
        except DataError as error:
            reason = str(error)
        pixels.append(content)
        hashes.append(digest)
        reasons.append(reason)
    table = table.append_column("pixel_hash", pa.array(hashes, pa.string()))
    table = table.append_column("reason", pa.array(reasons, pa.string()))
    table = table.append_column("pixels", pa.array(pixels, pa.large_binary()))
    return _rows(rows["part"][0].as_py(), pack(table.replace_schema_metadata({b"shape": f"{shape[0]}x{shape[1]}".encode()})))


class EncodePart:
    """A part's pixels to embeddings; one actor holds one encoder."""

    def __init__(self, config: EncoderConfig, device: str, threads: int | None) -> None:
        from medsae.encoders.conformance import check_encoder

        keep_freed_memory()
        if threads:
            import torch

            torch.set_num_threads(threads)
        self.failure: MedSAEError | None = None  # travels as data: Ray does not keep the cause of a failed constructor or call
        try:
            self.encoder = load_encoder(config.name, config.weights, device=device, seed=config.seed, dtype=config.dtype, sha256=config.sha256)
            check_encoder(self.encoder)
        except MedSAEError as error:
            self.failure = error
            return
        self.info = json.dumps(asdict(self.encoder.info), sort_keys=True).encode()
        self.batch_size = config.batch_size or _default_batch_size(self.encoder, device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        if self.failure is None:
            try:
                return self._embed(rows)
            except MedSAEError as error:
                self.failure = error
        return pa.table({"part": rows["part"], "payload": [b""], "failure": [f"{type(self.failure).__name__}: {self.failure}"]})

    def _embed(self, rows: pa.Table) -> pa.Table:
        table = unpack(rows["payload"][0])
        height, width = (int(v) for v in table.schema.metadata[b"shape"].split(b"x"))
        good = table["pixels"].filter(pc.equal(table["reason"], "")).combine_chunks()
        good = pa.concat_arrays(good.chunks) if isinstance(good, pa.ChunkedArray) else good
        content = np.frombuffer(b"".join(v.as_buffer() for v in good), np.uint8)
        matrix = self._encode(content.reshape(len(good), height, width)) if len(good) else np.zeros((0, self.encoder.dim), np.float32)
        table = table.drop_columns(["pixels"]).replace_schema_metadata({ENCODER_KEY: self.info, b"dim": str(self.encoder.dim).encode()})
        table = table.append_column("embedding", _with_gaps(matrix, table["reason"].to_pylist()))
        return _rows(rows["part"][0].as_py(), pack(table))

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        chunks = [self.encoder.encode(pixels[i : i + self.batch_size]) for i in range(0, len(pixels), self.batch_size)]
        matrix = np.concatenate(chunks).astype(np.float32, copy=False)
        if matrix.shape != (len(pixels), self.encoder.dim) or not np.isfinite(matrix).all():
            raise DataError(f"encoder {self.encoder.name} returned shape {matrix.shape} or values that are not finite for {len(pixels)} images")
        return matrix


def _with_gaps(matrix: np.ndarray, reasons: list[str]) -> pa.Array:
    """Rows of a matrix as lists; empty lists where there is a reason instead."""
    lengths = np.where(np.array(reasons, dtype=object) == "", matrix.shape[1], 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(matrix.reshape(-1)))


def _default_batch_size(encoder: Any, device: str) -> int:
    if not device.startswith("cuda"):
        return 32
    return int(find_batch_size(encoder))


def write_part(rows: pa.Table, run: RunDir, plans: dict[str, str]) -> pa.Table:
    """Publishes one part: the rejects first, then the embeddings, so that a part that is there is whole."""
    if "failure" in rows.column_names:
        return pa.table({"images": [0], "rejected": [0], "failure": rows["failure"]})
    part, table = rows["part"][0].as_py(), unpack(rows["payload"][0])
    ok = pc.equal(table["reason"], "")
    bad = table.filter(pc.invert(ok))
    if bad.num_rows:
        rejects = pa.table({"path": bad["path"], "stage": ["extract"] * bad.num_rows, "reason": bad["reason"]}, schema=REJECT_SCHEMA)
        run.write_table(_rejects_file(part), rejects)
    good = table.filter(ok).select(EMBEDDING_SCHEMA.names).cast(EMBEDDING_SCHEMA)
    run.write_table(part, good.replace_schema_metadata({PLAN_KEY: plans[part].encode(), ENCODER_KEY: table.schema.metadata[ENCODER_KEY]}))
    return pa.table({"images": [table.num_rows], "rejected": [bad.num_rows], "failure": [""]})


def _rejects_file(part: str) -> str:
    folder, name = part.rsplit("/", 1)
    return f"{folder}/.rejects/{name}"


def _extract(config: RunConfig, run: RunDir, todo: list[Part], images: int, gpus: int) -> float:
    context = ray.data.DataContext.get_current()
    quiet_ray_data()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []
    cores = os.cpu_count() or 1
    actors = config.encoder.actors or (gpus if gpus else 1)
    device = "cuda" if gpus else "cpu"
    pool = ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2)
    # On CPUs the pool takes a fraction of each logical CPU, so that decoding is never starved; on GPUs, none.
    resources: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 0.5}
    threads = None if gpus else max(1, cores // actors)
    plans = {p.file: p.plan for p in todo}
    ds = (
        ray.data.from_arrow([_rows(p.file, pack(p.table)) for p in todo])
        .map_batches(
            decode_part,
            fn_kwargs={"data": config.data, "encoder_name": config.encoder.name, "reduced": config.encoder.reduced_decode},
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
        )
        .map_batches(
            EncodePart,
            fn_constructor_kwargs={"config": config.encoder, "device": device, "threads": threads},
            batch_size=1,
            batch_format="pyarrow",
            compute=pool,
            **resources,
        )
        .map_batches(write_part, fn_kwargs={"run": run, "plans": plans}, batch_size=1, batch_format="pyarrow", num_cpus=0.25)
    )
    fresh = sum(p.table.num_rows for p in todo)
    started = time.perf_counter()
    with progress(images, "extract", "image", initial=images - fresh) as bar:
        for batch in ds.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for failure in filter(None, batch["failure"].to_pylist()):
                kind, _, message = failure.partition(": ")
                raise next((k for k in MedSAEError.__subclasses__() if k.__name__ == kind), MedSAEError)(message)
            bar.update(sum(batch["images"].to_pylist()))
    return time.perf_counter() - started


def _finish(run: RunDir, manifest: Manifest, parts: list[Part], counts: dict[str, Any]) -> StageResult:
    infos = {(_footer(run, p.file).get(ENCODER_KEY) or b"").decode() for p in parts}
    if len(infos) != 1:
        raise ArtifactError(f"{run.path('embeddings')} was made with {len(infos)} different sets of encoder weights: run extract with --force")
    pieces = [manifest.rejects] + [run.read_table(_rejects_file(p.file)) for p in parts if run.exists(_rejects_file(p.file))]
    rejects = pa.concat_tables(pieces)
    run.write_table("rejects.parquet", rejects)
    extracted = rejects.num_rows - manifest.rejects.num_rows
    if extracted == counts["images"]:
        reason, how_many = pc.value_counts(rejects["reason"])[0].as_py().values()
        raise DataError(f"none of the {counts['images']} images could be read; {how_many} times: {reason}")
    files = embedding_parts(run)
    outputs = hash_outputs(run, [*files, "rejects.parquet"])
    duplicates = _duplicates(run, files)
    outputs["duplicates.parquet"] = run.write_table("duplicates.parquet", duplicates)
    counts |= {"rejected": rejects.num_rows, "other_views": manifest.other_views, "duplicates": duplicates.num_rows, "parts": len(parts)}
    encoder = json.loads(infos.pop())
    return StageResult(counts=counts, outputs=outputs, manifest={"labels": manifest.label_names, "encoder": encoder})


def _duplicates(run: RunDir, files: list[str]) -> pa.Table:
    """Images whose pixels, as the encoder saw them, equal those of an earlier image."""
    table = pa.concat_tables([run.read_table(f, columns=["image_id", "patient_id", "pixel_hash"]) for f in files])
    hashes = table["pixel_hash"].to_numpy(zero_copy_only=False)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(hashes)))
    ids, patients = (table[c].to_numpy(zero_copy_only=False) for c in ("image_id", "patient_id"))
    originals = first[inverse][again]
    return pa.table(
        {
            "image_id": pa.array(ids[again], pa.string()),
            "same_as": pa.array(ids[originals], pa.string()),
            "other_patient": pa.array(patients[again] != patients[originals], pa.bool_()),
            "pixel_hash": pa.array(hashes[again], pa.string()),
        }
    )
