"""The `vocabulary` namer: the term whose text embedding points where the neuron's direction points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from medsae.artifacts import fingerprint
from medsae.encoders.base import TextEncoder
from medsae.errors import ConfigError
from medsae.naming.client import Usage
from medsae.naming.namers import NO_CONCEPT, Emit, Name, Subject
from medsae.naming.prompts import KINDS


@dataclass(frozen=True)
class Vocabulary:
    """Terms, what each is (of `KINDS`), and the text that is embedded for it."""

    name: str
    terms: tuple[str, ...]
    kinds: tuple[str, ...]
    texts: tuple[str, ...]


def parse_vocabulary(name: str, text: str) -> Vocabulary:
    """A vocabulary file: one term a line, under headings `[kind]`; `#` begins a comment.

    Raises:
        ConfigError: an unknown kind, a term twice, or fewer than two terms.
    """
    kind = "other"
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if line.startswith("["):
            kind = line.strip("[]")
            if kind not in KINDS:
                raise ConfigError(f"vocabulary {name}, line {number}: unknown kind {kind!r}; there are {', '.join(KINDS)}")
        elif line:
            if line.casefold() in {t.casefold() for t in found}:
                raise ConfigError(f"vocabulary {name}, line {number}: {line!r} stands there twice")
            found[line] = kind
    if len(found) < 2:
        raise ConfigError(f"vocabulary {name} holds {len(found)} terms; it needs at least two to be centred")
    return Vocabulary(name, tuple(found), tuple(found.values()), tuple(found))


def load_vocabulary(name: str, encoder: Any = None) -> Vocabulary:
    """`auto`: the encoder's own concepts (`concept_vocabulary()`) where it has any, else `chest`; a vocabulary of the package; or a file by path.

    Raises:
        ConfigError: there is none of this name.
    """
    if name == "auto":
        own = getattr(encoder, "concept_vocabulary", None)
        if own is not None:
            return _own_vocabulary(own())
        name = "chest"
    folder = resources.files("medsae.naming") / "vocabularies"
    packaged = folder / f"{name}.txt"
    if packaged.is_file():
        return parse_vocabulary(name, packaged.read_text(encoding="utf-8"))
    if Path(name).is_file():
        return parse_vocabulary(name, Path(name).read_text(encoding="utf-8"))
    known = ", ".join(sorted(f.name[:-4] for f in folder.iterdir() if f.name.endswith(".txt")))
    raise ConfigError(f"vocabulary {name!r} is neither `auto`, nor one of the package's ({known}), nor a file")


def _own_vocabulary(concepts: Mapping[str, str] | Sequence[str]) -> Vocabulary:
    """Of an encoder: terms, or terms to texts; the kinds are those of the package's vocabularies where a term stands in one."""
    texts = concepts if isinstance(concepts, Mapping) else {c: c for c in concepts}
    kinds: dict[str, str] = {}
    for name in ("chest", "phantom"):
        known = load_vocabulary(name)
        kinds |= dict(zip(known.terms, known.kinds, strict=True))
    return Vocabulary("encoder", tuple(texts), tuple(kinds.get(t, "other") for t in texts), tuple(str(t) for t in texts.values()))


def centred_unit(x: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Rows minus `centre`, at unit norm; a row that is the centre stays zero."""
    x = np.asarray(x, np.float64) - centre
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(norm > 1e-12, norm, 1))


def chance_cosine(terms: int, dim: int) -> float:
    """About the highest cosine that a random direction in `dim` dimensions has with `terms` random others: sqrt(2 ln terms / dim)."""
    return math.sqrt(2 * math.log(max(terms, 2)) / max(dim, 1))


class VocabularyNamer:
    """Cosine of each neuron's direction with the text embeddings of a vocabulary, both centred (arXiv 2510.26411, second method).

    A name is given where the best cosine is above that of chance for so many terms in so many dimensions; otherwise the neuron has no shared concept.

    Args:
        encoder: with a text tower in the space of the directions.
        vocabulary: the terms.
        directions: neuron to direction [d]: the decoder row of an SAE, the axis of a raw feature.
        centre: what is subtracted from the directions [d]: the mean of all decoder rows; zero for axes.
        model: what to record as the model.
    """

    name = "vocabulary"
    costly = False

    def __init__(self, encoder: TextEncoder, vocabulary: Vocabulary, directions: np.ndarray, centre: np.ndarray, model: str) -> None:
        texts = np.asarray(encoder.encode_text(list(vocabulary.texts)), np.float64)
        self.texts = centred_unit(texts, texts.mean(0))
        self.vocabulary, self.model = vocabulary, model
        self.directions = centred_unit(directions, centre)
        self.floor = chance_cosine(len(vocabulary.terms), directions.shape[1])
        self.hash = fingerprint({"terms": vocabulary.terms, "texts": vocabulary.texts})

    def key(self, subject: Subject) -> str:
        return fingerprint([self.name, self.model, self.hash, subject.neuron])

    def run(self, subjects: Sequence[Subject], emit: Emit) -> Usage:
        for subject in subjects:
            emit(self.key(subject), self.name_one(subject))
        return Usage()

    def name_one(self, subject: Subject) -> Name:
        cosine = self.texts @ self.directions[subject.neuron]
        order = np.argsort(-cosine, kind="stable")[:3]
        best = int(order[0])
        evidence = {
            "terms": {self.vocabulary.terms[i]: round(float(cosine[i]), 4) for i in order},
            "chance": round(self.floor, 4),
            "vocabulary": self.vocabulary.name,
        }
        said = "; ".join(f"cosine {cosine[i]:.2f} with {self.vocabulary.terms[i]}" for i in order)
        confidence = float(np.clip(cosine[best], 0, 1))
        if cosine[best] <= self.floor:
            return Name(subject.neuron, self.name, self.model, "", said, "", NO_CONCEPT, self.hash, confidence, evidence)
        kind = self.vocabulary.kinds[best]
        return Name(subject.neuron, self.name, self.model, self.vocabulary.terms[best], said, kind, "ok", self.hash, confidence, evidence)
