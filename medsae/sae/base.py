"""What all architectures share: parameters, the training step's input and output, and gradient constraints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from medsae.sae.collective import Collective
from medsae.sae.config import SAEConfig
from medsae.sae.sparse_ops import is_dense, preactivations


class Workspace:
    """Memory for the largest matrix of a step, kept from step to step and shared by autoencoders that take turns: fresh memory of this size costs the system
    a page fault every 4 KiB.
    """

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def matrix(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised matrix with the dtype and device of `like`; it holds until the next call."""
        kept = self._flat
        if kept is None or kept.numel() < rows * columns or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._flat = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
        return kept[: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class StepInput:
    """What a training step sees besides its share `x` [b, d] of the global batch.

    `total` samples of the global batch B; `sparsity` multiplier of the sparsity coefficient (its warm-up); `dead` bool [m];
    `collective` adds over the workers that share the global batch; `workspace` is where pre-activations are put.
    """

    x: Tensor
    total: int
    sparsity: float
    dead: Tensor
    collective: Collective
    workspace: Workspace = field(default_factory=Workspace)


@dataclass(frozen=True)
class StepOutput:
    """What a training step gives. Sums run over this worker's samples and are divided by the global B, so that workers' losses add up.

    `loss` to call backward on; `terms` its parts, detached; `error` x - x_hat [b, d], detached; `active` number of active pairs;
    `fired` bool [m], whether each neuron was active in this worker's samples.
    """

    loss: Tensor
    error: Tensor
    active: Tensor
    fired: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


def unit_rows(weight: Tensor) -> Tensor:
    """Rows scaled to norm 1."""
    return weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-12)


class Architecture(nn.Module):
    """A sparse autoencoder in training, on scaled inputs.

    Parameters: `W_enc` [m, d], `b_enc` [m], `W_dec` [m, d] (a row is a neuron's decoder direction), `b_dec` [d].
    """

    unit_decoder: ClassVar[bool] = True
    """Whether decoder rows are kept at norm 1 (gradients parallel to them removed before the step, rows renormalised after it)."""
    subtract_bias: ClassVar[bool] = True
    """Whether the encoder sees x - b_dec."""
    init_norm: ClassVar[float] = 1.0
    """Norm of decoder rows at the start."""

    def __init__(self, config: SAEConfig, dim: int, seed: int, center: np.ndarray | None = None) -> None:
        super().__init__()
        self.config, self.dim, self.dict_size = config, dim, config.dict_size
        generator = torch.Generator().manual_seed(seed)
        directions = unit_rows(torch.randn(self.dict_size, dim, generator=generator)) * self.init_norm
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(self.dict_size))
        self.W_dec = nn.Parameter(directions.clone())
        self.b_dec = nn.Parameter(torch.zeros(dim) if center is None else torch.as_tensor(center, dtype=torch.float32).clone())

    def preactivations(self, step: StepInput, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """W_enc (x - b_dec) + bias, or of x, [b, m], in the step's workspace and without gradient.

        On a CPU, in large problems, a neuron's values lie side by side in memory: the product takes BLAS libraries a sixth less time then.
        """
        samples, matrix = len(step.x), step.workspace.matrix
        plain = step.x.device.type != "cpu" or is_dense(samples, self.dict_size, self.dim, self.config.k or 0)
        out = matrix(samples, self.dict_size, step.x) if plain else matrix(self.dict_size, samples, step.x).T
        return preactivations(step.x, self.W_enc, bias, self.b_dec if self.subtract_bias else None, dtype, out)

    def loss(self, step: StepInput) -> StepOutput:
        """Forward pass and loss of a batch."""
        raise NotImplementedError

    @torch.no_grad()
    def constrain_gradient(self, decoder: nn.Parameter) -> None:
        """Removes from each row's gradient the part that is parallel to the row, where rows have unit norm; `decoder` is `W_dec` or rows of it."""
        if self.unit_decoder and decoder.grad is not None:
            # A product of vectors a row: the elementwise product would be a matrix more to write and read.
            parallel = torch.bmm(decoder.grad.unsqueeze(1), decoder.unsqueeze(2)).squeeze(2)
            decoder.grad.addcmul_(decoder, parallel, value=-1.0)

    @torch.no_grad()
    def constrain(self, rows: slice = slice(None)) -> None:
        """Renormalises decoder rows, where they have unit norm: those of the neurons `rows`."""
        if self.unit_decoder:
            decoder = self.W_dec[rows]
            decoder.div_(decoder.norm(dim=1, keepdim=True).clamp_min(1e-12))

    def export(self) -> tuple[str, dict[str, Tensor], dict[str, float | int]]:
        """The trained network for inference on scaled inputs: activation (`standard`, `topk`, `jumprelu` or `gated`), float64 tensors with
        `W_enc` [d, m], `W_dec` [m, d] and the biases, and the activation's own numbers (`k`). The encoder of an export does not subtract `b_dec`.
        """
        return "standard", self.plain_export(), {}

    def plain_export(self) -> dict[str, Tensor]:
        w, b = self.W_enc.detach().double(), self.b_enc.detach().double()
        if self.subtract_bias:
            b = b - w @ self.b_dec.detach().double()
        return {"W_enc": w.T.contiguous(), "b_enc": b, "W_dec": self.W_dec.detach().double(), "b_dec": self.b_dec.detach().double()}
