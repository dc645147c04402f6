"""Naming by label and scoring, on a run whose neurons are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from medsae.pipeline import measure, name, score
from tests.support.planted import BRIEF, LABELS, write_planted


@pytest.mark.ray
def test_planted_neurons_get_their_labels_and_names_beat_the_shuffled_ones(ray_cluster: None, tmp_path: Path) -> None:
    config, run = write_planted(tmp_path, measure=BRIEF)
    measure.run(config, run)
    named = name.run(config, run)
    names = {r["neuron"]: r["concept"] for r in run.read_table("names/standard.parquet").to_pylist()}
    assert [names[j] for j in range(4)] == LABELS
    assert named.counts["named"] == named.counts["neurons"]
    result = score.run(config, run)
    rows = run.read_table("scores/standard.parquet").to_pylist()
    own = {r["neuron"]: r["balanced_accuracy"] for r in rows if r["control"] == "none"}
    assert all(own[j] > 0.9 for j in range(4))
    summary = run.read_json("scores/standard.json")["labels"]
    assert summary["gain"]["shuffled"]["low"] > 0.2
    assert abs(summary["mean"]["shuffled"] - 0.5) < 0.1
    assert summary["mean"]["empty"] == 0.5
    assert result.counts["failures"] == 0
