"""Who is in the collection: patients, their studies, findings that occur together as in CheXpert, and what a report says of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from medsae.data.manifest import CHEXPERT_LABELS
from medsae.data.phantom.model import FINDINGS, Anatomy, Capture, Findings, Phantom

LABELS = tuple(CHEXPERT_LABELS)
"""CheXpert's labels in CheXpert's order."""

DRAWN: dict[str, float] = {
    "cardiomegaly": 0.155,
    "mediastinum": 0.085,
    "edema": 0.305,
    "effusion": 0.455,
    "pneumothorax": 0.105,
    "consolidation": 0.135,
    "atelectasis": 0.265,
    "nodule": 0.042,
    "fracture": 0.042,
    "central_line": 0.33,
    "endotracheal_tube": 0.16,
    "ecg_leads": 0.33,
    "pacemaker": 0.09,
}
"""Share of studies in which a finding is planted: positive and uncertain of CheXpert's table 1 (Irvin et al. 2019), with fewer uncertain ones."""

PAIRS: dict[tuple[str, str], float] = {
    ("effusion", "atelectasis"): 0.35,
    ("effusion", "edema"): 0.20,
    ("effusion", "cardiomegaly"): 0.10,
    ("edema", "cardiomegaly"): 0.42,
    ("mediastinum", "cardiomegaly"): 0.20,
    ("consolidation", "effusion"): 0.12,
    ("pneumothorax", "edema"): -0.30,
    ("pneumothorax", "cardiomegaly"): -0.15,
    ("nodule", "edema"): -0.15,
    ("fracture", "pneumothorax"): 0.20,
    ("central_line", "endotracheal_tube"): 0.55,
    ("central_line", "ecg_leads"): 0.35,
    ("endotracheal_tube", "ecg_leads"): 0.45,
    ("central_line", "edema"): 0.20,
    ("endotracheal_tube", "edema"): 0.22,
    ("endotracheal_tube", "consolidation"): 0.18,
    ("central_line", "effusion"): 0.15,
    ("pacemaker", "cardiomegaly"): 0.35,
}
"""Correlations of the latent Gaussian behind the findings (a copula); the rest is independent."""

LABEL_OF: dict[str, str] = {
    "mediastinum": "Enlarged Cardiomediastinum",
    "cardiomegaly": "Cardiomegaly",
    "nodule": "Lung Lesion",
    "edema": "Edema",
    "consolidation": "Consolidation",
    "atelectasis": "Atelectasis",
    "pneumothorax": "Pneumothorax",
    "effusion": "Pleural Effusion",
    "fracture": "Fracture",
}
"""Labels that a planted finding decides by itself."""

UNCERTAIN_SHARE = {
    "mediastinum": 0.42,
    "cardiomegaly": 0.20,
    "nodule": 0.12,
    "edema": 0.17,
    "consolidation": 0.45,
    "atelectasis": 0.33,
    "pneumothorax": 0.12,
    "effusion": 0.10,
    "fracture": 0.06,
}
"""Share of the planted ones that the report hedges, the slightest first."""

NEGATED = {
    "mediastinum": 0.06,
    "cardiomegaly": 0.05,
    "nodule": 0.01,
    "edema": 0.12,
    "consolidation": 0.14,
    "atelectasis": 0.01,
    "pneumothorax": 0.28,
    "effusion": 0.30,
    "fracture": 0.02,
}
"""Share of the absent ones that the report denies (0.0); the rest is not mentioned (blank)."""

DEVICES = ("central_line", "endotracheal_tube", "ecg_leads", "pacemaker")
OPACITIES = ("edema", "consolidation", "atelectasis", "nodule")


@dataclass(frozen=True)
class Row:
    """One image: where it lies, what it shows, what the report says."""

    split: str
    patient: int
    study: int
    view: int
    phantom: Phantom
    labels: dict[str, float | None]

    @property
    def relative(self) -> str:
        """Path below the data set's folder."""
        return f"{self.split}/patient{self.patient:05d}/study{self.study}/view{self.view}_{self.phantom.capture.view}.jpg"


