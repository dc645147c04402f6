"""What becomes of a step's gradients: the sum over workers, constraints, clipping and Adam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medsae.sae.base import Architecture
from medsae.sae.collective import Collective
from medsae.sae.config import SAEConfig
from medsae.sae.shared import shared_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments in its state."""


class Update:
    """The optimiser of an autoencoder in training.

    Several workers on the CPUs of one node have the matrices (`W_enc`, `W_dec`) in common memory, and each updates its own range of neurons: gradients of
    the others' neurons go to them through that memory, and nothing comes back. Elsewhere (GPUs, several nodes) gradients are summed by messages and every
    worker updates everything. Either way the weights are those of one worker up to rounding, and states are the same on disk.
    """

    def __init__(self, sae: Architecture, config: SAEConfig, collective: Collective) -> None:
        self.sae, self.config, self.collective = sae, config, collective
        self.parameters = list(sae.parameters())
        self.matrices = [p for p in self.parameters if p.ndim == 2]
        self._passed = self._share()
        self.rows = self._range(collective.rank) if self._passed is not None else slice(0, config.dict_size)
        # Views of the rows that this worker updates; what is not a matrix is small, and updated by all alike.
        own = [nn.Parameter(p.data[self.rows]) if self._passed is not None and p.ndim == 2 else p for p in self.parameters]
        self._own = dict(zip(self.parameters, own, strict=True))
        self.optimizer = torch.optim.Adam(own, lr=1.0, betas=(config.beta1 or 0.0, 0.999), fused=True)

    def _range(self, rank: int) -> slice:
        """The neurons that a worker updates."""
        m, world = self.config.dict_size, self.collective.world
        return slice(rank * m // world, (rank + 1) * m // world)

    def _share(self) -> list[Tensor] | None:
        """Moves the matrices to common memory; returns, for each, where workers put gradients for the others, [world, m, d]."""
        if self.collective.world == 1 or any(p.device.type != "cpu" for p in self.matrices):
            return None
        world, first = self.collective.world, self.matrices[0]
        memory = shared_tensor(self.collective, (len(self.matrices), 1 + world, *first.shape), first.dtype)
        if memory is None:
            return None
        for place, matrix in zip(memory, self.matrices, strict=True):
            if self.collective.rank == 0:
                place[0] = matrix.detach()
            matrix.data = place[0]
        self.collective.barrier()
        return [place[1:] for place in memory]

    def sum(self, loss: Tensor) -> Tensor:
        """Sums gradients over the workers, as far as this worker needs them; returns the loss of the global batch."""
        if self._passed is None:
            return self.collective.sum_gradients(self.parameters, loss)
        world, rank = self.collective.world, self.collective.rank
        for matrix, passed in zip(self.matrices, self._passed, strict=True):
            assert matrix.grad is not None
            for other in range(world):
                if other != rank:
                    passed[rank][self._range(other)] = matrix.grad[self._range(other)]
        # Nobody has this sum before all have come here, so all gradients have been passed then.
        loss = self.collective.sum_gradients([p for p in self.parameters if p.ndim != 2], loss)
        for matrix, passed in zip(self.matrices, self._passed, strict=True):
            assert matrix.grad is not None
            total, matrix.grad = matrix.grad[self.rows], None
            for other in range(world):
                if other != rank:
                    total += passed[other][self.rows]
            self._own[matrix].grad = total
        return loss

    def step(self, rate: float) -> None:
        """Constrains and clips the gradients that `sum` has left, takes a step of Adam, clears them, and constrains the parameters.

        With shared matrices, others must not read them before all workers are through: the next message among all sees to that.
        """
        self.sae.constrain_gradient(self._own[self.sae.W_dec])
        if self.config.clip is not None:
            self._clip(self.config.clip)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sae.constrain(self.rows)

    def _clip(self, limit: float) -> None:
        """Scales gradients down to the norm `limit`; on a CPU those within it are not touched."""
        own = [p for p in self._own.values() if p.grad is not None]
        # What all workers hold alike is counted once.
        counted = [p.grad for p in own if p.grad is not None and (self._passed is None or p.ndim == 2 or self.collective.rank == 0)]
        norm = torch.nn.utils.get_total_norm(counted)
        if self._passed is not None:
            norm = self.collective.sum(norm.double().square()).sqrt().to(norm.dtype)
        if norm.device.type != "cpu" or float(norm) > limit:
            torch.nn.utils.clip_grads_with_norm_(own, limit, norm)

    def forget(self, parameter: nn.Parameter, neurons: Tensor) -> None:
        """Clears Adam's moments of some neurons' rows."""
        own = self._own[parameter]
        if own is not parameter:
            neurons = neurons[(neurons >= self.rows.start) & (neurons < self.rows.stop)] - self.rows.start
        for moment in MOMENTS:
            if moment in self.optimizer.state.get(own, {}):
                self.optimizer.state[own][moment][neurons] = 0.0

    def state_dict(self, keep: bool = True) -> dict[str, Any]:
        """Parameters (`sae`) and the optimiser's state (`optimizer`), whole; empty, where the matrices are shared, for who does not `keep` it.

        All workers must call it. What is not shared is not copied: it changes with the next step.
        """
        parameters, optimizer = self.sae.state_dict(), self.optimizer.state_dict()
        if self._passed is None:
            return {"sae": parameters, "optimizer": optimizer}
        moments = {index: dict(state) for index, state in optimizer["state"].items()}
        shared = [index for index, parameter in enumerate(self.parameters) if parameter.ndim == 2 and index in moments]
        # No gradients are on their way now: their memory takes the moments of all.
        for index, passed in zip(shared, self._passed, strict=False):
            for slot, name in enumerate(MOMENTS):
                passed[slot][self.rows] = moments[index][name]
        self.collective.barrier()
        if keep:
            parameters = {name: value.clone() for name, value in parameters.items()}
            for index, passed in zip(shared, self._passed, strict=False):
                moments[index] |= {name: passed[slot].clone() for slot, name in enumerate(MOMENTS)}
        self.collective.barrier()
        return {"sae": parameters, "optimizer": {**optimizer, "state": moments}} if keep else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` has given, with whatever number of workers; all must call it."""
        moments = {}
        for index, held in state["optimizer"]["state"].items():
            parameter = self.parameters[index]
            rows = slice(None) if self._own[parameter] is parameter else self.rows
            # Copies: Adam works in place, and the state given stays as it is.
            moments[index] = {name: (value[rows] if name in MOMENTS else value).clone() for name, value in held.items()}
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.sae.load_state_dict(state["sae"])
        if self._passed is not None:
            self.collective.barrier()
