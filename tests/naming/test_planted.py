"""Planted truth and names: what counts as called by its name, and what does not."""

from __future__ import annotations

from typing import Any

import numpy as np

from medsae.encoders.phantom_text import concept_vocabulary
from medsae.metrics.calibration import CARRIED, replicated
from medsae.naming.planted import PLANTED, planted_names


def row(name: str, neurons: tuple[int, int], r: float | None, signs: tuple[int, int] = (1, 1)) -> dict[str, Any]:
    interval = None if r is None else {"value": r, "low": r - 0.05, "high": r + 0.05}
    return {"name": name, "neurons": list(neurons), "signs": list(signs), "r": interval, "auroc": 0.9}


def called(calibration: dict[str, Any], names: dict[int, str]) -> dict[str, bool]:
    return {c["name"]: c["named"] for c in planted_names(calibration, names)["concepts"]}


def test_a_neuron_must_carry_it_and_be_called_so_on_both_halves() -> None:
    names = {1: "Pleural effusion", 2: "left pleural effusion", 3: "pneumothorax", 4: "pacemaker"}
    findings = [row("effusion", (1, 2), 0.6), row("pneumothorax", (3, 5), 0.6), row("pacemaker", (4, 4), CARRIED - 0.01), row("edema", (1, 1), 0.9)]
    found = called({"findings": findings}, names)
    assert found["effusion"]
    # On one half another neuron is chosen, which has no name; the second is too weak; the third bears another name; the rest was not measured.
    assert [name for name, yes in found.items() if yes] == ["effusion"]


def test_a_weaker_neuron_of_the_right_name_carries_it_too() -> None:
    effusion = row("effusion", (1, 1), 0.6) | {
        "replicated": [{"neuron": 1, "r": [0.6, 0.6]}, {"neuron": 2, "r": [0.3, 0.25]}, {"neuron": 5, "r": [0.2, 0.2]}]
    }
    exposure = row("exposure", (3, 3), 0.6, (-1, -1)) | {"replicated": [{"neuron": 3, "r": [-0.6, -0.5]}, {"neuron": 4, "r": [-0.4, -0.4]}]}
    names = {1: "female patient", 2: "pleural effusion", 3: "overexposed image", 4: "underexposed image", 5: "right pleural effusion"}
    told = planted_names({"findings": [effusion], "nuisances": [exposure]}, names)
    found = {c["name"]: c for c in told["concepts"]}
    assert (told["named"], told["carried"]) == (0, 2)
    assert found["effusion"]["bearer"] == {"neuron": 2, "name": "pleural effusion", "r": [0.3, 0.25]}
    assert found["exposure"]["bearer"] == {"neuron": 4, "name": "underexposed image", "r": [-0.4, -0.4]}
    assert found["edema"]["bearer"] is None


def test_only_what_both_halves_show_is_replicated() -> None:
    first, second = np.array([0.9, 0.5, -0.3, 0.4, np.nan]), np.array([0.1, 0.4, -0.25, -0.4, 0.9])
    assert replicated(first, second) == [{"neuron": 1, "r": [0.5, 0.4]}, {"neuron": 2, "r": [-0.3, -0.25]}]


def test_the_sign_decides_which_name_is_right() -> None:
    names = {1: "underexposed image", 2: "overexposed image"}
    assert called({"nuisances": [row("exposure", (1, 1), 0.6, (-1, -1))]}, names)["exposure"]
    assert called({"nuisances": [row("exposure", (2, 1), 0.6, (1, -1))]}, names)["exposure"]
    assert not called({"nuisances": [row("exposure", (1, 1), 0.6)]}, names)["exposure"]
    # A neuron that falls silent where there is an effusion is no neuron for effusion, whatever its name.
    assert not called({"findings": [row("effusion", (3, 3), 0.6, (-1, -1))]}, {3: "pleural effusion"})["effusion"]


def test_where_only_frontal_views_are_the_view_is_the_projection() -> None:
    told = planted_names({"nuisances": [row("lateral", (-1, -1), None), row("ap", (7, 7), 0.5, (-1, -1))]}, {7: "PA view"})
    view = next(c for c in told["concepts"] if c["name"] == "view")
    assert (view["column"], view["named"], view["names"]) == ("ap", True, ["PA view", "PA view"])
    assert (told["of"], told["named"]) == (14, 1)


def test_every_planted_thing_can_be_said_in_the_encoders_words() -> None:
    words = {w.casefold() for w in concept_vocabulary()}
    for planted in PLANTED:
        assert planted.names & words, planted.name
        assert not planted.opposite or planted.opposite & words
    # No name says two things.
    said = [n for p in PLANTED for n in p.names | p.opposite]
    assert len(said) == len(set(said))
