"""Training inputs that do not fit in memory: one pass over the parts for what scaling needs, then windows of steps, through Ray Data."""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import torch
from ray.data import ExecutionResources, TaskPoolStrategy

from medsae.artifacts import RunDir, as_matrix, embedding_parts, fingerprint
from medsae.errors import DataError, MedSAEError
from medsae.sae.data import Moments, Scaling, center_rows, check_counts, geometric_median, not_finite
from medsae.sae.source import StreamOrder, Window, arrange, as_tensor

READERS = 2
"""Tasks that read at a time for a worker."""
AHEAD = 2.0**27
"""Bytes that are read ahead of their use, where no more is needed."""


@dataclass(frozen=True)
class Stream:
    """What it takes to stream the training split: where its parts are, the order, and the scaling. Small; it travels to the workers."""

    run: RunDir
    parts: tuple[str, ...]
    order: StreamOrder
    scaling: Scaling
    center: np.ndarray
    digest: str
    """Hash of the embeddings."""

    @property
    def samples(self) -> int:
        return self.order.samples

    @property
    def dim(self) -> int:
        return len(self.scaling.mean)

    @property
    def told(self) -> str:
        """What is written of the order beside the weights."""
        return f"streamed, shuffled in windows of {self.order.window} samples"

    def plan(self, batch_size: int) -> tuple[int, int]:
        return self.order.plan(batch_size)

    def open(self, device: torch.device) -> Streamed:
        return Streamed(self, device)


class Streamed:
    """A `Source` that reads the parts anew in every epoch; memory is that of a few windows."""

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self.stream, self.device = stream, device
        self.samples, self.dim = stream.samples, stream.dim

    def plan(self, batch_size: int) -> tuple[int, int]:
        return self.stream.plan(batch_size)

    def batches(self, seed: int, epoch: int, batch_size: int, rank: int, world: int) -> Iterator[torch.Tensor]:
        windows = list(self.stream.order.windows(seed, epoch, batch_size, rank, world))
        ahead = (READERS + 1) * max(w.steps for w in windows) * self.plan(batch_size)[1] // world * self.dim * 4
        payloads = in_order(windows, functools.partial(read_window, stream=self.stream, seed=seed), ahead)
        for window, payload in zip(windows, payloads, strict=True):
            batches = np.frombuffer(payload, np.float32).reshape(window.steps, -1, self.dim)
            for batch in batches:
                yield as_tensor(batch).to(self.device)

    def shares(self, rank: int, world: int) -> Iterator[torch.Tensor]:
        for payload in in_order(list(self.stream.parts[rank::world]), functools.partial(_scaled_part, stream=self.stream)):
            yield as_tensor(np.frombuffer(payload, np.float32).reshape(-1, self.dim)).to(self.device)


def survey(run: RunDir, where: str, dim: int | None, seed: int, window: int, lanes: int) -> Stream:
    """Reads the training split once for counts, moments, bad values and a hash, and once more for the rows of the starting centre.

    Raises:
        DataError: embeddings that cannot be trained on.
    """
    parts = embedding_parts(run)
    facts = [pickle.loads(payload) for payload in in_order(parts, functools.partial(_facts, run=run))]
    filled = [fact for fact in facts if fact["rows"]]
    widths = sorted({fact["width"] for fact in filled})
    if len(widths) > 1:
        raise DataError(f"{where}: embeddings are {' and '.join(map(str, widths))} wide; delete the folder and run extract again")
    counts = tuple(int(fact["rows"]) for fact in facts)
    check_counts(sum(counts), widths[0] if widths else 0, sum(fact["bad"] for fact in filled), where, dim)
    scaling = functools.reduce(Moments.merge, (fact["moments"] for fact in filled)).scaling(where)
    center = _center(run, parts, counts, scaling, seed)
    return Stream(
        run, tuple(parts), StreamOrder(counts, window, lanes), scaling, center, fingerprint([[fact["digest"] for fact in facts], window, lanes])
    )


