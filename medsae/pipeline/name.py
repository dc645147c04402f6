"""name: exemplars and figures -> names/NAME.parquet, by the namer that the configuration asks for."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from medsae.artifacts import RAW, RunDir
from medsae.config import RunConfig
from medsae.errors import ArtifactError, ConfigError
from medsae.naming.answers import AnswerLog
from medsae.naming.client import TRANSIENT, ChatClient
from medsae.naming.config import NameConfig
from medsae.naming.images import ImageStore
from medsae.naming.namers import ChatNamer, Exemplar, LabelNamer, Name, Namer, Subject, names_table
from medsae.naming.prompts import NAME_ANSWER, load_prompt
from medsae.pipeline.cluster import ray_session
from medsae.pipeline.stage import StageResult
from medsae.progress import progress

log = logging.getLogger("medsae")


def run(config: RunConfig, run: RunDir) -> StageResult:
    """Names the selected neurons of every SAE and of the raw features.

    Raises:
        MedSAEError: nothing is measured yet, the service does not start, or the images cannot be found.
    """
    targets = measured(run, [*(s.name for s in config.sae), RAW])
    counts: dict[str, Any] = {"namer": config.name.namer}
    outputs: dict[str, str] = {}
    statuses: Counter[str] = Counter()
    usage: Counter[str] = Counter()
    with _namer(config) as namer:
        for target in targets:
            subjects = select(run, target, config.name)
            names, spent = name_all(run, target, namer, subjects)
            usage.update(spent)
            statuses.update(n.status for n in names)
            path = f"names/{target}.parquet"
            outputs[path] = run.write_table(path, names_table(names))
    counts |= {"neurons": sum(statuses.values()), "named": statuses["ok"], **usage}
    counts["without_name"] = {status: n for status, n in sorted(statuses.items()) if status != "ok"}
    return StageResult(counts=counts, outputs=outputs)


def measured(run: RunDir, names: list[str]) -> list[str]:
    """The names under `measure/` that are configured.

    Raises:
        ArtifactError: one of them is not measured.
    """
    for name in names:
        if not run.exists(f"measure/{name}/neurons.parquet"):
            raise ArtifactError(f"{run.path(f'measure/{name}')} holds no neurons.parquet; run `medsae measure` first")
    return names


def select(run: RunDir, target: str, config: NameConfig) -> list[Subject]:
    """The neurons to name, strongest correlation first, each with its exemplars in the order of their rank."""
    neurons = run.read_table(f"measure/{target}/neurons.parquet")
    chosen = neurons.filter(pc.equal(neurons["alive"], True)).to_pylist()
    chosen.sort(key=lambda row: (-_strength(row), row["neuron"]))
    chosen = chosen[: config.neurons]
    exemplars = _exemplars(run, target, {row["neuron"] for row in chosen})
    return [Subject(row["neuron"], row, tuple(exemplars.get(row["neuron"], ())[: config.images])) for row in chosen]


def _strength(row: dict[str, Any]) -> float:
    values = [abs(v) for k, v in row.items() if k.startswith("r_") and v is not None and math.isfinite(v)]
    return max(values, default=0.0)


def _exemplars(run: RunDir, target: str, neurons: set[int]) -> dict[int, list[Exemplar]]:
    path = f"measure/{target}/exemplars.parquet"
    if not run.exists(path):
        raise ArtifactError(f"{run.path(path)} does not exist; run `medsae measure` first")
    table = run.read_table(path)
    table = table.filter(pc.and_(pc.equal(table["role"], "name"), pc.is_in(table["neuron"], pa.array(sorted(neurons), pa.int32()))))
    found: dict[int, list[Exemplar]] = {}
    for row in table.sort_by([("neuron", "ascending"), ("rank", "ascending")]).to_pylist():
        found.setdefault(row["neuron"], []).append(Exemplar(row["image_id"], row["path"], row["activation"], row["rank"]))
    return found


def name_all(run: RunDir, target: str, namer: Namer, subjects: list[Subject]) -> tuple[list[Name], dict[str, int]]:
    """Names of all subjects and what they cost; what an earlier, interrupted job was told is not asked for again."""
    keys = {namer.key(s): s for s in subjects}
    names: list[Name] = []
    with AnswerLog(run, f"names/.answers/{target}") as answers:
        for key, record in answers.read().items() if namer.costly else ():
            if key in keys and not _transient(record["name"]["status"]):
                names.append(_from_record(record["name"]))
                del keys[key]
        resumed = len(names)
        with progress(len(subjects), f"name {target}", "neuron", initial=resumed) as bar:

            def emit(key: str, name: Name) -> None:
                if namer.costly:
                    answers.append(key, {"name": {**vars(name), "confidence": None if math.isnan(name.confidence) else name.confidence}})
                names.append(name)
                bar.update(1)
                tokens = name.evidence.get("prompt_tokens")
                if tokens is not None:
                    emitted["tokens"] += tokens + name.evidence["completion_tokens"]
                    bar.set_postfix_str(f"{emitted['tokens']} tokens", refresh=False)

            emitted: Counter[str] = Counter()
            usage = namer.run(list(keys.values()), emit)
    spent = {k: v for k, v in vars(usage).items() if v} if usage.requests else {}
    return names, {"resumed": resumed, **spent}


def _transient(status: str) -> bool:
    return status.split(" ")[0] in TRANSIENT


def _from_record(record: dict[str, Any]) -> Name:
    return Name(**{**record, "confidence": math.nan if record["confidence"] is None else record["confidence"]})


@contextmanager
def _namer(config: RunConfig) -> Iterator[Namer]:
    """The configured namer, with a service of its own where none is given."""
    if config.name.namer == "label":
        yield LabelNamer()
        return
    if not config.data.root:
        raise ConfigError("data.root is not set: the naming service is shown the images under it")
    settings = config.name
    with _service(config) as url:
        prompt = load_prompt(settings.prompt, NAME_ANSWER)
        images = ImageStore(config.data.root, settings.image_size)

        def client() -> ChatClient:
            return ChatClient(url, None, os.environ.get(settings.api_key_env), settings.concurrency, settings.retries, settings.timeout)

        yield ChatNamer(client, prompt, images, settings.model, settings.max_tokens)


@contextmanager
def _service(config: RunConfig) -> Iterator[str]:
    settings = config.name
    if settings.url:
        yield settings.url
        return
    from medsae.pipeline.naming_service import naming_service

    args = {"model": settings.model, "images": settings.images, "engine": settings.engine, "environment": settings.environment}
    with ray_session(config.ray), naming_service(args) as url:
        yield url
