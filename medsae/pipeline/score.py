"""score: names -> scores/NAME.parquet: each name and its controls judged on images of patients that did not name it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from medsae.artifacts import RAW, SCORE_SCHEMA, RunDir, fingerprint
from medsae.config import RunConfig
from medsae.errors import ArtifactError
from medsae.naming.exemplars import scoring_set
from medsae.naming.judges import Judge, LabelJudge
from medsae.naming.scoring import OWN, evaluate, headline, shuffled_partner
from medsae.pipeline.activations import Table, read_activations, read_images
from medsae.pipeline.cluster import ray_session
from medsae.pipeline.stage import StageResult
from medsae.progress import progress

log = logging.getLogger("medsae")

Row = dict[str, Any]


def run(config: RunConfig, run: RunDir) -> StageResult:
    """Scores the names of every SAE and of the raw features.

    Raises:
        ArtifactError: nothing is named yet.
    """
    targets = [*(s.name for s in config.sae), RAW]
    named = {target: read_names(run, target) for target in targets}
    counts: Counter[str] = Counter()
    outputs: dict[str, str] = {}
    with ray_session(config.ray):
        table = read_images(config, run)
        judges: list[Judge] = [LabelJudge(table.targets, table.labels)]
        for target in targets:
            z = read_activations(config, run, target, [n["neuron"] for n in named[target]])
            rows = asyncio.run(score_target(config, table, z, named[target], named[RAW] if target != RAW else [], judges, target, counts))
            outputs[f"scores/{target}.parquet"] = run.write_table(f"scores/{target}.parquet", pa.Table.from_pylist(rows, schema=SCORE_SCHEMA))
            outputs[f"scores/{target}.json"] = run.write_json(f"scores/{target}.json", headline(rows, config.seed))
    return StageResult(counts=dict(counts), outputs=outputs)


def read_names(run: RunDir, target: str) -> list[Row]:
    """Rows of `names/NAME.parquet` that hold a name."""
    path = f"names/{target}.parquet"
    if not run.exists(path):
        raise ArtifactError(f"{run.path(path)} does not exist; run `medsae name` first")
    return [row for row in run.read_table(path).to_pylist() if row["status"] == "ok"]


async def score_target(
    config: RunConfig, table: Table, z: sp.csc_matrix, names: list[Row], raw: list[Row], judges: list[Judge], target: str, counts: Counter[str]
) -> list[Row]:
    """Rows of `scores/NAME.parquet`: every name by every judge with every control. Neurons that fire on fewer than 5 scoring images are counted only."""
    concepts = [n["concept"] for n in names]
    rows: list[Row] = []
    with progress(len(names), f"score {target}", "neuron") as bar:
        for index, name in enumerate(names):
            activation = np.asarray(z[:, [index]].todense()).ravel()
            seed = int(fingerprint([config.seed, target, name["neuron"]])[:8], 16)
            images = scoring_set(activation, table.images, config.score.images, seed)
            bar.update(1)
            if images.truth.sum() < 5:
                counts["too_few_images"] += 1
                continue
            counts["scored"] += 1
            for control, concept, description in _controls(names, concepts, index, raw, np.random.default_rng(seed)):
                for judge in judges:
                    answers = await judge.judge(concept, description, images.rows)
                    threshold = float(np.nanmedian(answers)) if judge.threshold is None and not np.isnan(answers).all() else judge.threshold or 0.0
                    figures = evaluate(images.truth, answers, table.images.patient[images.rows], threshold, seed)
                    counts["failures"] += figures.failures
                    rows.append({"neuron": name["neuron"], "namer": name["namer"], "control": control, "method": judge.method, **asdict(figures)})
    return rows


def _controls(names: list[Row], concepts: list[str], index: int, raw: list[Row], rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(control, concept, description) of the neuron's own name and of what it is compared with."""
    own = names[index]
    out = [(OWN, own["concept"], own["description"])]
    other = shuffled_partner(concepts, index, rng)
    if other is not None:
        out.append(("shuffled", names[other]["concept"], names[other]["description"]))
    out.append(("empty", "", ""))
    if raw:
        drawn = raw[int(rng.integers(len(raw)))]
        out.append(("raw", drawn["concept"], drawn["description"]))
    return out
