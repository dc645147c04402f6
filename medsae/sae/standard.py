"""`standard`: one ReLU layer with an L1 penalty and unit decoder rows (Bricken et al. 2023; the paper's)."""

from __future__ import annotations

import torch
from torch import Tensor

from medsae.sae.base import Architecture, StepInput, StepOutput
from medsae.sae.sparse_ops import above


class Standard(Architecture):
    """f = ReLU(W_enc (x - b_dec) + b_enc); loss = mean ||x - x_hat||^2 + l1 * mean ||f||_1 (sums over neurons and dimensions, means over samples)."""

    def penalty_weights(self) -> Tensor | None:
        """What a neuron's activation is multiplied by in the penalty, [m]; None for 1."""
        return None

    def loss(self, step: StepInput) -> StepOutput:
        assert self.config.l1 is not None
        shift = self.b_dec if self.subtract_bias else None
        active = above(self.preactivations(step, self.b_enc), 0.0, self.dim)
        values = active.linear(step.x, self.W_enc, self.b_enc, shift).relu()
        error = step.x - active.decode(values, self.W_dec) - self.b_dec
        mse = error.square().sum() / step.total
        l1 = active.total(values, self.penalty_weights()) / step.total
        total = mse + self.config.l1 * step.sparsity * l1
        return StepOutput(total, error.detach(), torch.count_nonzero(values.detach()), active.fired(values), {"mse": mse.detach(), "l1": l1.detach()})
