"""What neurons are correlated with: labels, confounds, and figures that are known of each image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from medsae.artifacts import Embeddings
from medsae.metrics.labels import Blank, Uncertain, apply_policy

CONFOUNDS = ("sex", "age", "view", "projection")
"""Female 1, male 0; years; frontal 1, lateral 0; AP 1, PA 0. Anything else is missing."""


@dataclass(frozen=True)
class KeyedRows:
    """Rows of numbers found by image key, for what lies outside the embeddings: `keys` uint64 [n] ascending, `values` [n, k]."""

    names: list[str]
    keys: np.ndarray
    values: np.ndarray

    def take(self, keys: np.ndarray) -> np.ndarray:
        """The rows of these images, float64 [n, k]; NaN where there is none."""
        out = np.full((len(keys), self.values.shape[1]), np.nan)
        if len(self.keys):
            where = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
            found = self.keys[where] == keys
            out[found] = self.values[where[found]]
        return out


def image_keys(image_ids: np.ndarray) -> np.ndarray:
    """Image ids (16 hex digits) as uint64."""
    return np.array([int(i, 16) for i in image_ids], np.uint64)


def patient_fold(patient_ids: np.ndarray, seed: int) -> np.ndarray:
    """The half, 0 or 1, that each patient belongs to, by a hash: adding patients moves nobody."""
    unique, inverse = np.unique(patient_ids.astype(str), return_inverse=True)
    half = np.array([hashlib.sha256(f"{seed}/{p}".encode()).digest()[0] & 1 for p in unique], np.int8)
    return half[inverse] if len(unique) else np.zeros(0, np.int8)


def confound_values(part: Embeddings) -> np.ndarray:
    """The confounds [n, 4] as numbers, NaN where unknown."""

    def two(column: str, one: str, zero: str) -> np.ndarray:
        values = part.column(column).astype(str)
        return np.where(values == one, 1.0, np.where(values == zero, 0.0, np.nan))

    age = part.column("age").astype(np.float64)
    return np.column_stack([two("sex", "F", "M"), age, two("view", "frontal", "lateral"), two("projection", "AP", "PA")])


def target_values(part: Embeddings, uncertain: Uncertain, blank: Blank, extra: KeyedRows | None) -> np.ndarray:
    """Labels under the policy, confounds and what else is known, [n, C + 4 + k]."""
    columns = [apply_policy(part.labels, uncertain, blank), confound_values(part)]
    if extra is not None:
        columns.append(extra.take(image_keys(part.column("image_id"))))
    return np.hstack(columns)
