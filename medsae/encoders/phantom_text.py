"""The text side of `phantom-clip`: words, prompts and concepts."""

from __future__ import annotations

import re

PAD, UNKNOWN = 0, 1
LENGTH = 40
"""Longest text in words; what follows is cut off."""


class WordTokenizer:
    """Lower-case words of a fixed vocabulary; a word outside of it becomes one shared, trained unknown-word token."""

    def __init__(self, words: list[str]) -> None:
        self.words = list(words)
        self.index = {w: i + 2 for i, w in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words) + 2

    def __call__(self, text: str) -> list[int]:
        """Ids of the words of a text, at most `LENGTH`; an empty text is one unknown word."""
        ids = [self.index.get(w, UNKNOWN) for w in re.findall(r"[a-z0-9]+", text.lower())]
        return ids[:LENGTH] or [UNKNOWN]

    def unknown(self, text: str) -> list[str]:
        """The words of a text that are not in the vocabulary."""
        return [w for w in re.findall(r"[a-z0-9]+", text.lower()) if w not in self.index]


def zero_shot_prompts() -> dict[str, tuple[list[str], list[str]]]:
    """Prompts of each CheXpert label that phantoms carry: texts for the label, texts against it.

    An image's score is its mean similarity to the first minus that to the second. `Pneumonia` and `Pleural Other` are not planted and have none.
    """
    terms = {
        "Enlarged Cardiomediastinum": ("widened mediastinum", "mediastinal widening", "enlarged cardiomediastinum"),
        "Cardiomegaly": ("cardiomegaly", "enlarged heart", "enlarged cardiac silhouette"),
        "Lung Opacity": ("lung opacity", "opacities"),
        "Lung Lesion": ("lung nodule", "nodule", "lung lesion"),
        "Edema": ("pulmonary edema", "edema", "vascular congestion"),
        "Consolidation": ("consolidation", "airspace consolidation", "lobar consolidation"),
        "Atelectasis": ("atelectasis", "basal atelectasis", "volume loss"),
        "Pneumothorax": ("pneumothorax", "visible pleural line"),
        "Pleural Effusion": ("pleural effusion", "pleural fluid"),
        "Fracture": ("rib fracture", "broken rib"),
        "Support Devices": ("support devices", "medical devices"),
    }
    prompts = {label: ([f for t in names for f in (t, f"there is {t}")], [f"no {t}" for t in names]) for label, names in terms.items()}
    prompts["No Finding"] = (["no finding", "normal chest radiograph", "clear lungs"], ["abnormal chest radiograph", "acute findings", "disease"])
    return prompts


def concept_vocabulary() -> list[str]:
    """Phrases that name what a phantom may show: findings with sides, devices, and how the picture was taken."""
    sided = ("pleural effusion", "pneumothorax", "consolidation", "atelectasis", "lung nodule", "rib fracture")
    findings = ["enlarged heart", "widened mediastinum", "pulmonary edema", *sided]
    findings += [f"{side} {name}" for name in sided for side in ("left", "right")]
    findings += ["large pleural effusion", "small pleural effusion", "severe edema", "severe cardiomegaly"]
    findings += ["consolidation in the upper lobe", "consolidation in the lower lobe", "normal chest radiograph"]
    devices = ["central line", "endotracheal tube", "ecg leads", "pacemaker"]
    patient = ["female patient", "male patient", "obese patient", "slim patient", "deep inspiration", "poor inspiration"]
    picture = ["AP view", "PA view", "lateral view", "overexposed image", "underexposed image", "noisy image", "rotated patient"]
    picture += ["rotated to the left", "rotated to the right", "tilted image", "left marker", "right marker", "magnified image", "portrait image"]
    return findings + devices + patient + picture
