"""Sums over the workers that share a global batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

LARGE = 65_536
"""Elements from which a gradient is a message of its own: copying it into a common one would cost more than the message."""


class Collective:
    """torch.distributed where a process group of several workers is up; nothing to do for one worker."""

    def __init__(self) -> None:
        up = dist.is_available() and dist.is_initialized()
        self.world = dist.get_world_size() if up else 1
        self.rank = dist.get_rank() if up else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """In place sum over the workers."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """In place maximum over the workers."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def min(self, tensor: Tensor) -> Tensor:
        """In place minimum over the workers."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """In place what rank 0 has."""
        if self.world > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def barrier(self) -> None:
        """Returns when all workers have come here."""
        if self.world > 1:
            dist.barrier()

    def gather(self, tensor: Tensor) -> Tensor:
        """The workers' vectors [n_r] one after the other; lengths may differ."""
        if self.world == 1:
            return tensor
        lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
        counts = [int(n) for n in lengths]
        padded = tensor.new_zeros(max(counts))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    def interleave(self, tensor: Tensor) -> Tensor:
        """One value a sample of the global batch, in its order, from the workers' shares (worker r holds samples r, r + world, ...)."""
        if self.world == 1:
            return tensor
        gathered = self.gather(tensor)
        total = len(gathered)
        order = torch.cat([torch.arange(r, total, self.world) for r in range(self.world)])
        out = torch.empty_like(gathered)
        out[order.to(tensor.device)] = gathered
        return out

    def sum_gradients(self, parameters: list[torch.nn.Parameter], loss: Tensor) -> Tensor:
        """Sums gradients over the workers; returns the global loss.

        Matrices are summed where they lie, in flight together; what is small travels with the loss in one message.
        """
        if self.world == 1:
            return loss
        grads = [p.grad for p in parameters if p.grad is not None]
        large = [g for g in grads if g.numel() >= LARGE and g.is_contiguous()]
        waiting = [dist.all_reduce(g, op=dist.ReduceOp.SUM, async_op=True) for g in large]
        small = [g for g in grads if not any(g is other for other in large)]
        flat = torch.cat([loss.reshape(1), *(g.reshape(-1) for g in small)])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        start = 1
        for grad in small:
            grad.copy_(flat[start : start + grad.numel()].view_as(grad))
            start += grad.numel()
        for work in waiting:
            assert work is not None
            work.wait()
        return flat[0]
