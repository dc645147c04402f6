"""Selection without cheating: neurons are chosen on one half of the patients and reported on the other; intervals; a null for the best of m.

The statistics are those of a split-sample (two-fold) design: the r of the best of m neurons on the images it was chosen on is biased upwards, the more
so the larger m (Cawley and Talbot 2010, JMLR 11, section 5). Reported on patients that played no part in the choice it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from medsae.metrics.correlation import best_neuron, entropy

FOLDS = 2


@dataclass(frozen=True)
class Selected:
    """`neurons` [2, C]: chosen per label on half f (-1 where the label does not vary there); `r`, `entropy` [2, C]: of it on the other half."""

    neurons: np.ndarray
    r: np.ndarray
    entropy: np.ndarray
    sign: np.ndarray

    @property
    def mean_r(self) -> np.ndarray:
        """Mean of both halves [C]."""
        return np.asarray(self.r.mean(0))

    @property
    def mean_entropy(self) -> np.ndarray:
        return np.asarray(self.entropy.mean(0))


def select(r: list[np.ndarray], absolute: bool = False) -> Selected:
    """Chooses per label the neuron of highest r on each half and reports it on the other.

    A chosen neuron whose r is undefined on the other half (it never fires there) explains nothing there: its r counts as 0 and its entropy as log C.

    Args:
        r: correlations [m, C] on half 0 and on half 1.
        absolute: choose by |r| and report r times the sign that it had where it was chosen.
    """
    c = np.arange(r[0].shape[1])
    neurons = np.stack([best_neuron(half, absolute) for half in r])
    sign = np.ones(neurons.shape)
    if absolute:
        sign = np.stack([np.where(np.nan_to_num(r[f][neurons[f], c]) < 0, -1.0, 1.0) for f in range(FOLDS)])
    there = np.stack([r[1 - f][neurons[f], c] for f in range(FOLDS)])
    h = np.stack([entropy(r[1 - f])[neurons[f]] for f in range(FOLDS)])
    undefined = (neurons < 0) | np.stack([np.isnan(r[1 - f]).all(0) for f in range(FOLDS)])
    value = np.where(undefined, np.nan, np.nan_to_num(there) * sign)
    return Selected(neurons, value, np.where(undefined, np.nan, np.where(np.isnan(h), np.log(len(c)), h)), sign)


def equal_candidates(r: list[np.ndarray], candidates: int, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Split-selected mean r and mean entropy over labels, [draws] each, when only `candidates` random neurons may be chosen from.

    Takes away the advantage of having more neurons than the baseline has features. None where there are no more neurons than that.
    """
    m = len(r[0])
    if m <= candidates:
        return None
    rng = np.random.default_rng([seed, 1])
    c = np.arange(r[0].shape[1])
    score = [np.where(np.isnan(h), -np.inf, h) for h in r]
    report = [np.nan_to_num(h) for h in r]
    spread = [np.where(np.isnan(e), np.log(len(c)), e) for e in (entropy(h) for h in r)]
    usable = np.all([np.isfinite(s).any(0) for s in score], axis=0)
    rs, hs = np.empty(draws), np.empty(draws)
    for i in range(draws):
        subset = rng.choice(m, candidates, replace=False)
        picks = [subset[score[f][subset].argmax(0)] for f in range(FOLDS)]
        rs[i] = np.mean([report[1 - f][picks[f], c][usable].mean() for f in range(FOLDS)])
        hs[i] = np.mean([spread[1 - f][picks[f]][usable].mean() for f in range(FOLDS)])
    return rs, hs


def patient_weights(patients: int, draws: int, seed: int, size: int = 100) -> Iterator[np.ndarray]:
    """Bootstrap weights in batches [<= size, patients]: how often each patient is drawn, with replacement (Efron 1979)."""
    rng = np.random.default_rng([seed, 2])
    for start in range(0, draws, size):
        yield np.stack([np.bincount(rng.integers(patients, size=patients), minlength=patients) for _ in range(min(size, draws - start))]).astype(
            float
        )


class PatientSums:
    """Sums a patient, from which the correlations of a few neurons with all labels follow for any weighting of the patients.

    Args:
        activations: [n, k] of the few neurons.
        targets: [n, C], NaN where missing.
        patients: patient index [n], 0 to P - 1.
    """

    def __init__(self, activations: np.ndarray, targets: np.ndarray, patients: np.ndarray) -> None:
        count = int(patients.max()) + 1 if len(patients) else 0
        gather = sp.csr_matrix((np.ones(len(patients)), (patients, np.arange(len(patients)))), shape=(count, len(patients)))
        a = np.asarray(activations, np.float64)
        a = a - a.mean(0)
        spread = a.std(0)
        a = a / np.where(spread > 0, spread, 1.0)
        given = ~np.isnan(targets)
        y = np.where(given, targets, 0.0)
        mask = given.astype(float)
        self.k, self.c = a.shape[1], y.shape[1]
        self.shared = np.hstack([gather @ mask, gather @ y, gather @ y**2])
        self.each = [np.hstack([gather @ (a[:, [j]] * mask), gather @ (a[:, [j]] ** 2 * mask), gather @ (a[:, [j]] * y)]) for j in range(self.k)]

    def correlations(self, weights: np.ndarray) -> np.ndarray:
        """Pearson correlations [B, k, C] under patient weights [B, P]; 0 where undefined."""
        c = self.c
        shared = weights @ self.shared
        n, y, y2 = shared[:, :c], shared[:, c : 2 * c], shared[:, 2 * c :]
        out = np.zeros((len(weights), self.k, c))
        for j, sums in enumerate(self.each):
            total = weights @ sums
            s, q, sy = total[:, :c], total[:, c : 2 * c], total[:, 2 * c :]
            with np.errstate(invalid="ignore", divide="ignore"):
                co = sy - s * y / n
                va, vy = q - s**2 / n, y2 - y**2 / n
                r = co / np.sqrt(va * vy)
            out[:, j] = np.where((va > 1e-9 * q) & (vy > 1e-12 * y2), np.nan_to_num(r), 0.0)
        return np.clip(out, -1, 1)


