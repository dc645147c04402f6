"""The active set: which entries of the [B, m] code carry values and gradients."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Active(Protocol):
    """A set of (sample, neuron) pairs. `values` below are one number a pair."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Values of x W^T + b, differentiable in weight and bias. x [B, d], weight [m, d], bias [m]."""

    def spread(self, parameter: Tensor) -> Tensor:
        """A parameter [m] as values."""

    def decode(self, values: Tensor, weight: Tensor) -> Tensor:
        """Sum over a sample's neurons of value * weight[neuron], [B, d]."""

    def fired(self, values: Tensor) -> Tensor:
        """Whether each neuron has a value above 0 in any sample, bool [m]."""


class Dense:
    """All pairs: values are [B, m] matrices."""

    def __init__(self, samples: int, neurons: int) -> None:
        self.samples, self.neurons = samples, neurons

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    def spread(self, parameter: Tensor) -> Tensor:
        return parameter

    def decode(self, values: Tensor, weight: Tensor) -> Tensor:
        return values @ weight

    def fired(self, values: Tensor) -> Tensor:
        return torch.gt(values.detach(), 0).any(dim=0)
