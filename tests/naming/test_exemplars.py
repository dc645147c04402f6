"""Recipes and scoring sets: no patient on both sides, no image twice, the activating ones activate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsae.naming.exemplars import RECIPES, Images, choose, naming_half, rectify, scoring_set, unit_centred


def pool(seed: int, n: int, patients: int) -> tuple[Images, np.ndarray]:
    rng = np.random.default_rng(seed)
    patient = np.array([f"p{p}" for p in rng.integers(0, patients, n)])
    ids = np.array([f"{i:016x}" for i in range(n)])
    images = Images(ids, ids, patient, unit_centred(rng.normal(size=(n, 8))), naming_half(patient, 0))
    return images, np.maximum(rng.normal(size=n), 0)


@given(st.integers(0, 1000), st.integers(1, 200), st.integers(1, 100), st.sampled_from(RECIPES), st.integers(1, 12))
def test_recipes_show_each_image_once_from_naming_patients(seed: int, n: int, patients: int, recipe: str, k: int) -> None:
    images, activation = pool(seed, n, patients)
    shown = choose(recipe, activation, images, k, seed)
    index = {i: j for j, i in enumerate(images.image_id)}
    rows = [index[e.image_id] for e in shown]
    assert len(rows) == len(set(rows)) <= k
    assert all(images.naming[r] for r in rows)
    active = (images.naming & (activation > 0)).sum()
    assert len(rows) == 0 if active == 0 else len(rows) >= min(k // 2, active)
    for e, r in zip(shown, rows, strict=True):
        assert e.activation == pytest.approx(activation[r])
        assert (activation[r] > 0) == (e.caption != "silent")


@given(st.integers(0, 1000), st.integers(1, 200), st.integers(1, 100), st.integers(1, 20))
def test_scoring_sets_are_balanced_and_of_other_patients(seed: int, n: int, patients: int, k: int) -> None:
    images, activation = pool(seed, n, patients)
    found = scoring_set(activation, images, k, seed)
    assert len(set(found.rows.tolist())) == len(found.rows)
    assert found.truth.sum() == (~found.truth).sum() <= k
    assert not images.naming[found.rows].any()
    assert ((activation[found.rows] > 0) == found.truth).all()
    assert not (found.hard & found.truth).any()
    naming_patients = {images.patient[int(e.image_id, 16)] for e in choose("top", activation, images, 8)}
    assert not naming_patients & set(images.patient[found.rows])


def test_one_image_a_patient_where_there_are_patients_enough() -> None:
    images, activation = pool(3, 400, 100)
    for recipe in ("top", "quantile"):
        shown = choose(recipe, activation, images, 8)
        assert len({images.patient[int(e.image_id, 16)] for e in shown}) == 8


def test_top_is_strongest_first_and_quantile_reaches_the_weak_end() -> None:
    images, activation = pool(1, 300, 300)
    top = [e.activation for e in choose("top", activation, images, 8)]
    assert top == sorted(top, reverse=True)
    assert top[0] == activation[images.naming].max()
    spread = choose("quantile", activation, images, 8)
    assert spread[0].activation == max(top)
    assert spread[-1].activation == pytest.approx(activation[images.naming & (activation > 0)].min())
    assert spread[0].caption == "strength 10 of 10"
    assert spread[-1].caption == "strength 1 of 10"


def test_the_papers_recipe_leaves_out_the_lowest_third() -> None:
    images, activation = pool(2, 600, 600)
    active = np.sort(activation[images.naming & (activation > 0)])
    shown = [e.activation for e in choose("paper", activation, images, 30)]
    assert len(shown) == 30
    assert min(shown) >= active[len(active) // 3 - 1]
    assert max(shown) == pytest.approx(active[-1])


def test_hard_negatives_are_nearer_than_the_others() -> None:
    images, activation = pool(5, 500, 500)
    found = scoring_set(activation, images, 20, 1)
    centre = images.x[found.rows[found.truth]].mean(0)
    easy = ~found.truth & ~found.hard
    assert (images.x[found.rows[found.hard]] @ centre).mean() > (images.x[found.rows[easy]] @ centre).mean()


def test_halves_do_not_move_when_patients_are_added() -> None:
    patients = np.array([f"p{i}" for i in range(400)])
    half = naming_half(patients)
    assert 0.4 < half.mean() < 0.6
    assert (naming_half(patients[::3]) == half[::3]).all()
    assert (naming_half(patients, seed=1) != half).any()


def test_a_signed_feature_fires_on_its_upper_share() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    fired = rectify(values)
    assert (fired > 0).sum() == 50
    assert values[fired > 0].min() > values[fired == 0].max()
