"""Sums over the workers that share a global batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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
        """Sums gradients over the workers in one message, which also carries the loss; returns the global loss."""
        if self.world == 1:
            return loss
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([loss.reshape(1), *(g.reshape(-1) for g in grads)])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        start = 1
        for grad in grads:
            grad.copy_(flat[start : start + grad.numel()].view_as(grad))
            start += grad.numel()
        return flat[0]