def _mixing() -> np.ndarray:
    names = list(DRAWN)
    matrix = np.eye(len(names))
    for (a, b), r in PAIRS.items():
        matrix[names.index(a), names.index(b)] = matrix[names.index(b), names.index(a)] = r
    return np.asarray(np.linalg.cholesky(matrix))


MIXING = _mixing()
THRESHOLDS = ndtri(1 - np.array(list(DRAWN.values())))


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """One patient's body."""
    female = bool(rng.random() < 0.41)
    habitus = float(np.clip(rng.normal(0.1, 0.5), -1, 1))
    return Anatomy(
        seed=int(rng.integers(2**31)),
        sex="Female" if female else "Male",
        age=int(np.clip(rng.normal(60, 17), 18, 90)),
        habitus=habitus,
        width=float(np.clip(rng.normal(0.94 if female else 1.0, 0.04), 0.84, 1.10)),
        height=float(np.clip(rng.normal(0.95 if female else 1.0, 0.05), 0.85, 1.12)),
        heart=float(np.clip(rng.normal(0.95, 0.05), 0.84, 1.06)),
        aorta=float(rng.uniform(0.8, 1.15)),
        breast=float(np.clip(rng.normal(1.9 + 0.7 * habitus, 0.5), 0.8, 3.4)) if female else 0.0,
        pacemaker_side="left" if rng.random() < 0.8 else "right",
        line_side="right" if rng.random() < 0.7 else "left",
        nodule_zone=float(rng.uniform(0.05, 0.95)),
        nodule_lateral=float(rng.uniform(0, 1)),
        consolidation_zone="lower" if rng.random() < 0.65 else "upper",
        fracture_rib=int(rng.integers(3, 8)),
    )


def draw_findings(latent: np.ndarray, sides: dict[str, str], weaker: float) -> Findings:
    """Severities of one study: how far each latent value lies beyond its threshold, as a quantile of what lies there."""
    values: dict[str, float] = {}
    for index, (name, share) in enumerate(DRAWN.items()):
        beyond = (ndtr(latent[index]) - (1 - share)) / share
        severity = 0.0 if beyond <= 0 else float(np.clip(0.15 + 0.85 * beyond, 0, 1))
        if name in DEVICES:
            values[name] = 1.0 if severity else 0.0
        elif name in FINDINGS:
            values[name] = severity
        else:
            side = sides[name]
            for s in ("left", "right"):
                both = side == f"both-{s}"
                values[f"{name}_{s}"] = (
                    severity if side == s or both else (max(0.15, severity * weaker) if side.startswith("both") and severity else 0.0)
                )
    return Findings(**{k: round(v, 4) for k, v in values.items()})


def draw_sides(rng: np.random.Generator) -> dict[str, str]:
    """On which side a patient's lateralised findings sit: `left`, `right`, or `both-` and the worse side."""
    chance_of_both = {"effusion": 0.40, "pneumothorax": 0.02, "consolidation": 0.12, "atelectasis": 0.35, "nodule": 0.0, "fracture": 0.04}
    sides = {}
    for name, both in chance_of_both.items():
        side = "left" if rng.random() < 0.48 else "right"
        sides[name] = f"both-{side}" if rng.random() < both else side
    return sides


def draw_capture(rng: np.random.Generator, sick: bool, view: str) -> Capture:
    """How one image was taken; patients with devices are mostly taken in bed, from front to back."""
    ap = view == "frontal" and rng.random() < (0.88 if sick else 0.45)
    wander = 1.6 if ap else 0.7
    return Capture(
        seed=int(rng.integers(2**31)),
        view=view,
        projection="" if view == "lateral" else ("AP" if ap else "PA"),
        exposure=round(float(np.clip(rng.normal(0, 0.42), -1, 1)), 3),
        rotation=round(float(np.clip(rng.normal(0, 4.5 if ap else 2.0), -14, 14)), 2),
        tilt=round(float(np.clip(rng.normal(0, 2.0 if ap else 0.8), -7, 7)), 2),
        inspiration=round(float(np.clip(rng.normal(0.42 if ap else 0.75, 0.2), 0, 1)), 3),
        zoom=round(float(np.clip(rng.normal(1.02, 0.06), 0.88, 1.18)), 3),
        shift_x=round(float(np.clip(rng.normal(0, wander), -4, 4)), 2),
        shift_y=round(float(np.clip(rng.normal(0, wander), -3, 3)), 2),
        noise=round(float(rng.uniform(0.2, 1.0)), 3),
        marker=("L", "R", "")[int(rng.choice(3, p=[0.55, 0.25, 0.2]))],
        aspect=round(float(rng.uniform(0.80, 0.86) if view == "lateral" or rng.random() < 0.15 else rng.uniform(1.14, 1.24)), 3),
    )


