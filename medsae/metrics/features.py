"""What can be measured: anything that turns embeddings into activations."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp


class Features(Protocol):
    """Activations of embeddings. `signed`: values below zero carry meaning too; nothing is ever dead."""

    signed: bool

    def encode(self, x: np.ndarray) -> Any:
        """Embeddings [n, d] to activations [n, m], numpy or torch."""

    def decode(self, z: Any) -> Any:
        """Activations, numpy, torch or scipy.sparse, back to embeddings [n, d]; None where there is no way back."""


class RawFeatures:
    """The encoder's own features: neuron j is coordinate j of the embedding."""

    signed = True

    def encode(self, x: np.ndarray) -> np.ndarray:
        return x

    def decode(self, z: Any) -> None:
        return None


class SAEFeatures:
    """A sparse autoencoder that works on raw embeddings (`encode`, `decode`)."""

    signed = False

    def __init__(self, sae: Any) -> None:
        self.sae = sae

    def encode(self, x: np.ndarray) -> Any:
        return self.sae.encode(x)

    def decode(self, z: Any) -> Any:
        if sp.issparse(z):
            # L0 / m of the products that the matrix would take.
            return z @ self.sae.W_dec.cpu().numpy() + self.sae.b_dec.cpu().numpy()
        return self.sae.decode(z)


class LinearFeatures:
    """z = (x - offset) @ weight, optionally through a ReLU; x_hat = z @ back + offset."""

    def __init__(self, weight: np.ndarray, offset: np.ndarray, back: np.ndarray | None, relu: bool = False) -> None:
        self.weight, self.offset = weight.astype(np.float32), offset.astype(np.float32)
        self.back = None if back is None else back.astype(np.float32)
        self.relu = relu
        self.signed = not relu

    def encode(self, x: np.ndarray) -> np.ndarray:
        z = (np.asarray(x, np.float32) - self.offset) @ self.weight
        return np.maximum(z, 0, out=z) if self.relu else z

    def decode(self, z: np.ndarray) -> np.ndarray | None:
        return None if self.back is None else z @ self.back + self.offset
