"""Namers: what gives a neuron its name. One interface; each says why where it gives none."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from medsae.artifacts import NAME_SCHEMA, fingerprint
from medsae.errors import DataError
from medsae.naming.client import Answer, ChatClient, Usage
from medsae.naming.images import ImageSource
from medsae.naming.prompts import Prompt

NO_CONCEPT = "no shared concept"
"""Status of a neuron whose images share nothing: an answer, but not a name."""


@dataclass(frozen=True)
class Exemplar:
    """An image that shows what a neuron responds to. `path` is relative to the data root; `caption` is told to the model beside it."""

    image_id: str
    path: str
    activation: float
    rank: int = 0
    caption: str = ""


@dataclass(frozen=True)
class Subject:
    """A neuron to name: its row of `neurons.parquet` and the images to name it by."""

    neuron: int
    figures: dict[str, Any] = field(default_factory=dict)
    exemplars: tuple[Exemplar, ...] = ()


@dataclass(frozen=True)
class Name:
    """A row of `names/NAME.parquet`. `status` is `ok`, or why there is no name (then `concept` is empty)."""

    neuron: int
    namer: str
    model: str
    concept: str
    description: str
    kind: str
    status: str
    prompt_hash: str
    confidence: float
    evidence: dict[str, Any]

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def names_table(names: Sequence[Name]) -> pa.Table:
    """Names as a table in `NAME_SCHEMA`, ordered by neuron."""
    rows = [{**vars(n), "evidence": json.dumps(n.evidence, sort_keys=True)} for n in sorted(names, key=lambda n: n.neuron)]
    return pa.Table.from_pylist(rows, schema=NAME_SCHEMA)


Emit = Callable[[str, Name], None]
"""Receives each name as it comes, with the key of the question that it answers."""


class Namer(Protocol):
    """Names neurons. `costly`: answers are worth keeping as they come."""

    name: str
    costly: bool

    def key(self, subject: Subject) -> str:
        """A hash of all that decides the answer; an answer under the same key is not asked for again."""

    def run(self, subjects: Sequence[Subject], emit: Emit) -> Usage:
        """Names each subject and emits every result, in whatever order they come."""


class LabelNamer:
    """The label whose correlation with the activation is highest, as it stands in `neurons.parquet`.

    Needs no model and no image. It can only say what the labels know, and says so in its description; a neuron without any defined correlation gets none.
    """

    name = "label"
    costly = False

    def key(self, subject: Subject) -> str:
        return fingerprint([self.name, subject.neuron, subject.figures])

    def run(self, subjects: Sequence[Subject], emit: Emit) -> Usage:
        for subject in subjects:
            emit(self.key(subject), self.name_one(subject))
        return Usage()

    def name_one(self, subject: Subject) -> Name:
        figures = subject.figures
        label, r = figures.get("top_label"), figures.get("top_r")
        if not label or r is None or not math.isfinite(r):
            return Name(subject.neuron, self.name, "", "", "", "", "no correlation is defined", "", math.nan, {})
        correlations = {k[2:]: v for k, v in figures.items() if k.startswith("r_") and v is not None and math.isfinite(v)}
        strongest = sorted(correlations, key=lambda k: -abs(correlations[k]))[:3]
        entropy, frequency = figures.get("entropy"), figures.get("frequency")
        said = [f"r {correlations[k]:+.2f} with {k}" for k in strongest]
        if entropy is not None and math.isfinite(entropy):
            said.append(f"entropy {entropy:.2f}")
        if frequency is not None:
            said.append(f"active on {100 * frequency:.1f} % of images")
        kind = "device" if label == "Support Devices" else "other" if label == "No Finding" else "finding"
        evidence = {"r": {k: round(correlations[k], 4) for k in strongest}, "entropy": entropy, "frequency": frequency}
        return Name(subject.neuron, self.name, "", label, "; ".join(said), kind, "ok", "", float(min(1.0, abs(r))), evidence)


class Asker(Protocol):
    """What can be asked: `ChatClient`, or the service itself from within."""

    async def ask(
        self, messages: list[dict[str, Any]], *, schema: dict[str, Any] | None = None, choices: Sequence[str] | None = None, max_tokens: int = 300
    ) -> Answer:
        """One question; see `ChatClient.ask`."""


class ChatNamer:
    """A vision-language model behind an OpenAI-compatible server: one prompt of several images a neuron.

    Args:
        client: makes the (unopened) client.
        prompt: with the schema `NAME_ANSWER`.
        images: reads images, as `ImageStore` does.
        model: what to record as the model.
        max_tokens: of an answer; one that is cut off is a failure.
        told: metadata columns that captions tell; recorded with every name, because it may repeat them.
    """

    name = "medgemma"
    costly = True

    def __init__(
        self, client: Callable[[], ChatClient], prompt: Prompt, images: ImageSource, model: str, max_tokens: int = 300, told: Sequence[str] = ()
    ) -> None:
        self.client, self.prompt, self.images, self.model, self.max_tokens = client, prompt, images, model, max_tokens
        self.told = list(told)

    def key(self, subject: Subject) -> str:
        ids = [(e.image_id, e.caption) for e in subject.exemplars]
        return fingerprint([self.name, self.model, self.prompt.hash, self.images.size, self.max_tokens, subject.neuron, ids])

    def run(self, subjects: Sequence[Subject], emit: Emit) -> Usage:
        return asyncio.run(self.run_async(subjects, emit))

    async def run_async(self, subjects: Sequence[Subject], emit: Emit) -> Usage:
        """As `run`, in the running event loop."""
        async with self.client() as client:
            # Prompts are built only when a slot is near: images of thousands of neurons do not fit in memory.
            ahead = asyncio.Semaphore(client.concurrency + 4)
            tasks: set[asyncio.Task[None]] = set()

            async def one(subject: Subject) -> None:
                try:
                    emit(self.key(subject), await self.name_one(client, subject))
                finally:
                    ahead.release()

            try:
                for subject in subjects:
                    await ahead.acquire()
                    for task in [t for t in tasks if t.done()]:
                        tasks.remove(task)
                        task.result()
                    tasks.add(asyncio.create_task(one(subject)))
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
            return client.usage

    async def name_one(self, client: Asker, subject: Subject) -> Name:
        """Asks for one name. Images that cannot be read are left out and counted; without any there is no name."""
        urls: list[str] = []
        captions: list[str] = []
        unreadable = 0
        for exemplar in subject.exemplars:
            try:
                urls.append(await asyncio.to_thread(self.images.get, exemplar.path))
                captions.append(exemplar.caption)
            except DataError:
                unreadable += 1
        evidence: dict[str, Any] = {"images": [e.image_id for e in subject.exemplars], "unreadable": unreadable}
        if self.told:
            evidence["told"] = self.told
        if not urls:
            return self._none(subject, "no readable image" if subject.exemplars else "no image", evidence)
        answer = await client.ask(self.prompt.messages(urls, captions), schema=self.prompt.schema, max_tokens=self.max_tokens)
        evidence |= {"attempts": answer.attempts, "prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        if not answer.ok:
            return self._none(subject, answer.status, evidence)
        value = answer.value
        concept, description = " ".join(value["concept"].split()), " ".join(value["description"].split())
        if not value["shared"]:
            return self._none(subject, NO_CONCEPT, evidence, description, value["confidence"] / 100)
        if not concept:
            return self._none(subject, "empty", evidence, description)
        confidence = value["confidence"] / 100
        return Name(subject.neuron, self.name, self.model, concept, description, value["kind"], "ok", self.prompt.hash, confidence, evidence)

    def _none(self, subject: Subject, status: str, evidence: dict[str, Any], description: str = "", confidence: float = math.nan) -> Name:
        return Name(subject.neuron, self.name, self.model, "", description, "", status, self.prompt.hash, confidence, evidence)
