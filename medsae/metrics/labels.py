"""The label policy: raw CheXpert-style values to numbers with missing entries."""

from __future__ import annotations

from typing import Literal

import numpy as np

from medsae.artifacts import BLANK, UNCERTAIN

Uncertain = Literal["zeros", "ones", "ignore", "keep"]
Blank = Literal["negative", "ignore"]


def apply_policy(labels: np.ndarray, uncertain: Uncertain = "zeros", blank: Blank = "negative") -> np.ndarray:
    """Raw labels as float64 [n, C]: 1, 0, -1 under `keep`, or NaN where the policy leaves the entry out.

    Args:
        labels: integers [n, C]; 1 positive, 0 negative, -1 uncertain, -2 blank.
        uncertain: what -1 becomes (U-Zeros, U-Ones and U-Ignore of Irvin et al. 2019, arXiv 1901.07031, section 3.1); `keep` leaves it a number.
        blank: what -2 becomes.

    Raises:
        ValueError: for a value that is none of the four.
    """
    values = np.asarray(labels)
    if values.size and not np.isin(values, (1, 0, UNCERTAIN, BLANK)).all():
        raise ValueError("labels must be 1, 0, -1 (uncertain) or -2 (blank)")
    out = values.astype(np.float64)
    out[values == UNCERTAIN] = {"zeros": 0.0, "ones": 1.0, "ignore": np.nan, "keep": -1.0}[uncertain]
    out[values == BLANK] = {"negative": 0.0, "ignore": np.nan}[blank]
    return out


def label_counts(targets: np.ndarray, names: list[str]) -> dict[str, dict[str, int]]:
    """Positive, negative and ignored images a label, of targets [n, C] as `apply_policy` returns them; what `keep` leaves at -1 is negative here."""
    return {
        name: {
            "positive": int((targets[:, c] == 1).sum()),
            "negative": int((targets[:, c] <= 0).sum()),
            "ignored": int(np.isnan(targets[:, c]).sum()),
        }
        for c, name in enumerate(names)
    }


def as_binary(targets: np.ndarray) -> np.ndarray:
    """Targets as 1, 0 or NaN: the -1 that `keep` leaves in is not positive."""
    return np.where(targets == UNCERTAIN, 0.0, targets)


def balanced_subset(keys: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Keys of a subset in which rare and frequent labels have about as many positives, ascending.

    For each label `count` of its positive images are drawn (all where there are fewer); the subset is their union. An image with several labels counts
    for each of them, so a label that often stands beside others has more than `count`.

    Args:
        keys: image keys, uint64 [n], in any order; the draw depends on the set of images alone.
        labels: raw labels [n, C].
        count: positives drawn a label.
        seed: of the draw.
    """
    order = np.argsort(keys)
    rng = np.random.default_rng([seed, 6])
    drawn = [np.zeros(0, np.int64)]
    for c in range(labels.shape[1]):
        positive = order[labels[order, c] == 1]
        drawn.append(rng.permutation(positive)[:count])
    return np.sort(keys[np.unique(np.concatenate(drawn))])
