"""Where the training log goes while training runs: JSON lines, TensorBoard, wandb."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medsae.artifacts import RunDir
from medsae.errors import ConfigError
from medsae.pipeline.trackers import JsonLines, check_trackers, open_trackers
from medsae.sae.config import SAEConfig


def log(steps: int) -> list[dict[str, Any]]:
    return [
        {
            "step": 5 * e,
            "epoch": e,
            "fvu": 1 / e,
            "l0": 4.0,
            "loss": {"mse": 2 / e, "l1": 0.5},
            "dead_share": 0.0,
            "lr": 1e-3,
            "samples_per_second": 9.0,
        }
        for e in range(1, steps + 1)
    ]


FIGURES = {"fvu", "l0", "loss/mse", "loss/l1", "dead_share", "lr", "samples_per_second"}


def test_json_lines_are_written_while_training_runs_and_at_its_end(tmp_path: Path) -> None:
    lines = JsonLines(RunDir(str(tmp_path)), "now")
    lines.write("a", log(1))
    assert json.loads((tmp_path / "now/a.jsonl").read_text()) == log(1)[0]
    for steps in (2, 3):  # within seconds of the first: kept until they are due
        lines.write("a", log(steps))
        lines.write("b", log(steps))
    assert not (tmp_path / "now/b.jsonl").exists()
    lines.close()
    assert [[json.loads(line) for line in (tmp_path / f"now/{n}.jsonl").read_text().splitlines()] for n in "ab"] == [log(3)] * 2


def test_tensorboard_holds_every_figure_and_a_restart_replaces_what_it_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 4), (3, 5)):  # the second life goes on from a checkpoint at epoch 2
        (_, board) = open_trackers(("tensorboard",), RunDir(str(tmp_path)), "now", "t", [])
        for steps in range(first, last + 1):
            board.write("a", log(steps))
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard/a"), purge_orphaned_data=True).Reload()
    assert set(events.Tags()["scalars"]) == FIGURES
    assert [(e.step, e.value) for e in events.Scalars("loss/mse")] == [(5 * e, pytest.approx(2 / e)) for e in range(1, 6)]


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log (blocks of 32 KiB, each record with checksum, length and type) behind wandb's seven bytes."""
    block, place, pieces = 32768, 7, []
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        pieces.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield b"".join(pieces)
            pieces = []


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed here")
def test_wandb_takes_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, into its own file, which is read back."""
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    configs = [SAEConfig(name=n, dict_size=8) for n in "ab"]  # type: ignore[call-arg]
    (_, tracker) = open_trackers(("wandb",), RunDir(str(tmp_path)), "now", "t", configs)
    for steps in (1, 2):
        for name in "ab":
            tracker.write(name, log(steps))
    tracker.close()
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert [f.name for f in files] == ["run-t-a.wandb", "run-t-b.wandb"]
    found = []
    for data in leveldb_records(files[0].read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            found.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    assert [row["fvu"] for row in found] == [1, 0.5]
    assert all(set(row) >= FIGURES | {"epoch"} for row in found)


def test_what_cannot_work_is_one_line_before_training() -> None:
    check_trackers((), RunDir("s3://bucket/run?region=nowhere"))
    for names, run, message in (
        (("no_such_tracker",), RunDir("run"), "no_such_tracker, which is not installed; `pip install no_such_tracker`"),
        (("tensorboard",), RunDir("s3://bucket/run?region=nowhere"), "tensorboard writes to a local run directory only"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            check_trackers(names, run)
        assert "\n" not in str(caught.value)
