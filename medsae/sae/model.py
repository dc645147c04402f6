"""The trained autoencoder for inference, on raw embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from medsae.errors import ArtifactError
from medsae.sae.data import Scaling

TENSORS: dict[str, tuple[str, ...]] = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"),
}
"""Activation functions of inference and the tensors of each."""

Array = TypeVar("Array", Tensor, np.ndarray)


@dataclass
class SAE:
    """A trained sparse autoencoder: x [B, d] to code [B, m] and back, on raw embeddings.

    `activation`: `standard` (ReLU), `topk` (the k largest, ReLU), `jumprelu` (pre-activations above `threshold`) or `gated`.
    `tensors`: `W_enc` [d, m], `W_dec` [m, d], `b_dec` [d], and `b_enc` [m] or the biases of `gated`; float32.
    `metadata`: what stands under `metadata` in `cfg.json`.
    """

    activation: str
    tensors: dict[str, Tensor]
    k: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.activation not in TENSORS:
            raise ArtifactError(f"no inference for architecture {self.activation!r}; there is {', '.join(TENSORS)}")
        d, m = self.tensors["W_enc"].shape if "W_enc" in self.tensors else (0, 0)
        shapes = {"W_enc": (d, m), "W_dec": (m, d), "b_dec": (d,)}
        for name in TENSORS[self.activation]:
            if name not in self.tensors:
                raise ArtifactError(f"SAE weights lack {name}, which {self.activation} needs")
            if tuple(self.tensors[name].shape) != shapes.get(name, (m,)):
                raise ArtifactError(f"SAE weight {name} is {tuple(self.tensors[name].shape)}, not {shapes.get(name, (m,))}")
        if self.activation == "topk" and (self.k is None or not 0 < self.k <= m):
            raise ArtifactError(f"a topk SAE needs k between 1 and {m}, not {self.k}")

    @property
    def d(self) -> int:
        """Width of the embeddings."""
        return int(self.tensors["W_enc"].shape[0])

    @property
    def m(self) -> int:
        """Number of neurons."""
        return int(self.tensors["W_enc"].shape[1])

    @property
    def W_dec(self) -> Tensor:
        """Decoder directions [m, d], in units of the raw embeddings."""
        return self.tensors["W_dec"]

    @property
    def b_dec(self) -> Tensor:
        """What is reconstructed when no neuron is active, [d]."""
        return self.tensors["b_dec"]

    def to(self, device: str | torch.device) -> SAE:
        """The same on another device."""
        return SAE(self.activation, {k: v.to(device) for k, v in self.tensors.items()}, self.k, self.metadata)

    @overload
    def encode(self, x: Tensor) -> Tensor: ...
    @overload
    def encode(self, x: np.ndarray) -> np.ndarray: ...
    @torch.no_grad()
    def encode(self, x: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Raw embeddings [B, d] to the code [B, m], float32, of the kind that came in.

        Raises:
            ArtifactError: the embeddings are not as wide as the autoencoder's.
        """
        if x.ndim != 2 or x.shape[1] != self.d:
            raise ArtifactError(f"embeddings of shape {tuple(x.shape)} do not fit an SAE of width {self.d}; give [B, {self.d}]")
        if isinstance(x, np.ndarray):
            return self._encode(self._tensor(x)).cpu().numpy()
        return self._encode(x.to(self.b_dec))

    def _encode(self, x: Tensor) -> Tensor:
        t = self.tensors
        if self.activation == "gated":
            product = x @ t["W_enc"]
            return torch.relu(torch.exp(t["r_mag"]) * product + t["b_mag"]) * (product + t["b_gate"] > 0)
        pre = torch.addmm(t["b_enc"], x, t["W_enc"])
        if self.activation == "jumprelu":
            # relu first: a threshold below 0 must not let negative values through, as in sae-lens.
            return pre.relu_().mul_(pre > t["threshold"])
        if self.activation == "topk":
            assert self.k is not None
            values, indices = pre.topk(self.k, dim=1, sorted=False)
            return torch.zeros_like(pre).scatter_(1, indices, values.relu_())
        return pre.relu_()

    @overload
    def decode(self, z: Tensor) -> Tensor: ...
    @overload
    def decode(self, z: np.ndarray) -> np.ndarray: ...
    @torch.no_grad()
    def decode(self, z: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Codes [B, m] to raw embeddings [B, d], float32, of the kind that came in.

        Raises:
            ArtifactError: the codes are not as wide as the dictionary.
        """
        if z.ndim != 2 or z.shape[1] != self.m:
            raise ArtifactError(f"codes of shape {tuple(z.shape)} do not fit an SAE of {self.m} neurons; give [B, {self.m}]")
        if isinstance(z, np.ndarray):
            return torch.addmm(self.b_dec, self._tensor(z), self.W_dec).cpu().numpy()
        return torch.addmm(self.b_dec, z.to(self.b_dec), self.W_dec)

    def _tensor(self, array: np.ndarray) -> Tensor:
        copy = np.array(array, dtype=np.float32) if not array.flags.writeable else np.ascontiguousarray(array, dtype=np.float32)
        return torch.from_numpy(copy).to(self.b_dec.device)


def fold(activation: str, tensors: dict[str, Tensor], options: dict[str, float | int], scaling: Scaling, metadata: dict[str, Any]) -> SAE:
    """Folds centring and scale of the inputs into the weights, so that the autoencoder works on raw embeddings.

    Codes stay those of scaled inputs; decoder rows are in units of the raw embeddings: with s the scale and u the mean,
    W_enc' = s W_enc, b_enc' = b_enc - s W_enc^T u, W_dec' = W_dec / s, b_dec' = b_dec / s + u. Computed in float64.
    """
    mean = torch.from_numpy(scaling.mean)
    folded = {name: tensor.cpu().double() for name, tensor in tensors.items()}
    folded["W_enc"] = folded["W_enc"] * scaling.scale
    shift = folded["W_enc"].T @ mean
    if activation == "gated":
        folded["b_gate"] = folded["b_gate"] - shift
        folded["b_mag"] = folded["b_mag"] - torch.exp(folded["r_mag"]) * shift
    else:
        folded["b_enc"] = folded["b_enc"] - shift
    folded["W_dec"] = folded["W_dec"] / scaling.scale
    folded["b_dec"] = folded["b_dec"] / scaling.scale + mean
    k = options.get("k")
    return SAE(activation, {name: tensor.float().contiguous() for name, tensor in folded.items()}, None if k is None else int(k), metadata)


def reconstruction(sae: SAE, x: Tensor, mean: Tensor, chunk: int = 4096) -> dict[str, Tensor]:
    """Sums over raw embeddings [n, d] from which FVU, L0 and the dead share follow; they add up over parts.

    Returns float64 `sse`, `variance` (about `mean` [d]), `active` (scalars) and int64 `count` [m] of samples on which each neuron is active.
    """
    count = torch.zeros(sae.m, dtype=torch.int64, device=x.device)
    sse = torch.zeros((), dtype=torch.float64, device=x.device)
    variance = torch.zeros_like(sse)
    for part in x.split(chunk):
        code = sae.encode(part)
        sse += (part.double() - sae.decode(code).double()).square().sum()
        variance += (part.double() - mean.to(part.device)).square().sum()
        count += (code > 0).sum(dim=0)
    return {"sse": sse, "variance": variance, "active": count.sum().double(), "count": count}