def report(findings: Findings, rng: np.random.Generator) -> dict[str, float | None]:
    """CheXpert labels of a study: 1 stated, 0 denied, -1 hedged, None not mentioned.

    1 and -1 are given only to what is planted, 0 and None only to what is not (Pneumonia is named for some consolidations).
    """
    labels: dict[str, float | None] = dict.fromkeys(LABELS)
    for name, label in LABEL_OF.items():
        severity, luck = findings.worst(name), rng.random()
        if severity > 0:
            # The hedged ones are those of low rank among the planted, with some overlap.
            rank = (severity - 0.15) / 0.85
            labels[label] = -1.0 if rank + 0.25 * (luck - 0.5) < UNCERTAIN_SHARE[name] else 1.0
        elif luck < NEGATED[name]:
            labels[label] = 0.0
    opaque = [labels[LABEL_OF[n]] for n in OPACITIES]
    labels["Lung Opacity"] = 1.0 if 1.0 in opaque else -1.0 if -1.0 in opaque else (0.0 if rng.random() < 0.05 else None)
    chance = rng.random()
    if labels["Consolidation"] in (1.0, -1.0):
        labels["Pneumonia"] = 1.0 if chance < 0.25 else -1.0 if chance < 0.7 else None
    labels["Support Devices"] = 1.0 if any(getattr(findings, d) for d in DEVICES) else (0.0 if rng.random() < 0.06 else None)
    # Reports of clean chests often dwell on something outside of the 14 labels; then none of them is stated.
    if all(findings.worst(n) == 0 for n in LABEL_OF) and rng.random() < 0.6:
        labels["No Finding"] = 1.0
    return labels


def is_valid(patient: int) -> bool:
    """Whether a patient belongs to `valid.csv`: 15 % of them, by number."""
    return patient % 20 in (3, 9, 16)


def patient_rows(patient: int, seed: int) -> Iterator[Row]:
    """All images of one patient: the same anatomy in every study, findings that come and go slowly."""
    rng = np.random.default_rng([seed, patient])
    anatomy, sides = draw_anatomy(rng), draw_sides(rng)
    weaker = float(rng.uniform(0.3, 0.9))
    lasting = MIXING @ rng.standard_normal(len(DRAWN))
    for study in range(1, 2 + min(int(rng.geometric(0.42)) - 1, 5)):
        latent = np.sqrt(0.6) * lasting + np.sqrt(0.4) * (MIXING @ rng.standard_normal(len(DRAWN)))
        findings = draw_findings(latent, sides, weaker)
        labels = report(findings, rng)
        in_bed = bool(findings.endotracheal_tube or findings.central_line or findings.ecg_leads)
        views = ["frontal"]
        chance = rng.random()
        if not in_bed and chance < 0.30:
            views.append("lateral")
        elif chance > 0.97:
            views.append("frontal")
        for view, kind in enumerate(views, 1):
            capture = draw_capture(rng, in_bed, kind)
            yield Row("valid" if is_valid(patient) else "train", patient, study, view, Phantom(anatomy, findings, capture), labels)


def rows(images: int, seed: int) -> Iterator[Row]:
    """The first `images` images of the endless collection of a seed, patient after patient."""
    patient = count = 0
    while count < images:
        patient += 1
        for row in patient_rows(patient, seed):
            if count == images:
                return
            count += 1
            yield row
