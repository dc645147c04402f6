"""`gated`: one path decides what is active, another how much (Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders")."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from medsae.sae.base import Architecture, StepInput, StepOutput
from medsae.sae.config import SAEConfig
from medsae.sae.sparse_ops import above


class Gated(Architecture):
    """With p = W_enc (x - b_dec): gate = p + b_gate, f = [gate > 0] ReLU(exp(r_mag) p + b_mag).

    Loss = mean ||x - x_hat||^2 + l1 * mean ||ReLU(gate)||_1 + mean ||x - x_gate||^2, where x_gate decodes ReLU(gate) with W_dec and b_dec held fixed.
    """

    def __init__(self, config: SAEConfig, dim: int, seed: int, center: np.ndarray | None = None) -> None:
        super().__init__(config, dim, seed, center)
        del self.b_enc
        self.b_gate = nn.Parameter(torch.zeros(config.dict_size))
        self.r_mag = nn.Parameter(torch.zeros(config.dict_size))
        self.b_mag = nn.Parameter(torch.zeros(config.dict_size))

    def loss(self, step: StepInput) -> StepOutput:
        assert self.config.l1 is not None
        product = self.preactivations(step, None)
        active = above(product, -self.b_gate.detach(), self.dim)
        p = active.linear(step.x, self.W_enc, None, self.b_dec)
        gate = (p + active.spread(self.b_gate)).relu()
        values = (active.spread(self.r_mag).exp() * p + active.spread(self.b_mag)).relu() * (gate.detach() > 0)
        error = step.x - active.decode(values, self.W_dec) - self.b_dec
        mse = error.square().sum() / step.total
        l1 = gate.sum() / step.total
        auxiliary = (step.x - active.decode(gate, self.W_dec.detach()) - self.b_dec.detach()).square().sum() / step.total
        total = mse + self.config.l1 * step.sparsity * l1 + auxiliary
        terms = {"mse": mse.detach(), "l1": l1.detach(), "gate": auxiliary.detach()}
        return StepOutput(total, error.detach(), torch.count_nonzero(values.detach()), active.fired(values), terms)

    def export(self) -> tuple[str, dict[str, Tensor], dict[str, float | int]]:
        w = self.W_enc.detach().double()
        shift = w @ self.b_dec.detach().double()
        tensors = {
            "W_enc": w.T.contiguous(),
            "b_gate": self.b_gate.detach().double() - shift,
            "r_mag": self.r_mag.detach().double(),
            "b_mag": self.b_mag.detach().double() - self.r_mag.detach().double().exp() * shift,
            "W_dec": self.W_dec.detach().double(),
            "b_dec": self.b_dec.detach().double(),
        }
        return "gated", tensors, {}
