"""name: figures, directions and images -> names/NAME.parquet, by the namer that the configuration asks for."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow.compute as pc

from medsae.artifacts import RAW, RunDir
from medsae.config import RunConfig
from medsae.errors import ArtifactError, ConfigError
from medsae.naming.answers import AnswerLog
from medsae.naming.client import TRANSIENT, ChatClient
from medsae.naming.config import NameConfig
from medsae.naming.exemplars import choose
from medsae.naming.images import ImageStore
from medsae.naming.namers import ChatNamer, LabelNamer, Name, Namer, Subject, names_table
from medsae.naming.planted import planted_names
from medsae.naming.prompts import NAME_ANSWER, load_prompt
from medsae.naming.uniqueness import group_names
from medsae.pipeline.activations import read_activations, read_images
from medsae.pipeline.cluster import ray_session
from medsae.pipeline.stage import StageResult
from medsae.progress import progress

log = logging.getLogger("medsae")

Row = dict[str, Any]
Maker = Callable[[str, list[Row]], tuple[Namer, list[Subject]]]
"""Of a target and its chosen rows of `neurons.parquet`: the namer and what it is asked."""


def run(config: RunConfig, run: RunDir) -> StageResult:
    """Names the selected neurons of every SAE and of the raw features.

    Raises:
        MedSAEError: nothing is measured yet, the service does not start, the images cannot be found, or the encoder has no text tower.
    """
    targets = [*(s.name for s in config.sae), RAW]
    for target in targets:
        if not run.exists(f"measure/{target}/neurons.parquet"):
            raise ArtifactError(f"{run.path(f'measure/{target}')} holds no neurons.parquet; run `medsae measure` first")
    counts: dict[str, Any] = {}
    outputs: dict[str, str] = {}
    statuses: Counter[str] = Counter()
    usage: Counter[str] = Counter()
    with ExitStack() as stack:
        make = {"label": _labels, "vocabulary": _vocabulary, "medgemma": _service_namer}[config.name.namer](config, run, stack)
        for target in targets:
            namer, subjects = make(target, select(run, target, config.name))
            names, spent = name_all(run, target, namer, subjects)
            usage.update(spent)
            statuses.update(n.status for n in names)
            outputs[f"names/{target}.parquet"] = run.write_table(f"names/{target}.parquet", names_table(names))
            outputs[f"names/{target}.json"] = run.write_json(f"names/{target}.json", name_figures(run, target, names))
    counts = {"neurons": sum(statuses.values()), "named": statuses["ok"], **usage}
    counts["without_name"] = {status: n for status, n in sorted(statuses.items()) if status != "ok"}
    return StageResult(counts=counts, outputs=outputs)


def name_figures(run: RunDir, target: str, names: list[Name]) -> dict[str, Any]:
    """What `names/NAME.json` holds: how names are shared and, on phantoms, whether what was planted is called by its name."""
    named = [(n.neuron, n.concept) for n in names if n.ok]
    figures = group_names(named)
    path = f"measure/{target}/calibration.json"
    if run.exists(path):
        figures["planted"] = planted_names(run.read_json(path), dict(named))
    return figures


def select(run: RunDir, target: str, config: NameConfig) -> list[Row]:
    """Rows of `neurons.parquet` of the neurons to name, strongest correlation first."""
    table = run.read_table(f"measure/{target}/neurons.parquet")
    if config.select == "alive":
        table = table.filter(pc.equal(table["alive"], True))
    elif config.select == "active":
        table = table.filter(pc.equal(table["dead"], False))
    rows: list[Row] = table.to_pylist()
    rows.sort(key=lambda row: (-_strength(row), row["neuron"]))
    return rows[: config.neurons]


def _strength(row: Row) -> float:
    values = [abs(v) for k, v in row.items() if k.startswith("r_") and v is not None and math.isfinite(v)]
    return max(values, default=0.0)


def name_all(run: RunDir, target: str, namer: Namer, subjects: list[Subject]) -> tuple[list[Name], dict[str, int]]:
    """Names of all subjects and what they cost; what an earlier, interrupted job was told is not asked for again."""
    keys = {namer.key(s): s for s in subjects}
    names: list[Name] = []
    tokens = 0
    with ExitStack() as stack:
        answers = stack.enter_context(AnswerLog(run, f"names/.answers/{target}")) if namer.costly else None
        for key, record in answers.read().items() if answers else ():
            if key in keys and record["name"]["status"].split(" ")[0] not in TRANSIENT:
                names.append(_from_record(record["name"]))
                del keys[key]
        resumed = len(names)
        bar = stack.enter_context(progress(len(subjects), f"name {target}", "neuron", initial=resumed))

        def emit(key: str, name: Name) -> None:
            nonlocal tokens
            if answers:
                answers.append(key, {"name": {**vars(name), "confidence": None if math.isnan(name.confidence) else name.confidence}})
            names.append(name)
            tokens += name.evidence.get("prompt_tokens", 0) + name.evidence.get("completion_tokens", 0)
            if tokens:
                bar.set_postfix_str(f"{tokens} tokens", refresh=False)
            bar.update(1)

        usage = namer.run(list(keys.values()), emit)
    return names, {"resumed": resumed, **vars(usage)} if namer.costly else {}


def _from_record(record: Row) -> Name:
    return Name(**{**record, "confidence": math.nan if record["confidence"] is None else record["confidence"]})


def _labels(config: RunConfig, run: RunDir, stack: ExitStack) -> Maker:
    return lambda target, rows: (LabelNamer(), [Subject(row["neuron"], row) for row in rows])


def _vocabulary(config: RunConfig, run: RunDir, stack: ExitStack) -> Maker:
    from medsae.naming.vocabulary import VocabularyNamer, load_vocabulary
    from medsae.sae import load

    encoder = text_encoder(config)
    vocabulary = load_vocabulary(config.name.vocabulary, encoder)

    def make(target: str, rows: list[Row]) -> tuple[Namer, list[Subject]]:
        if target == RAW:
            directions = np.eye(encoder.dim)
            centre = np.zeros(encoder.dim)
        else:
            directions = load((run, target)).W_dec.cpu().numpy()
            centre = directions.mean(0)
        return VocabularyNamer(encoder, vocabulary, directions, centre, config.encoder.name), [Subject(row["neuron"], row) for row in rows]

    return make


def text_encoder(config: RunConfig) -> Any:
    """The run's encoder, on the CPU.

    Raises:
        ConfigError: it has no text tower.
    """
    from medsae.encoders import load_encoder

    settings = config.encoder
    encoder = load_encoder(settings.name, settings.weights, device="cpu", seed=settings.seed, dtype="float32", sha256=settings.sha256)
    if not hasattr(encoder, "encode_text"):
        raise ConfigError(f"encoder {settings.name} has no text tower: name.namer=vocabulary needs one; use label or medgemma")
    return encoder


def _service_namer(config: RunConfig, run: RunDir, stack: ExitStack) -> Maker:
    settings = config.name
    if not config.data.root:
        raise ConfigError("data.root is not set: the naming service is shown the images under it")
    told = [*settings.metadata, *settings.columns]
    if told:
        log.warning("the model is told %s beside the images (name.metadata, name.columns): a name may repeat what it was told", ", ".join(told))
    prompt = load_prompt(settings.prompt or ("contrast-v1" if settings.recipe == "contrast" else "name-v1"), NAME_ANSWER)
    stack.enter_context(ray_session(config.ray))
    table = read_images(config, run, settings.metadata, settings.columns)
    url = service_url(config, stack)
    store = ImageStore(config.data.root, settings.image_size)
    namer = ChatNamer(lambda: client(config, url), prompt, store, settings.model, settings.max_tokens, told)

    def make(target: str, rows: list[Row]) -> tuple[Namer, list[Subject]]:
        z = read_activations(config, run, target, [row["neuron"] for row in rows])
        subjects = []
        for column, row in enumerate(rows):
            activation = np.asarray(z[:, [column]].todense()).ravel()
            subjects.append(Subject(row["neuron"], row, choose(settings.recipe, activation, table.images, settings.images, config.seed)))
        return namer, subjects

    return make


def service_url(config: RunConfig, stack: ExitStack) -> str:
    """The configured naming service, or one that is started for as long as `stack` is open."""
    settings = config.name
    if settings.url:
        return settings.url
    from medsae.pipeline.naming_service import naming_service

    args = {"model": settings.model, "images": settings.images, "engine": settings.engine, "environment": settings.environment}
    return stack.enter_context(naming_service(args))


def client(config: RunConfig, url: str) -> ChatClient:
    """An unopened client of the naming service."""
    settings = config.name
    key = os.environ.get(settings.api_key_env)
    return ChatClient(url, None, key, settings.concurrency, settings.retries, settings.timeout, give_up=max(8, settings.concurrency))
