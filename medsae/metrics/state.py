"""Everything that is measured in one pass over the activations, as one mergeable state."""

from __future__ import annotations

from typing import Any

import numpy as np

from medsae.metrics.activity import Activity, Reconstruction
from medsae.metrics.columns import Columns, as_rows
from medsae.metrics.moments import Moments
from medsae.metrics.monosemanticity import Monosemanticity
from medsae.metrics.top import TopImages

FOLDS = 2


class MeasureState:
    """Activity, moments by patient half, monosemanticity, top images and reconstruction of m neurons.

    Args:
        neurons: m.
        targets: T columns that every neuron is correlated with (labels, confounds, phantom truth).
        dim: width d of the embeddings.
        reference_dim: width D of the reference embedding.
        top: images kept a neuron.
        signed: the features may be negative (raw features): the top images are those of the highest signed value.
    """

    def __init__(self, neurons: int, targets: int, dim: int, reference_dim: int, top: int, signed: bool = False) -> None:
        self.signed = signed
        self.activity = Activity(neurons)
        self.moments = [Moments(neurons, targets) for _ in range(FOLDS)]
        self.monosemanticity = Monosemanticity(neurons, reference_dim)
        self.top = TopImages(neurons, top, active_only=not signed)
        self.reconstruction = Reconstruction(dim)

    def update(
        self,
        activations: Any,
        targets: np.ndarray,
        fold: np.ndarray,
        keys: np.ndarray,
        reference: np.ndarray,
        x: np.ndarray | None = None,
        x_hat: np.ndarray | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            activations: [n, m], numpy, torch or scipy.sparse.
            targets: [n, T], NaN where missing.
            fold: the patient's half, 0 or 1 [n].
            keys: image keys, uint64 [n].
            reference: reference embeddings [n, D]; a row of NaN where the reference lacks the image.
            x, x_hat: embeddings [n, d] and their reconstruction; none for features that reconstruct nothing.
        """
        activations = as_rows(activations)
        for half in range(FOLDS):
            rows = np.flatnonzero(fold == half)
            if not len(rows):
                continue
            columns = Columns(activations if len(rows) == len(fold) else activations[rows])
            self.activity.update(columns)
            self.top.update(columns, keys[rows])
            self.moments[half].update(columns, targets[rows])
            judged = reference[rows]
            known = ~np.isnan(judged).any(1)
            if known.any():
                self.monosemanticity.update(columns if known.all() else Columns(activations[rows[known]]), judged[known])
        if x is not None and x_hat is not None:
            self.reconstruction.update(x, x_hat)

    def merge(self, other: MeasureState) -> MeasureState:
        """Adds another state's images to this one, in place; returns self."""
        self.activity.merge(other.activity)
        self.top.merge(other.top)
        for mine, theirs in zip(self.moments, other.moments, strict=True):
            mine.merge(theirs)
        self.monosemanticity.merge(other.monosemanticity)
        self.reconstruction.merge(other.reconstruction)
        return self

    def pooled(self) -> Moments:
        """Moments over both halves (a copy)."""
        out = Moments(len(self.activity.low), len(self.moments[0].mean_y))
        for part in self.moments:
            out.merge(part)
        return out
