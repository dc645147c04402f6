"""What can be said of a phantom: sentences with the condition that makes them true.

Training needs to know of every image and every text whether they agree: many texts of a batch are true of many images, and to call those
mismatches would teach the encoder nonsense. So a text is a list of conditions on the truth, and agreement is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medsae.data.phantom import Findings, Phantom
from medsae.data.phantom.model import SIDES
from medsae.data.phantom.sampling import DEVICES, LABEL_OF, OPACITIES

TERMS: dict[str, tuple[str, ...]] = {
    "cardiomegaly": ("cardiomegaly", "enlarged heart", "enlarged cardiac silhouette", "cardiac enlargement"),
    "mediastinum": ("widened mediastinum", "mediastinal widening", "enlarged cardiomediastinum"),
    "edema": ("pulmonary edema", "edema", "vascular congestion", "interstitial edema"),
    "effusion": ("pleural effusion", "effusion", "pleural fluid"),
    "pneumothorax": ("pneumothorax", "visible pleural line", "collapsed lung"),
    "consolidation": ("consolidation", "airspace consolidation", "lobar consolidation"),
    "atelectasis": ("atelectasis", "basal atelectasis", "plate like atelectasis", "volume loss"),
    "nodule": ("lung nodule", "nodule", "lung lesion", "pulmonary mass"),
    "fracture": ("rib fracture", "fracture", "broken rib"),
    "central_line": ("central line", "central venous catheter", "catheter"),
    "endotracheal_tube": ("endotracheal tube", "breathing tube", "tracheal tube"),
    "ecg_leads": ("ecg leads", "monitoring leads", "electrodes"),
    "pacemaker": ("pacemaker", "cardiac pacemaker", "pacemaker with leads"),
    "devices": ("support devices", "medical devices", "device"),
    "opacity": ("lung opacity", "opacity", "opacities"),
}
SEVERITY: tuple[tuple[tuple[str, ...], float, float], ...] = (
    (("mild", "small", "slight"), 0.01, 0.45),
    (("moderate",), 0.35, 0.75),
    (("severe", "large", "marked"), 0.60, 1.01),
)
SIDED = ("effusion", "pneumothorax", "consolidation", "atelectasis", "nodule", "fracture")
FRONTAL_ONLY = ("mediastinum", "pneumothorax", "fracture")
"""Findings that lateral phantoms do not show."""

TECHNIQUE: tuple[tuple[tuple[str, ...], str, float, float], ...] = (
    (("frontal view", "frontal chest radiograph"), "lateral", -0.5, 0.5),
    (("lateral view", "lateral chest radiograph"), "lateral", 0.5, 1.5),
    (("ap view", "portable ap view", "anteroposterior projection"), "ap", 0.5, 1.5),
    (("pa view", "upright pa view", "posteroanterior projection"), "pa", 0.5, 1.5),
    (("female patient", "woman", "breast shadows"), "female", 0.5, 1.5),
    (("male patient", "man"), "female", -0.5, 0.5),
    (("overexposed image", "dark image", "overexposed"), "exposure", 0.35, 2.0),
    (("underexposed image", "bright image", "underexposed"), "exposure", -2.0, -0.35),
    (("well exposed image", "normal exposure"), "exposure", -0.25, 0.25),
    (("rotated patient", "patient is rotated"), "turned", 4.0, 99.0),
    (("rotated to the left", "patient rotated to the left"), "rotation", 3.5, 99.0),
    (("rotated to the right", "patient rotated to the right"), "rotation", -99.0, -3.5),
    (("patient is not rotated", "straight patient"), "turned", -1.0, 2.5),
    (("deep inspiration", "well expanded lungs"), "inspiration", 0.7, 2.0),
    (("poor inspiration", "low lung volumes"), "inspiration", -1.0, 0.35),
    (("obese patient", "large body habitus"), "habitus", 0.5, 2.0),
    (("slim patient", "thin body habitus"), "habitus", -2.0, -0.3),
    (("noisy image", "grainy image"), "noise", 0.75, 2.0),
    (("smooth image", "little noise"), "noise", -1.0, 0.4),
    (("tilted image", "image is tilted"), "tilted", 2.0, 99.0),
    (("left marker", "letter l marker"), "marker", 0.5, 1.5),
    (("right marker", "letter r marker"), "marker", -1.5, -0.5),
    (("magnified image", "close view"), "zoom", 1.06, 9.0),
    (("portrait image", "narrow film"), "aspect", 0.0, 1.0),
)
CLEAN = ("no finding", "normal chest radiograph", "no acute findings", "clear lungs", "unremarkable chest")
SICK = ("abnormal chest radiograph", "acute findings", "disease")

FACTS: tuple[str, ...] = (
    *TERMS,
    *(f"{n}_{s}" for n in SIDED for s in SIDES),
    "consolidation_upper",
    "consolidation_lower",
    "sick",
    "lateral",
    "ap",
    "pa",
    "female",
    "exposure",
    "turned",
    "rotation",
    "inspiration",
    "habitus",
    "noise",
    "tilted",
    "marker",
    "zoom",
    "aspect",
)
INDEX = {name: i for i, name in enumerate(FACTS)}


def facts(phantom: Phantom) -> np.ndarray:
    """All that sentences speak of, float32 [len(FACTS)]; NaN where the image cannot show it."""
    a, f, c = phantom.anatomy, phantom.findings, phantom.capture
    lateral = c.view == "lateral"
    value: dict[str, float] = {n: f.worst(n) for n in TERMS if n not in ("devices", "opacity")}
    value["devices"] = max(f.worst(n) for n in DEVICES)
    value["opacity"] = max(f.worst(n) for n in OPACITIES)
    for name in SIDED:
        for side in SIDES:
            value[f"{name}_{side}"] = float("nan") if lateral else f.side(name, side)
    for zone in ("upper", "lower"):
        value[f"consolidation_{zone}"] = value["consolidation"] if a.consolidation_zone == zone else 0.0
    value["sick"] = max(f.worst(n) for n in LABEL_OF)
    value.update(lateral=float(lateral), ap=float(c.projection == "AP"), pa=float(c.projection == "PA"), female=float(a.sex == "Female"))
    value.update(exposure=c.exposure, turned=abs(c.rotation), rotation=c.rotation, inspiration=c.inspiration, habitus=a.habitus, noise=c.noise)
    value.update(tilted=abs(c.tilt), marker={"L": 1.0, "R": -1.0, "": 0.0}[c.marker], zoom=c.zoom, aspect=c.aspect)
    if lateral and max(f.worst(n) for n in LABEL_OF if n not in FRONTAL_ONLY) == 0 < value["sick"]:
        value["sick"] = float("nan")
    if lateral:
        for name in (*FRONTAL_ONLY, "turned", "rotation", "tilted"):
            value[name] = float("nan")
    return np.array([value[n] for n in FACTS], np.float32)


Condition = tuple[int, float, float]
"""Index in `FACTS`, lowest and highest value for which the sentence is true."""


@dataclass(frozen=True)
class Sentence:
    """A phrase and what must hold; with several conditions, all must."""

    text: str
    conditions: tuple[Condition, ...]


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def present(rng: np.random.Generator, name: str, truth: np.ndarray | None = None) -> Sentence:
    """A sentence that says a finding is there, perhaps with its side and severity.

    With `truth` (facts of an image that has it) the details are those of the image.
    """
    words: list[str] = []
    key, conditions = name, []
    if name in SIDED and rng.random() < 0.6:
        known = [s for s in SIDES if truth is None or truth[INDEX[f"{name}_{s}"]] > 0]
        if known:
            side = known[int(rng.integers(len(known)))]
            if len(known) == 2 and rng.random() < 0.4:
                words.append("bilateral")
                conditions += [(INDEX[f"{name}_{s}"], 0.01, 1.01) for s in SIDES]
            else:
                words.append(side)
                key = f"{name}_{side}"
    low, high = 0.01, 1.01
    if name not in (*DEVICES, "devices", "opacity") and rng.random() < 0.4:
        fits = [s for s in SEVERITY if truth is None or s[1] <= truth[INDEX[key]] <= s[2]]
        if fits:
            adjectives, low, high = fits[int(rng.integers(len(fits)))]
            words.insert(0, _pick(rng, adjectives))
    conditions.append((INDEX[key], low, high))
    phrase = " ".join([*words, _pick(rng, TERMS[name])])
    if name == "consolidation" and rng.random() < 0.3:
        zone = "upper" if (truth[INDEX["consolidation_upper"]] > 0 if truth is not None else rng.random() < 0.5) else "lower"
        phrase += f" in the {zone} lobe"
        conditions.append((INDEX[f"consolidation_{zone}"], 0.01, 1.01))
    frame = _pick(rng, ("{}", "{}", "{}", "there is {}", "{} is present", "{} is seen", "radiograph with {}"))
    return Sentence(frame.format(phrase), tuple(conditions))


def absent(rng: np.random.Generator, name: str) -> Sentence:
    """A sentence that denies a finding."""
    frame = _pick(rng, ("no {}", "no {}", "no evidence of {}", "without {}", "there is no {}", "{} is absent"))
    return Sentence(frame.format(_pick(rng, TERMS[name])), ((INDEX[name], -0.01, 0.005),))


def technique(rng: np.random.Generator, truth: np.ndarray | None = None) -> Sentence:
    """A sentence on view, patient or picture."""
    options = [t for t in TECHNIQUE if truth is None or t[2] <= truth[INDEX[t[1]]] <= t[3]]
    phrases, key, low, high = options[int(rng.integers(len(options)))]
    return Sentence(_pick(rng, phrases), ((INDEX[key], low, high),))


def overall(rng: np.random.Generator, sick: bool) -> Sentence:
    """A sentence on the whole chest."""
    return Sentence(_pick(rng, SICK if sick else CLEAN), ((INDEX["sick"], 0.01, 1.01) if sick else (INDEX["sick"], -0.01, 0.005),))


SMALL = ("nodule", "fracture", "atelectasis", "central_line", "devices")
"""Findings that are hard to see: statements speak of them twice as often as of others."""
SPOKEN = (*TERMS, *SMALL)


def statement(rng: np.random.Generator) -> Sentence:
    """Any sentence, whatever the image: rare findings are spoken of as often as common ones, small ones more often."""
    chance = rng.random()
    if chance < 0.25:
        return technique(rng)
    if chance < 0.30:
        return overall(rng, bool(rng.random() < 0.5))
    name = _pick(rng, SPOKEN)
    return absent(rng, name) if rng.random() < 0.2 else present(rng, name)


def caption(rng: np.random.Generator, truth: np.ndarray) -> Sentence:
    """A short report of one image: what it shows, some of what it does not, how it was taken."""
    names = [n for n in TERMS if n not in ("devices", "opacity") and truth[INDEX[n]] > 0]
    others = [n for n in TERMS if truth[INDEX[n]] == 0]
    parts = [present(rng, names[i], truth) for i in rng.permutation(len(names))[: int(rng.integers(1, 4))]]
    if not names:
        parts.append(overall(rng, False) if truth[INDEX["sick"]] == 0 else technique(rng, truth))
    if others and rng.random() < 0.4:
        parts.append(absent(rng, others[int(rng.integers(len(others)))]))
    if rng.random() < 0.6:
        parts.append(technique(rng, truth))
    order = rng.permutation(len(parts))
    return Sentence(" . ".join(parts[i].text for i in order), tuple(c for i in order for c in parts[i].conditions))


def agreement(truth: np.ndarray, sentences: list[Sentence]) -> np.ndarray:
    """Whether each sentence is true of each image, float32 [n, m]: 1 true, 0 false, NaN where the image cannot tell."""
    result = np.ones((len(truth), len(sentences)), np.float32)
    for j, sentence in enumerate(sentences):
        for index, low, high in sentence.conditions:
            value = truth[:, index]
            holds = np.where(np.isnan(value), np.nan, (value >= low) & (value <= high)).astype(np.float32)
            # A false condition decides, also where another cannot be told.
            result[:, j] = np.where((result[:, j] == 0) | (holds == 0), 0, result[:, j] * holds)
    return result


def vocabulary() -> list[str]:
    """Every word that the sentences use, sorted."""
    texts = [t for terms in TERMS.values() for t in terms] + [w for words, _, _ in SEVERITY for w in words]
    texts += [t for phrases, *_ in TECHNIQUE for t in phrases] + list(CLEAN) + list(SICK)
    texts += ["there is no present seen absent evidence of without with on in the upper lower lobe left right bilateral", "radiograph chest"]
    return sorted({w for t in texts for w in t.split()})


assert set(TERMS) - {"devices", "opacity"} <= {f.removesuffix("_left").removesuffix("_right") for f in Findings.__dataclass_fields__}
