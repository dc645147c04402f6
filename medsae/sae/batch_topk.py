"""`batch_topk` and `matryoshka_batch_topk`: the k * B largest pre-activations of the global batch (Bussmann et al. 2024, 2025)."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from medsae.sae.base import StepInput
from medsae.sae.config import SAEConfig
from medsae.sae.sparse_ops import Active, Dense, Sparse, is_dense, sparse_above
from medsae.sae.topk import TopK

GUESS = 0.9
"""Share of the last step's threshold above which candidates are looked for first."""


class BatchTopK(TopK):
    """As `topk`, but the k * B largest pre-activations of the whole batch are kept, if they are positive.

    At inference, a neuron is active above one threshold: the bias-corrected running mean of the smallest kept value of each training step. Saved as
    `jumprelu` with that threshold for every neuron.
    """

    threshold_sum: Tensor
    threshold_weight: Tensor

    def __init__(self, config: SAEConfig, dim: int, seed: int, center: np.ndarray | None = None) -> None:
        super().__init__(config, dim, seed, center)
        self.register_buffer("threshold_sum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("threshold_weight", torch.zeros((), dtype=torch.float64))
        self._last = 0.0

    @property
    def threshold(self) -> float:
        """The inference threshold; 0 before the first step."""
        weight = float(self.threshold_weight)
        return float(self.threshold_sum) / weight if weight else 0.0

    @torch.no_grad()
    def select(self, pre: Tensor, step: StepInput) -> Sparse | Dense:
        """Exact: candidates are all values above a guess, and the guess only decides how many they are. Ties at the threshold are all kept."""
        assert self.config.k is not None
        wanted = self.config.k * step.total
        dense = is_dense(len(pre), pre.shape[1], self.dim, self.config.k)
        # After a restart, the running mean stands for the last threshold.
        for guess in (GUESS * (self._last or self.threshold), 0.0):
            candidates = None if dense else sparse_above(pre, guess)
            values = step.collective.gather(pre[pre > guess] if candidates is None else candidates.given)
            if len(values) >= wanted or guess == 0.0:
                break
        smallest = values.topk(wanted, sorted=False).values.min() if len(values) > wanted else values.min() if len(values) else values.new_zeros(())
        self._last = float(smallest)
        if len(values):
            decay = self.config.threshold_decay or 0.0
            self.threshold_sum.mul_(decay).add_((1 - decay) * self._last)
            self.threshold_weight.mul_(decay).add_(1 - decay)
        return candidates.at_least(self._last) if candidates is not None else Dense(torch.where(pre >= self._last, pre, 0.0))

    def export(self) -> tuple[str, dict[str, Tensor], dict[str, float | int]]:
        tensors = self.plain_export()
        return "jumprelu", {**tensors, "threshold": torch.full_like(tensors["b_enc"], self.threshold)}, {}


class MatryoshkaBatchTopK(BatchTopK):
    """BatchTopK whose nested prefixes of the dictionary must each reconstruct x.

    Loss: the mean over prefixes of mean ||x - x_hat_g||^2 / d, and AuxK on the residual of the whole dictionary.
    """

    @property
    def ends(self) -> tuple[int, ...]:
        """Where prefixes end; the last is the dictionary size."""
        assert self.config.groups is not None
        ends = [max(1, round(share * self.dict_size)) for share in accumulate(self.config.groups)]
        return (*ends[:-1], self.dict_size)

    def reconstruction_loss(self, active: Active, values: Tensor, step: StepInput) -> tuple[Tensor, Tensor]:
        errors = step.x - self.b_dec - active.prefixes(values, self.W_dec, self.ends)
        return errors.square().sum() / (len(self.ends) * step.total * self.dim), errors[-1]
