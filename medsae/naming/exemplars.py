"""Which images show what a neuron responds to: recipes for naming, and sets for scoring, with no patient in both."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from medsae.naming.namers import Exemplar

RECIPES = ("top", "quantile", "paper", "contrast")


@dataclass(frozen=True)
class Images:
    """Images to draw from. `image_id`, `path` strings [n]; `patient` strings or numbers [n]; `x` embeddings [n, d], centred, unit norm; `naming` bool [n] marks the patients
    whose images may name a neuron, the others score it. `facts`: what else is told of each image [n], or None."""

    image_id: np.ndarray
    path: np.ndarray
    patient: np.ndarray
    x: np.ndarray
    naming: np.ndarray
    facts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.image_id)


def unit_centred(x: np.ndarray) -> np.ndarray:
    """Embeddings [n, d] minus their mean, unit norm. All radiographs look alike to most encoders: without centring every cosine is near 1."""
    x = np.asarray(x, np.float32)
    x = x - x.mean(0, keepdims=True)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def naming_half(patients: np.ndarray, seed: int = 0) -> np.ndarray:
    """Whether each image's patient names (True) or scores (False): by a hash, so adding patients moves nobody."""
    unique, inverse = np.unique(patients.astype(str), return_inverse=True)
    half = np.array([hashlib.sha256(f"naming/{seed}/{p}".encode()).digest()[0] & 1 for p in unique], bool)
    return np.asarray(half[inverse]) if len(unique) else np.zeros(0, bool)


def rectify(activation: np.ndarray, share: float = 0.05) -> np.ndarray:
    """A signed feature as one that fires: what exceeds the value that `share` of the images exceed."""
    return np.maximum(activation - np.quantile(activation, 1 - share), 0.0)


def one_a_patient(rows: np.ndarray, patients: np.ndarray, wanted: int) -> np.ndarray:
    """`rows` in their order, the first of each patient before any second one of a patient, cut to what is there; at least `wanted` where possible."""
    _, first = np.unique(patients[rows], return_index=True)
    first = np.sort(first)
    if len(first) >= wanted:
        return rows[first]
    rest = np.setdiff1d(np.arange(len(rows)), first)[: wanted - len(first)]
    return rows[np.sort(np.concatenate([first, rest]))]


def choose(recipe: str, activation: np.ndarray, images: Images, k: int, seed: int = 0) -> tuple[Exemplar, ...]:
    """Images to name a neuron by, of the naming patients.

    Args:
        recipe: `top`: the k strongest. `quantile`: k evenly spaced over the ranks of all activating images, each told with its strength from 1 to 10.
            `paper`: of the strongest two thirds, half from the upper and half from the lower end, shuffled (arXiv 2510.26411). `contrast`: k / 2 by
            quantile and as many that do not activate although their embeddings are nearest to those.
        activation: [n], zero where the neuron is silent.
        images: the images.
        k: how many.
        seed: of the shuffle.

    Returns:
        At most k exemplars in the order in which they are shown; fewer where the neuron fires on fewer.
    """
    rows = np.flatnonzero(images.naming & (activation > 0))
    rows = rows[np.argsort(-activation[rows], kind="stable")]
    if not len(rows):
        return ()
    if recipe == "top":
        chosen = one_a_patient(rows, images.patient, k)[:k]
        return _exemplars(chosen, activation, images)
    if recipe == "paper":
        upper = one_a_patient(rows, images.patient, k)
        upper = upper[: max(k, math.ceil(2 * len(upper) / 3))]
        half = math.ceil(k / 2)
        picked = np.concatenate([upper[:half], upper[max(half, len(upper) - (k - half)) :]])
        return _exemplars(np.random.default_rng(seed).permutation(picked), activation, images)
    positives = _spread(one_a_patient(rows, images.patient, k), k if recipe == "quantile" else math.ceil(k / 2))
    shown = _exemplars(positives, activation, images, strength=True)
    if recipe == "quantile":
        return shown
    silent = np.flatnonzero(images.naming & (activation <= 0))
    near = nearest(silent, positives, images)
    near = one_a_patient(near, images.patient, k // 2)[: k // 2]
    return shown + tuple(_exemplar(int(i), rank, 0.0, "silent", images) for rank, i in enumerate(near))


def _spread(rows: np.ndarray, k: int) -> np.ndarray:
    if len(rows) <= k:
        return rows
    return rows[np.round(np.linspace(0, len(rows) - 1, k)).astype(int)]


def nearest(candidates: np.ndarray, to: np.ndarray, images: Images) -> np.ndarray:
    """Candidates by falling cosine with the mean embedding of the rows `to`."""
    similarity = (images.x @ images.x[to].mean(0))[candidates]  # all rows: copying most of them costs more
    return np.asarray(candidates[np.argsort(-similarity, kind="stable")])


def _exemplars(rows: np.ndarray, activation: np.ndarray, images: Images, strength: bool = False) -> tuple[Exemplar, ...]:
    top = float(activation[rows].max()) if len(rows) else 1.0
    captions = [f"strength {math.ceil(10 * float(activation[i]) / top)} of 10" if strength else "" for i in rows]
    return tuple(_exemplar(int(i), rank, float(activation[i]), caption, images) for rank, (i, caption) in enumerate(zip(rows, captions, strict=True)))


def _exemplar(i: int, rank: int, activation: float, caption: str, images: Images) -> Exemplar:
    if images.facts is not None and images.facts[i]:
        caption = f"{caption}; {images.facts[i]}" if caption else str(images.facts[i])
    return Exemplar(str(images.image_id[i]), str(images.path[i]), activation, rank, caption)


@dataclass(frozen=True)
class ScoringSet:
    """Images that a name is judged on: `rows` int [n], `truth` bool [n] (the neuron fires), `hard` bool [n] (silent but near in embedding)."""

    rows: np.ndarray
    truth: np.ndarray
    hard: np.ndarray


def scoring_set(activation: np.ndarray, images: Images, k: int, seed: int) -> ScoringSet:
    """k activating images over the quantiles and as many silent ones, of the scoring patients; half of the silent ones are hard.

    Random silent images flatter every name: most are easy. Hard ones are those nearest in embedding to the activating images. Where fewer images
    activate, as many silent ones are drawn.
    """
    rng = np.random.default_rng(seed)
    active = np.flatnonzero(~images.naming & (activation > 0))
    active = active[np.argsort(-activation[active], kind="stable")]
    silent = np.flatnonzero(~images.naming & (activation <= 0))
    k = min(k, len(active), len(silent))
    positives = _spread(one_a_patient(active, images.patient, k), k)
    hard = one_a_patient(nearest(silent, positives, images), images.patient, k // 2)[: k // 2] if k else silent[:0]
    rest = rng.permutation(np.setdiff1d(silent, hard))
    easy = one_a_patient(rest, images.patient, k - len(hard))[: k - len(hard)]
    rows = np.concatenate([positives, hard, easy]).astype(np.int64)
    order = rng.permutation(len(rows))
    truth = np.repeat([True, False, False], [len(positives), len(hard), len(easy)])
    is_hard = np.repeat([False, True, False], [len(positives), len(hard), len(easy)])
    return ScoringSet(rows[order], truth[order], is_hard[order])
