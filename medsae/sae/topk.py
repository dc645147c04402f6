"""`topk`: the k largest pre-activations of each sample (Gao et al. 2024), with AuxK for dead neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from medsae.sae.base import Architecture, StepInput, StepOutput
from medsae.sae.dead import auxk_loss
from medsae.sae.sparse_ops import Active, Dense, Sparse, preactivations, row_topk


class TopK(Architecture):
    """f = ReLU(TopK(W_enc (x - b_dec) + b_enc)); loss = mean ||x - x_hat||^2 / d + aux * AuxK.

    Inputs are scaled to mean squared norm d about their mean, so the first term is FVU with a fixed denominator.
    """

    def select(self, pre: Tensor, step: StepInput) -> Sparse | Dense:
        """The active set of a batch, from pre-activations [b, m]."""
        assert self.config.k is not None
        return row_topk(pre, self.config.k, self.dim)

    def reconstruction_loss(self, active: Active, values: Tensor, step: StepInput) -> tuple[Tensor, Tensor]:
        """This worker's part of the reconstruction loss, and x - x_hat [b, d]."""
        error = step.x - active.decode(values, self.W_dec) - self.b_dec
        return error.square().sum() / (step.total * self.dim), error

    def loss(self, step: StepInput) -> StepOutput:
        config = self.config
        dtype = torch.bfloat16 if config.selection == "bfloat16" else torch.float32
        pre = self.preactivations(step, self.b_enc, dtype)
        active = self.select(pre, step)
        if dtype != torch.float32:
            active = self.exact(active, step.x)
        values = active.linear(step.x, self.W_enc, self.b_enc, self.b_dec).relu()
        fvu, error = self.reconstruction_loss(active, values, step)
        terms = {"fvu": fvu.detach()}
        total = fvu
        if config.aux:
            auxk = auxk_loss(self, step, pre, error, config.k_aux or max(1, self.dim // 2))
            total = total + config.aux * auxk
            terms["auxk"] = auxk.detach()
        return StepOutput(total, error.detach(), torch.count_nonzero(values.detach()), active.fired(values), terms)

    @torch.no_grad()
    def exact(self, active: Sparse | Dense, x: Tensor) -> Sparse | Dense:
        """The same pairs with pre-activations in float32."""
        if isinstance(active, Dense):
            return Dense(torch.where(active.given != 0, preactivations(x, self.W_enc, self.b_enc, self.b_dec), 0.0))
        products = active.products(x - self.b_dec, self.W_enc) + self.b_enc[active.columns]
        return Sparse(active.rows, active.columns, products, active.neurons)

    def export(self) -> tuple[str, dict[str, Tensor], dict[str, float | int]]:
        assert self.config.k is not None
        return "topk", self.plain_export(), {"k": self.config.k}
