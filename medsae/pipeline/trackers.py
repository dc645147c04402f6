"""Where the training log goes while training runs: JSON lines always, TensorBoard and wandb where asked for."""

from __future__ import annotations

import importlib.util
import os
import posixpath
import time
from typing import Any, Protocol

from medsae.artifacts import RunDir
from medsae.errors import ConfigError
from medsae.sae.checkpoint import as_lines
from medsae.sae.config import SAEConfig

EVERY = 5.0
"""Seconds between two writes of the JSON lines; each writes a file anew, because object stores cannot append."""
BOARD = "tensorboard"
"""Folder of TensorBoard's files in the run directory."""


class Tracker(Protocol):
    """Takes each line of the log (`docs/sae.md`) as it comes."""

    def write(self, name: str, log: list[dict[str, Any]]) -> None:
        """The log of an autoencoder, of which the last line is new."""

    def close(self) -> None:
        """Training is over, or has failed."""


class JsonLines:
    """`FOLDER/NAME.jsonl`, at most a few seconds behind."""

    def __init__(self, run: RunDir, folder: str) -> None:
        self.run, self.folder = run, folder
        self.logs: dict[str, list[dict[str, Any]]] = {}
        self.written = -EVERY

    def write(self, name: str, log: list[dict[str, Any]]) -> None:
        self.logs[name] = log
        if time.monotonic() - self.written >= EVERY:
            self.close()

    def close(self) -> None:
        for name, log in self.logs.items():
            self.run.write_bytes(posixpath.join(self.folder, f"{name}.jsonl"), as_lines(log))
        self.logs.clear()
        self.written = time.monotonic()


def flat(line: dict[str, Any]) -> dict[str, float]:
    """The figures of a line by name; those of `loss` as loss/TERM."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= {f"{key}/{term}": float(v) for term, v in value.items()}
        elif key not in ("step", "epoch"):
            found[key] = float(value)
    return found


class TensorBoard:
    """Event files in `tensorboard/NAME` of a local run directory; figures over steps."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.writers = run, dict[str, Any]()

    def write(self, name: str, log: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        step = log[-1]["step"]
        if name not in self.writers:
            # After a restart, what an earlier life wrote beyond this step is dropped by the reader.
            self.writers[name] = SummaryWriter(self.run.path(posixpath.join(BOARD, name)), purge_step=step)
        for key, value in flat(log[-1]).items():
            self.writers[name].add_scalar(key, value, step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class Wandb:
    """A wandb run an autoencoder, grouped by the training; where and whether they are sent is for wandb's own environment (`WANDB_MODE`, ...) to say."""

    def __init__(self, run: RunDir, training: str, configs: list[SAEConfig]) -> None:
        self.run, self.training, self.configs = run, training, {c.name: c for c in configs}
        self.runs: dict[str, Any] = {}

    def write(self, name: str, log: list[dict[str, Any]]) -> None:
        import wandb

        if name not in self.runs:
            self.runs[name] = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "medsae"),
                id=f"{self.training}-{name}",
                name=name,
                group=self.training,
                resume="allow",
                reinit="create_new",
                config=self.configs[name].model_dump(mode="json", exclude_none=True),
                settings=wandb.Settings(save_code=False, disable_git=True, console="off", silent=True),
            )
        self.runs[name].log({**flat(log[-1]), "epoch": log[-1]["epoch"]}, step=log[-1]["step"])

    def close(self) -> None:
        for run in self.runs.values():
            run.finish()


def check_trackers(names: tuple[str, ...], run: RunDir) -> None:
    """Stops where a tracker cannot work, before training begins.

    Raises:
        ConfigError: it is not installed, or cannot write to this run directory.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"fit.trackers asks for {name}, which is not installed; `pip install {name}`, or take it out (training.jsonl is always written)"
            )
    if "tensorboard" in names and not run.is_local:
        raise ConfigError(f"fit.trackers: tensorboard writes to a local run directory only, and this one is {run.uri}; take it out or use wandb")


def open_trackers(names: tuple[str, ...], run: RunDir, folder: str, training: str, configs: list[SAEConfig]) -> list[Tracker]:
    """The trackers of a training; `training` names it, `folder` is where its JSON lines go."""
    found: list[Tracker] = [JsonLines(run, folder)]
    if "tensorboard" in names:
        found.append(TensorBoard(run))
    if "wandb" in names:
        found.append(Wandb(run, training, configs))
    return found
