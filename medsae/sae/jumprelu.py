"""`jumprelu`: a threshold a neuron, trained through a straight-through gradient (Rajamanoharan et al. 2024)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medsae.sae.base import Architecture, StepInput, StepOutput
from medsae.sae.config import SAEConfig
from medsae.sae.sparse_ops import above


class _Jump(torch.autograd.Function):
    """f = z [z > t] and H = [z > t], with the paper's pseudo-derivatives in t: -(t / w) K and -(1 / w) K, K = [|z - t| < w / 2].

    f passes its gradient to z where z > t; H passes none.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, width: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, threshold)
        ctx.width = width
        on = (z > threshold).to(z.dtype)
        return z * on, on

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, threshold = ctx.saved_tensors
        kernel = ((z - threshold).abs() < ctx.width / 2).to(z.dtype) / ctx.width
        by_threshold = -kernel * (threshold * grads[0] + grads[1])
        return grads[0] * (z > threshold), by_threshold.sum_to_size(threshold.shape), None


def jump(z: Tensor, threshold: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """JumpReLU and the indicator of activity, of values and thresholds that broadcast."""
    f, on = _Jump.apply(z, threshold, width)
    return f, on


class JumpReLU(Architecture):
    """f = z [z > t], z = W_enc (x - b_dec) + b_enc; loss = mean ||x - x_hat||^2 + l0 * mean number of active neurons.

    Thresholds are trained themselves, not their logarithm, in float32, and stay at 0 or above.
    """

    def __init__(self, config: SAEConfig, dim: int, seed: int, center: np.ndarray | None = None) -> None:
        super().__init__(config, dim, seed, center)
        self.threshold = nn.Parameter(torch.full((config.dict_size,), float(config.threshold or 0.0)))

    def loss(self, step: StepInput) -> StepOutput:
        config = self.config
        assert config.l0 is not None
        assert config.bandwidth is not None
        pre = self.preactivations(step, self.b_enc)
        # Below the kernel's window neither the value nor any gradient differs from 0.
        active = above(pre, self.threshold.detach() - config.bandwidth / 2, self.dim)
        z = active.linear(step.x, self.W_enc, self.b_enc, self.b_dec)
        values, on = jump(z, active.spread(self.threshold), config.bandwidth)
        error = step.x - active.decode(values, self.W_dec) - self.b_dec
        mse = error.square().sum() / step.total
        l0 = on.sum() / step.total
        total = mse + config.l0 * step.sparsity * l0
        return StepOutput(total, error.detach(), on.detach().sum(), active.fired(values), {"mse": mse.detach(), "l0": l0.detach()})

    @torch.no_grad()
    def constrain(self, rows: slice = slice(None)) -> None:
        super().constrain(rows)
        self.threshold.clamp_min_(0.0)

    def export(self) -> tuple[str, dict[str, Tensor], dict[str, float | int]]:
        return "jumprelu", {**self.plain_export(), "threshold": self.threshold.detach().double()}, {}
