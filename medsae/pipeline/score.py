"""score: names -> scores/NAME.parquet: each name and its controls judged on images of patients that named nothing."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from medsae.artifacts import RAW, SCORE_SCHEMA, RunDir, fingerprint
from medsae.config import RunConfig
from medsae.errors import ArtifactError, ServiceError
from medsae.naming.answers import AnswerLog
from medsae.naming.exemplars import ScoringSet, scoring_set
from medsae.naming.images import ImageStore
from medsae.naming.judges import ChatJudge, EmbeddingJudge, IntruderJudge, Judge, LabelJudge, Remembered
from medsae.naming.prompts import load_prompt
from medsae.naming.scoring import OWN, chance_figures, evaluate, headline, shuffled_partner
from medsae.pipeline.activations import Table, read_activations, read_images
from medsae.pipeline.cluster import ray_session
from medsae.pipeline.name import client, service_url, text_encoder
from medsae.pipeline.stage import StageResult
from medsae.progress import progress

log = logging.getLogger("medsae")

Row = dict[str, Any]
DEFAULT_METHODS = {"label": ["labels"], "vocabulary": ["embedding"], "medgemma": ["detection", "intruder"]}
SERVICE_METHODS = {"detection", "paper", "intruder"}
AHEAD = 8
"""Neurons in work at a time; the client bounds the requests."""


@dataclass
class Scorer:
    """What scoring a target needs."""

    config: RunConfig
    table: Table
    judges: list[Judge] = field(default_factory=list)
    intruder: IntruderJudge | None = None
    counts: Counter[str] = field(default_factory=lambda: Counter(scored=0, failures=0))


def run(config: RunConfig, run: RunDir) -> StageResult:
    """Scores the names of every SAE and of the raw features.

    Raises:
        MedSAEError: nothing is named yet, the service does not start, or the encoder has no text tower.
    """
    targets = [*(s.name for s in config.sae), RAW]
    named = {target: read_names(run, target) for target in targets}
    methods = list[str](config.score.methods or DEFAULT_METHODS[config.name.namer])
    outputs: dict[str, str] = {}
    with ExitStack() as stack:
        stack.enter_context(ray_session(config.ray))
        scorer = Scorer(config, read_images(config, run))
        activations = {t: read_activations(config, run, t, [n["neuron"] for n in named[t]]) for t in targets}
        if "labels" in methods:
            scorer.judges.append(LabelJudge(scorer.table.targets, scorer.table.labels))
        if "embedding" in methods:
            texts = sorted({n["concept"] for t in targets for n in named[t]})
            scorer.judges.append(EmbeddingJudge(text_encoder(config), scorer.table.images.x, texts or [""]))
        url = service_url(config, stack) if SERVICE_METHODS & set(methods) else None
        try:
            scored = asyncio.run(_score_all(scorer, run, named, activations, url, methods))
        except BaseExceptionGroup as group:
            # A service that was given up ends all neurons in work: one line is enough.
            lost = group.subgroup(ServiceError)
            if lost is None:
                raise
            first: BaseException = lost
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None
    for target, rows in scored.items():
        outputs[f"scores/{target}.parquet"] = run.write_table(f"scores/{target}.parquet", pa.Table.from_pylist(rows, schema=SCORE_SCHEMA))
        outputs[f"scores/{target}.json"] = run.write_json(f"scores/{target}.json", headline(rows, config.seed))
    return StageResult(counts=dict(scorer.counts), outputs=outputs)


def read_names(run: RunDir, target: str) -> list[Row]:
    """Rows of `names/NAME.parquet` that hold a name, each with the neuron's best label as `top_label`."""
    path = f"names/{target}.parquet"
    if not run.exists(path):
        raise ArtifactError(f"{run.path(path)} does not exist; run `medsae name` first")
    measured = run.read_table(f"measure/{target}/neurons.parquet", ["neuron", "top_label"])
    labels = dict(zip(measured["neuron"].to_pylist(), measured["top_label"].to_pylist(), strict=True))
    return [{**row, "top_label": labels.get(row["neuron"])} for row in run.read_table(path).to_pylist() if row["status"] == "ok"]


async def _score_all(
    scorer: Scorer, run: RunDir, named: dict[str, list[Row]], activations: dict[str, sp.csc_matrix], url: str | None, methods: list[str]
) -> dict[str, list[Row]]:
    """Rows of every target; with a service, each of its answers is written as it comes."""
    async with AsyncExitStack() as stack:
        if url is not None:
            answers = stack.enter_context(AnswerLog(run, "scores/.answers"))
            known = {key: float("nan") if r["value"] is None else float(r["value"]) for key, r in answers.read().items()}
            scorer.counts["resumed"] = len(known)
            memory = Remembered(known, lambda key, value: answers.append(key, {"value": None if math.isnan(value) else value}))
            asker = await stack.enter_async_context(client(scorer.config, url))
            _service_judges(scorer, methods, asker, memory)
        out = {}
        for target, names in named.items():
            raw = named.get(RAW, []) if target != RAW else []
            out[target] = await score_target(scorer, activations[target], names, raw, target)
        if url is not None:
            scorer.counts.update({f"service_{k}": v for k, v in vars(asker.usage).items()})
        return out


