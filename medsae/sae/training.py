"""The training loop: steps, schedules, counters, logs and exact resume. Knows nothing of where batches come from or who restarts it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medsae.errors import MedSAEError
from medsae.sae.base import StepInput, Workspace
from medsae.sae.collective import Collective
from medsae.sae.config import SAEConfig
from medsae.sae.data import batch_plan
from medsae.sae.dead import resample
from medsae.sae.registry import build
from medsae.sae.source import Held, Source
from medsae.sae.update import Update

DIVERGED = 1e4
"""FVU of an epoch at which training has diverged (1 is as bad as the mean)."""


class DivergenceError(MedSAEError):
    """Training that produced NaN or blew up."""


def learning_rate(config: SAEConfig, step: int, steps: int) -> float:
    """Linear warm-up from 0, constant, linear decay to 0. `step` counts from 0; the first step already has a share of the rate."""
    assert config.lr is not None
    warm = max(1, round(config.warmup * steps))
    fall = round(config.decay * steps)
    factor = min(1.0, (step + 1) / warm)
    if fall and step >= steps - fall:
        factor *= (steps - step) / (fall + 1)
    return config.lr * factor


def sparsity_factor(config: SAEConfig, step: int, steps: int) -> float:
    """Linear warm-up of the sparsity coefficient, from 0 to 1."""
    warm = round((config.sparsity_warmup or 0.0) * steps)
    return min(1.0, step / warm) if warm else 1.0


class Trainer:
    """One autoencoder in training.

    Deterministic: everything that draws at random is seeded by (seed, step), so that the state is the parameters, the optimiser, the counters and the
    log. With several workers, each holds the same state; all that is summed over the batch is summed over the workers.
    """

    def __init__(
        self,
        config: SAEConfig,
        dim: int,
        samples: int,
        seed: int = 0,
        center: np.ndarray | None = None,
        device: str | torch.device = "cpu",
        collective: Collective | None = None,
        plan: tuple[int, int] | None = None,
        workspace: Workspace | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`samples` of the training split, over all workers; `center` [d] starts `b_dec`; `plan` steps an epoch and samples a batch, where the source
        of the batches cuts them otherwise than `batch_plan`; `workspace` is shared by trainers that take turns; `dtype` of parameters and inputs. All workers must make the same trainers in the same order.
        """
        self.config, self.samples, self.seed, self.device = config, samples, seed, torch.device(device)
        self.collective = collective or Collective()
        self.workspace = workspace or Workspace()
        self.steps_per_epoch, self.batch = plan or batch_plan(samples, config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        self.sae = build(config, dim, seed, center).to(self.device)
        for parameter in self.sae.parameters():
            parameter.data = parameter.data.to(dtype)
        self.update = Update(self.sae, config, self.collective)
        self.step_count = 0
        self.silent = torch.zeros(config.dict_size, dtype=torch.int64, device=self.device)
        self.dead_after = max(1, round((config.dead_epochs or 2.0) * samples))
        self.resampled = 0
        self.log: list[dict[str, Any]] = []
        self._sums: dict[str, Tensor] = {}
        self._since = time.perf_counter()

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step_count // self.steps_per_epoch

    @property
    def dead(self) -> Tensor:
        """Which neurons have been silent for `dead_epochs`, bool [m]."""
        return self.silent >= self.dead_after

    def step(self, x: Tensor) -> None:
        """One step on this worker's share x [b, d] of the global batch of `self.batch` samples.

        Order: backward, sum over workers, removal of parallel gradients, clip, Adam, renormalisation (`docs/sae.md`).
        """
        rate = learning_rate(self.config, self.step_count, self.steps)
        factor = sparsity_factor(self.config, self.step_count, self.steps)
        given = StepInput(x, self.batch, factor, self.dead, self.collective, self.workspace)
        out = self.sae.loss(given)
        out.loss.backward()
        loss = self.update.sum(out.loss.detach())
        if self.device.type == "cpu" and not math.isfinite(float(loss)):
            raise self._divergence(rate)
        self.update.step(rate)
        # The message that ends the step: nobody goes on before all have updated their parameters.
        fired = self.collective.max(out.fired.to(torch.uint8)).bool()
        self.silent = torch.where(fired, 0, self.silent + self.batch)
        self.step_count += 1
        if self._resampling_due() and bool(given.dead.any()):
            self.silent[given.dead] = 0
            self.resampled += resample(self.sae, self.update, given, out.error, (self.seed, self.step_count))
        # A sample's squares are summed in float32 (a product of vectors, which makes no matrix), samples in float64.
        squares = torch.bmm(out.error.unsqueeze(1), out.error.unsqueeze(2))
        self._add(sse=squares.sum(dtype=torch.float64), active=out.active.double(), **{f"term_{k}": v.double() for k, v in out.terms.items()})

    def _resampling_due(self) -> bool:
        every = self.config.resample_epochs
        if every is None or self.step_count > 0.6 * self.steps:
            return False
        period = every * self.steps_per_epoch
        return int(self.step_count / period) > int((self.step_count - 1) / period)

    def _add(self, **values: Tensor) -> None:
        for key, value in values.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def end_epoch(self) -> dict[str, Any]:
        """Sums up the epoch: appends a line to the log and returns it.

        FVU is the squared error over the epoch divided by the variance of the training split (which scaling makes d a sample), in float64, while training.

        Raises:
            DivergenceError: NaN, or an FVU beyond all reason.
        """
        names = sorted(self._sums)
        sums = self.collective.sum(torch.stack([self._sums[n] for n in names])).tolist()
        total = dict(zip(names, sums, strict=True))
        self._sums = {}
        seen = self.steps_per_epoch * self.batch
        rate = learning_rate(self.config, self.step_count - 1, self.steps)
        fvu = total["sse"] / (seen * self.sae.dim)
        if not math.isfinite(fvu) or fvu > DIVERGED:
            raise self._divergence(rate)
        now = time.perf_counter()
        line: dict[str, Any] = {"step": self.step_count, "epoch": self.epoch, "fvu": fvu, "l0": total["active"] / seen}
        line["loss"] = {n.removeprefix("term_"): total[n] / self.steps_per_epoch for n in names if n.startswith("term_")}
        line["dead_share"] = float(self.dead.double().mean())
        if self.config.resample_epochs is not None:
            line["resampled"] = self.resampled
        line["lr"] = rate
        line["samples_per_second"] = round(seen / max(now - self._since, 1e-9), 1)
        self._since = now
        self.log.append(line)
        return line

    def _divergence(self, rate: float) -> DivergenceError:
        return DivergenceError(
            f"sae {self.config.name}: the loss is no longer finite or has blown up at step {self.step_count} with learning rate {rate:.3g};"
            f" lower lr (now {self.config.lr:.3g}), or set clip=1.0, or raise warmup; checkpoints taken before are kept"
        )

    def state_dict(self, keep: bool = True) -> dict[str, Any]:
        """All that a resumed run needs to be the uninterrupted one, bit for bit on a CPU. All workers must call it; those that do not `keep` what they get
        are spared a copy.
        """
        return {
            "config": self.config.model_dump(mode="json"),
            "seed": self.seed,
            "samples": self.samples,
            "batch": self.batch,
            "step": self.step_count,
            **self.update.state_dict(keep),
            "silent": self.silent,
            "resampled": self.resampled,
            "log": self.log,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state of the same configuration, seed and data size.

        Raises:
            MedSAEError: the state is of another run.
        """
        mine = {"config": self.config.model_dump(mode="json"), "seed": self.seed, "samples": self.samples, "batch": self.batch}
        differs = [key for key, value in mine.items() if state[key] != value]
        if differs:
            raise MedSAEError(f"sae {self.config.name}: the checkpoint is of another run ({', '.join(differs)} differ); remove the folder sae/.train")
        self.update.load_state_dict(state)
        self.silent = state["silent"].to(self.device)
        self.step_count, self.resampled, self.log = state["step"], state["resampled"], list(state["log"])


def train(
    trainers: list[Trainer],
    x: Tensor | Source,
    seed: int,
    on_epoch: Callable[[list[Trainer], bool], None] | None = None,
) -> None:
    """Trains all to their end from wherever they are, over shared batches; x [n, d] is the whole training split, or a source of its batches.

    Autoencoders of the same batch size see the same batches in the same pass; each batch size is a pass of its own.
    `on_epoch(trainers of the pass, whether a checkpoint is due)` is called after every epoch.
    """
    source = Held(x) if isinstance(x, Tensor) else x
    for size in dict.fromkeys(t.config.batch_size for t in trainers):
        group = [t for t in trainers if t.config.batch_size == size]
        while live := [t for t in group if t.step_count < t.steps]:
            epoch = min(t.epoch for t in live)
            current = [t for t in live if t.epoch == epoch]
            collective = current[0].collective
            for batch in source.batches(seed, epoch, size, collective.rank, collective.world):
                for trainer in current:
                    trainer.step(batch)
            for trainer in current:
                trainer.end_epoch()
            if on_epoch is not None:
                on_epoch(current, any(checkpoint_due(t) for t in current))


def checkpoint_due(trainer: Trainer) -> bool:
    """Whether the epoch just done is one of `config.checkpoints` evenly spaced ones (the last always is)."""
    epochs, count = trainer.config.epochs, trainer.config.checkpoints
    return (trainer.epoch * count) // epochs > ((trainer.epoch - 1) * count) // epochs
