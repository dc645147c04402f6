"""Judges: what says whether an image shows what a name says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Protocol

import numpy as np

from medsae.artifacts import fingerprint
from medsae.encoders.base import TextEncoder
from medsae.errors import DataError
from medsae.naming.client import Answer
from medsae.naming.images import ImageSource
from medsae.naming.namers import Asker
from medsae.naming.prompts import Prompt


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
        if not concept:
            return np.zeros(len(rows))
        if concept not in self._known:
            direction = self.encoder.encode_text([concept])[0] - self.centre
            self._known[concept] = direction / max(float(np.linalg.norm(direction)), 1e-12)
        return np.asarray(self.x[rows] @ self._known[concept], np.float64)


SHOWN = {"type": "integer", "minimum": 0, "maximum": 1}


def list_schema(count: int) -> dict[str, Any]:
    """JSON schema of `count` answers, each 0 or 1."""
    shown = {"type": "array", "items": SHOWN, "minItems": count, "maxItems": count}
    return {"type": "object", "properties": {"shown": shown}, "required": ["shown"], "additionalProperties": False}


Memory = MutableMapping[str, float]
"""Answers by the hash of their question; what is in it is not asked again."""


class ChatJudge:
    """The naming service sees images and reads a name.

    `detection` asks about one image a request, answer 0 or 1 with log-probabilities: the score is P(1) / (P(0) + P(1)). The image stands before the name,
    so the engine's prefix cache serves all names that are judged on the same image. `paper` asks about five images a request for a list of five.

    Args:
        asker: an open client.
        prompt: `detect-v1` or `paper-v1`.
        images: reads images.
        image_id, path: of each row.
        model: recorded in the question's hash.
        memory: answers of an earlier job.
        per_request: images a request; more than one makes it the `paper` method.
    """

    threshold: float | None = 0.5

    def __init__(
        self,
        asker: Asker,
        prompt: Prompt,
        images: ImageSource,
        image_id: np.ndarray,
        path: np.ndarray,
        model: str,
        memory: Memory,
        per_request: int = 1,
    ) -> None:
        self.method = "detection" if per_request == 1 else "paper"
        self.asker, self.prompt, self.images, self.memory = asker, prompt, images, memory
        self.image_id, self.path, self.model, self.per_request = image_id, path, model, per_request

    async def judge(self, concept: str, description: str, rows: np.ndarray) -> np.ndarray:
        chunks = [rows[i : i + self.per_request] for i in range(0, len(rows), self.per_request)]
        answers = await asyncio.gather(*(self._ask(concept, description, chunk) for chunk in chunks))
        return np.concatenate([np.zeros(0), *answers])

    async def _ask(self, concept: str, description: str, rows: np.ndarray) -> np.ndarray:
        keys = [
            fingerprint([self.method, self.model, self.prompt.hash, self.images.size, concept, description, self._ids(rows), i])
            for i in range(len(rows))
        ]
        if all(k in self.memory for k in keys):
            return np.array([self.memory[k] for k in keys])
        try:
            urls = [await asyncio.to_thread(self.images.get, str(self.path[r])) for r in rows]
        except DataError:
            return np.full(len(rows), np.nan)
        messages = self.prompt.messages(urls, concept=concept, description=description, count=len(rows))
        if self.per_request == 1:
            answer = await self.asker.ask(messages, choices=("0", "1"))
            values = [_probability(answer)]
        else:
            answer = await self.asker.ask(messages, schema=list_schema(len(rows)), max_tokens=16 + 4 * len(rows))
            values = answer.value["shown"] if answer.ok else [float("nan")] * len(rows)
        if not answer.transient:
            self.memory.update(zip(keys, (float(v) for v in values), strict=True))
        return np.asarray(values, np.float64)

    def _ids(self, rows: np.ndarray) -> list[str]:
        return [str(self.image_id[r]) for r in rows]


def _probability(answer: Answer) -> float:
    """P(1) of a 0/1 answer; the answer itself where the server told no probabilities; NaN where there is none."""
    if not answer.ok:
        return float("nan")
    return float(answer.value) if answer.probabilities is None else answer.probabilities["1"]


class IntruderJudge:
    """Intruder detection: among images that make a neuron fire, the one that does not. Says whether the images share something, whatever the name.

    Args:
        asker, images, image_id, path, model, memory: as of `ChatJudge`.
        prompt: `intruder-v1`.
        shown: images a question.
    """

    method = "intruder"

    def __init__(
        self, asker: Asker, prompt: Prompt, images: ImageSource, image_id: np.ndarray, path: np.ndarray, model: str, memory: Memory, shown: int = 5
    ) -> None:
        self.asker, self.prompt, self.images, self.memory = asker, prompt, images, memory
        self.image_id, self.path, self.model, self.shown = image_id, path, model, shown

    async def found(self, members: np.ndarray, intruders: np.ndarray, seed: int) -> np.ndarray:
        """A question for each intruder with `shown` - 1 random members: 1 found, 0 not found, NaN no answer, [len(intruders)]."""
        rng = np.random.default_rng(seed)
        questions = []
        for intruder in intruders:
            place = int(rng.integers(self.shown))
            rows = rng.choice(members, self.shown - 1, replace=False)
            questions.append((np.insert(rows, place, intruder), place))
        return np.array(await asyncio.gather(*(self._ask(rows, place) for rows, place in questions)), np.float64)

    async def _ask(self, rows: np.ndarray, place: int) -> float:
        key = fingerprint([self.method, self.model, self.prompt.hash, self.images.size, [str(self.image_id[r]) for r in rows], place])
        if key in self.memory:
            return self.memory[key]
        try:
            urls = [await asyncio.to_thread(self.images.get, str(self.path[r])) for r in rows]
        except DataError:
            return float("nan")
        captions = [f"radiograph {i}" for i in range(len(rows))]
        answer = await self.asker.ask(self.prompt.messages(urls, captions, count=len(rows)), choices=[str(i) for i in range(len(rows))])
        value = float(answer.value == str(place)) if answer.ok else float("nan")
        if not answer.transient:
            self.memory[key] = value
        return value


class Remembered(dict[str, float]):
    """A memory that writes every new answer through to a log."""

    def __init__(self, known: dict[str, float], write: Callable[[str, float], None]) -> None:
        super().__init__(known)
        self._write = write

    def __setitem__(self, key: str, value: float) -> None:
        super().__setitem__(key, value)
        self._write(key, value)

    def update(self, *pairs: Any, **_: float) -> None:
        for key, value in dict(*pairs).items():
            self[key] = value