def _service_judges(scorer: Scorer, methods: list[str], asker: Any, memory: Remembered) -> None:
    config, images = scorer.config, scorer.table.images
    store = ImageStore(config.data.root, config.name.image_size)
    shared = (store, images.image_id, images.path, config.name.model, memory)
    if "detection" in methods:
        scorer.judges.append(ChatJudge(asker, load_prompt(config.score.prompt or "detect-v1"), *shared))
    if "paper" in methods:
        scorer.judges.append(ChatJudge(asker, load_prompt("paper-v1"), *shared, per_request=5))
    if "intruder" in methods:
        scorer.intruder = IntruderJudge(asker, load_prompt("intruder-v1"), *shared)


async def score_target(scorer: Scorer, z: sp.csc_matrix, names: list[Row], raw: list[Row], target: str) -> list[Row]:
    """Rows of `scores/NAME.parquet`: every name and its controls by every judge. Neurons that fire on too few scoring images are only counted."""
    config = scorer.config
    order = np.arange(len(names))
    if config.score.neurons is not None:
        order = np.sort(np.random.default_rng(config.seed).permutation(len(names))[: config.score.neurons])
    found: dict[int, list[Row]] = {}
    slots = asyncio.Semaphore(AHEAD)
    with progress(len(order), f"score {target}", "neuron") as bar:

        async def one(index: int) -> None:
            async with slots:
                found[index] = await score_neuron(scorer, np.asarray(z[:, [index]].todense()).ravel(), names, index, raw, target)
                bar.update(1)

        async with asyncio.TaskGroup() as group:
            for index in order:
                group.create_task(one(int(index)))
    return [row for index in sorted(found) for row in found[index]]


async def score_neuron(scorer: Scorer, activation: np.ndarray, names: list[Row], index: int, raw: list[Row], target: str) -> list[Row]:
    """The rows of one neuron."""
    config, table, own = scorer.config, scorer.table, names[index]
    seed = int(fingerprint([config.seed, target, own["neuron"]])[:8], 16)
    images = scoring_set(activation, table.images, config.score.images, seed)
    if images.truth.sum() < config.score.min_images:
        scorer.counts["too_few_images"] += 1
        return []
    scorer.counts["scored"] += 1
    patients = table.images.patient[images.rows]
    rows: list[Row] = []
    for control, concept, description in controls(names, index, raw, np.random.default_rng(seed)):
        for judge in scorer.judges:
            answers = await judge.judge(concept, description, images.rows)
            threshold = judge.threshold
            if threshold is None:
                threshold = float(np.nanmedian(answers)) if not np.isnan(answers).all() else 0.0
            figures = evaluate(images.truth, answers, patients, threshold, seed)
            rows.append({"neuron": own["neuron"], "namer": own["namer"], "control": control, "method": judge.method, **asdict(figures)})
    if scorer.intruder is not None:
        rows += await _intruder(scorer.intruder, images, patients, own, seed)
    scorer.counts["failures"] += sum(r["failures"] for r in rows)
    return rows


async def _intruder(judge: IntruderJudge, images: ScoringSet, patients: np.ndarray, own: Row, seed: int) -> list[Row]:
    """Intruder questions about the neuron's images; as the control `shuffled`, about silent images only, where there is nothing to find."""
    rows = []
    active, silent = images.rows[images.truth], images.rows[~images.truth]
    count = min(10, len(silent) // 2)
    for control, members in ((OWN, active), ("shuffled", silent[count:])):
        if len(members) < judge.shown - 1:
            continue
        found = await judge.found(members, silent[:count], seed)
        figures = chance_figures(found, seed)
        rows.append({"neuron": own["neuron"], "namer": own["namer"], "control": control, "method": judge.method, **asdict(figures)})
    return rows


def controls(names: list[Row], index: int, raw: list[Row], rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(control, concept, description) of the neuron's own name and of what it is compared with, on the same images."""
    own = names[index]
    out = [(OWN, own["concept"], own["description"] if own["namer"] == "medgemma" else "")]
    other = shuffled_partner([n["concept"] for n in names], index, rng)
    if other is not None:
        out.append(("shuffled", names[other]["concept"], names[other]["description"] if own["namer"] == "medgemma" else ""))
    out.append(("empty", "", ""))
    if own["top_label"] and own["namer"] != "label":
        out.append(("best label", own["top_label"], ""))
    if raw:
        drawn = raw[int(rng.integers(len(raw)))]
        out.append(("raw", drawn["concept"], drawn["description"] if own["namer"] == "medgemma" else ""))
    return out