def bootstrap_selected(
    chosen: Selected, activations: dict[int, np.ndarray], targets: np.ndarray, patients: np.ndarray, fold: np.ndarray, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap over patients of the reported figures, the choice of neurons held fixed.

    Patients are resampled with replacement within each half. The same seed draws the same patients for every set of features, so differences are paired.

    Args:
        chosen: what `select` returned.
        activations: neuron to its activations over all images [n].
        targets: labels [n, C] under the policy, or other figures of the images.
        patients: patient index [n].
        fold: half [n].
        draws: resamples B.
        seed: of the resampling.

    Returns:
        r and entropy [B, C], means of both halves.
    """
    c = targets.shape[1]
    rs, hs = np.zeros((draws, c)), np.zeros((draws, c))
    for f in range(FOLDS):
        rows = fold == 1 - f
        neurons = np.unique(chosen.neurons[f])
        values = np.column_stack([activations[int(j)][rows] if j >= 0 else np.zeros(rows.sum()) for j in neurons])
        _, index = np.unique(patients[rows], return_inverse=True)
        sums = PatientSums(values, targets[rows], index)
        where = np.searchsorted(neurons, chosen.neurons[f])
        start = 0
        for weights in patient_weights(int(index.max()) + 1, draws, seed * FOLDS + f):
            r = sums.correlations(weights)
            stop = start + len(weights)
            rs[start:stop] += r[:, where, np.arange(c)] * chosen.sign[f] / FOLDS
            h = entropy(r)[:, where]
            hs[start:stop] += np.where(np.isnan(h), np.log(c), h) / FOLDS
            start = stop
    return rs, hs


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % percentile interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: np.ndarray) -> Interval:
        low, high = np.quantile(draws, [0.025, 0.975])
        return cls(float(value), float(low), float(high))

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def donor_permutation(patients: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    """For each permutation and image the image whose labels it gets, int32 [permutations, n].

    Whole patients are permuted: image i of a patient takes the labels of image (i mod count) of the patient's donor, so the dependence of a patient's
    images on each other is kept under the null. Exact where patients have equally many images, close where they differ.
    """
    _, index = np.unique(patients, return_inverse=True)
    order = np.argsort(index, kind="stable")
    count = np.bincount(index)
    start = np.concatenate([[0], np.cumsum(count)[:-1]])
    within = np.empty(len(index), np.int64)
    within[order] = np.arange(len(index)) - start[index[order]]
    rng = np.random.default_rng([seed, 3])
    out = np.empty((permutations, len(index)), np.int32)
    for p in range(permutations):
        donor = rng.permutation(len(count))[index]
        out[p] = order[start[donor] + within % count[donor]]
    return out


class NullState:
    """Correlations of m neurons with permuted labels, for the distribution of the best of m; mergeable.

    Float32 sums of float32 batches: a null quantile needs three digits, not nine.

    Args:
        neurons: m.
        labels: C.
        permutations: P.
        masked: some labels are missing: each permuted label then has its own images, and two more sums.
    """

    def __init__(self, neurons: int, labels: int, permutations: int, masked: bool) -> None:
        self.labels, self.permutations, self.masked = labels, permutations, masked
        self.sums = np.zeros((3 if masked else 1, neurons, labels * permutations), np.float32)

    def update(self, activations: Any, centred: np.ndarray, given: np.ndarray | None) -> None:
        """Adds a batch.

        Args:
            activations: float32 [n, m], numpy or scipy.sparse, divided by each neuron's standard deviation.
            centred: permuted labels minus their mean [n, P * C], 0 where missing.
            given: whether a permuted label is there, the same shape; None unless `masked`.
        """
        self.sums[0] += activations.T @ centred
        if self.masked and given is not None:
            self.sums[1] += activations.T @ given
            square = activations.multiply(activations) if sp.issparse(activations) else activations**2
            self.sums[2] += square.T @ given

    def merge(self, other: NullState) -> NullState:
        """Adds another state's images to this one, in place; returns self."""
        self.sums = self.sums + other.sums
        return self

    def best(self, n: np.ndarray, sd_y: np.ndarray) -> np.ndarray:
        """Highest r over the neurons [P, C]; `n` images and `sd_y` standard deviation of every permuted label [P * C]."""
        with np.errstate(invalid="ignore", divide="ignore"):
            sd_a: float | np.ndarray = 1.0
            if self.masked:
                mean = self.sums[1] / n
                variance = self.sums[2] / n - mean**2
                sd_a = np.sqrt(np.where(variance > 1e-5 * self.sums[2] / n, variance, np.nan))
            r = self.sums[0] / (n * sd_y * sd_a)
        finite = np.where(np.isfinite(r), r, -np.inf).max(0)
        return np.where(np.isfinite(finite), finite, np.nan).reshape(self.permutations, self.labels)
