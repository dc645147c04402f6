"""`april`: L1 weighted by decoder norm, without a norm constraint (Anthropic, Circuits Updates April 2024)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from medsae.sae.standard import Standard


class April(Standard):
    """f = ReLU(W_enc x + b_enc); loss = mean ||x - x_hat||^2 + l1 * mean sum_j f_j ||W_dec_j||; decoder rows start at norm 0.1 and are free."""

    unit_decoder: ClassVar[bool] = False
    subtract_bias: ClassVar[bool] = False
    init_norm: ClassVar[float] = 0.1

    def penalty_weights(self) -> Tensor | None:
        return self.W_dec.norm(dim=1)
