"""Judges: what says whether an image shows what a name says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from medsae.encoders.base import TextEncoder


class Judge(Protocol):
    """Judges names on images, by their row.

    `method`: the column of `scores/NAME.parquet`. `threshold`: an answer is yes above it; None: above the median of the images judged, half of which are
    activating.
    """

    method: str
    threshold: float | None

    async def judge(self, concept: str, description: str, rows: np.ndarray) -> np.ndarray:
        """How sure the judge is that each image shows the name, [len(rows)]; NaN where it gave no answer."""


class LabelJudge:
    """The data set's own labels: a name that is a label is on an image where the label says so. Answers for no other name but the empty one.

    Args:
        targets: [n, C], 1, 0 or NaN where the label policy leaves the entry out.
        labels: C names.
    """

    method = "labels"
    threshold: float | None = 0.5

    def __init__(self, targets: np.ndarray, labels: Sequence[str]) -> None:
        self.targets, self.index = targets, {name.casefold(): c for c, name in enumerate(labels)}

    async def judge(self, concept: str, description: str, rows: np.ndarray) -> np.ndarray:
        if not concept:
            return np.zeros(len(rows))
        column = self.index.get(concept.casefold())
        return np.full(len(rows), np.nan) if column is None else self.targets[rows, column].astype(np.float64)


class EmbeddingJudge:
    """Cosine of the name's text embedding with the images', both centred. Needs no language model, but shares the encoder with the neurons.

    Args:
        encoder: its text tower.
        x: image embeddings [n, d], centred, unit norm.
        reference: texts whose mean embedding is the centre of the texts.
    """

    method = "embedding"
    threshold: float | None = None

    def __init__(self, encoder: TextEncoder, x: np.ndarray, reference: Sequence[str]) -> None:
        self.encoder, self.x = encoder, x
        self.centre = encoder.encode_text(list(reference)).mean(0)
        self._known: dict[str, np.ndarray] = {}

    async def judge(self, concept: str, description: str, rows: np.ndarray) -> np.ndarray:
        if concept not in self._known:
            direction = self.encoder.encode_text([concept])[0] - self.centre
            self._known[concept] = direction / max(float(np.linalg.norm(direction)), 1e-12)
        return np.asarray(self.x[rows] @ self._known[concept], np.float64)
