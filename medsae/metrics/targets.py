"""What neurons are correlated with: labels, confounds, and figures that are known of each image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from medsae.artifacts import Embeddings
from medsae.errors import DataError
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


def target_values(part: Embeddings, uncertain: Uncertain, blank: Blank, *others: KeyedRows | None) -> np.ndarray:
    """Labels under the policy, confounds and what else is known, [n, C + 4 + k]."""
    columns = [apply_policy(part.labels, uncertain, blank), confound_values(part)]
    known = [rows for rows in others if rows is not None]
    if known:
        keys = image_keys(part.column("image_id"))
        columns += [rows.take(keys) for rows in known]
    return np.hstack(columns)


MOST_VALUES = 50
"""Values of a column above which it must hold numbers."""


def indicator_rows(ids: list[str], columns: dict[str, list[str]]) -> KeyedRows:
    """Columns of text as numbers: one of 0 and 1 for every value (`site=A`), a blank missing; more than MOST_VALUES numbers stay one column of numbers.

    Raises:
        DataError: more values than that, and they are not numbers.
    """
    names: list[str] = []
    found: list[np.ndarray] = []
    for name, texts in columns.items():
        values = np.array([t.strip() for t in texts])
        blank = values == ""
        distinct = np.unique(values[~blank]).tolist()
        if len(distinct) > MOST_VALUES:
            try:
                found.append(np.array([float(v) if v else np.nan for v in values]))
            except ValueError:
                raise DataError(
                    f"data.confound_columns: {name!r} has {len(distinct)} values that are not all numbers; at most {MOST_VALUES}"
                ) from None
            names.append(name)
            continue
        for value in distinct:
            names.append(f"{name}={value}")
            found.append(np.where(blank, np.nan, (values == value).astype(float)))
    keys = image_keys(np.array(ids))
    order = np.argsort(keys)
    return KeyedRows(names, keys[order], np.column_stack(found)[order] if found else np.zeros((len(keys), 0)))