def _center(run: RunDir, parts: list[str], counts: tuple[int, ...], scaling: Scaling, seed: int) -> np.ndarray:
    """Where `b_dec` starts: the geometric median of some rows."""
    rows = center_rows(sum(counts), seed)
    ends = np.cumsum(counts)
    wanted = [(part, rows[(rows >= end - n) & (rows < end)] - (end - n)) for part, n, end in zip(parts, counts, ends, strict=True)]
    payloads = in_order([(part, chosen) for part, chosen in wanted if len(chosen)], functools.partial(_chosen_rows, run=run))
    x = np.concatenate([np.frombuffer(payload, np.float32).reshape(-1, len(scaling.mean)) for payload in payloads])
    return geometric_median(scaling.apply(x))


def split_rows(run: RunDir, part: str) -> np.ndarray:
    """Raw embeddings [n, d] of a part's training split."""
    table = run.read_table(part, columns=["split", "embedding"])
    try:
        return as_matrix(table.filter(pc.equal(table["split"], "train"))["embedding"], np.float32)
    except ValueError as error:
        raise DataError(f"{run.path(part)}: embeddings differ in width from row to row; delete the folder and run extract again") from error


def _facts(part: str, run: RunDir) -> bytes:
    x = split_rows(run, part)
    if not len(x):
        return pickle.dumps({"rows": 0, "digest": ""})
    bad = not_finite(x)
    moments = None if bad else Moments.of(x)
    return pickle.dumps({"rows": len(x), "width": x.shape[1], "bad": bad, "moments": moments, "digest": hashlib.sha256(x.data).hexdigest()})


def _chosen_rows(task: tuple[str, np.ndarray], run: RunDir) -> bytes:
    part, chosen = task
    return split_rows(run, part)[chosen].tobytes()


def _scaled_part(part: str, stream: Stream) -> bytes:
    return stream.scaling.apply(split_rows(stream.run, part)).tobytes()


def read_window(window: Window, stream: Stream, seed: int) -> bytes:
    """A worker's batches of a window, float32 [steps, b, d]."""
    read: dict[int, np.ndarray] = {}
    pieces = []
    for spans in window.rows:
        rows = []
        for span in spans:
            # A part is kept only as long as the next lane may begin in it.
            read = {part: x for part, x in read.items() if part == span.part} or {span.part: split_rows(stream.run, stream.parts[span.part])}
            rows.append(read[span.part][span.start : span.stop])
        pieces.append(stream.scaling.apply(np.concatenate(rows)))
    return arrange(window, seed, pieces).tobytes()


def in_order(tasks: list[Any], work: Callable[[Any], bytes], ahead: float = AHEAD) -> Iterator[pa.Buffer]:
    """What `work` makes of each task, in the order of the tasks, through Ray Data: a few tasks run ahead of who reads, as long as what they have made
    and is not read yet stays within about `ahead` bytes. Ray Data alone would go on until half the object store is full.

    Raises:
        MedSAEError: what a task raised, as a DataError.
    """

    def run_task(rows: pa.Table) -> pa.Table:
        payload, failure = b"", ""
        try:
            payload = work(pickle.loads(rows["task"][0].as_buffer()))
        except MedSAEError as error:
            failure = str(error)
        return pa.table({"index": rows["index"], "payload": pa.array([payload], pa.large_binary()), "failure": [failure]})

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=ahead)
    with ray.data.DataContext.current(context):
        rows = [pa.table({"index": [i], "task": [pickle.dumps(task)]}) for i, task in enumerate(tasks)]
        pool = TaskPoolStrategy(size=READERS)
        data = ray.data.from_arrow(rows).map_batches(run_task, batch_size=1, batch_format="pyarrow", num_cpus=0.5, compute=pool)
    expected = 0
    for table in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for index, payload, failure in zip(table["index"].to_pylist(), table["payload"], table["failure"].to_pylist(), strict=True):
            if failure:
                raise DataError(failure)
            if index != expected:
                raise RuntimeError(f"Ray Data gave block {index} where {expected} was due")
            expected += 1
            yield payload.as_buffer()
