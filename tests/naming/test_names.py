"""Prompts, vocabularies, label names, uniqueness, images and the answer log."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medsae.artifacts import NAME_SCHEMA, RunDir
from medsae.errors import ConfigError, DataError
from medsae.naming.answers import AnswerLog
from medsae.naming.images import ImageStore, RequestImages, data_url
from medsae.naming.namers import LabelNamer, Name, Subject, names_table
from medsae.naming.prompts import NAME_ANSWER, load_prompt
from medsae.naming.uniqueness import canonical, group_names, says_nothing
from medsae.naming.vocabulary import VocabularyNamer, load_vocabulary, parse_vocabulary


@pytest.mark.parametrize("name", ["name-v1", "contrast-v1", "detect-v1", "paper-v1", "intruder-v1"])
def test_every_prompt_renders_with_images_in_their_place(name: str) -> None:
    prompt = load_prompt(name)
    content = prompt.messages(["data:a", "data:b"], ["one", ""], concept="edema", description="", count=2)[0]["content"]
    assert [part["type"] for part in content] == ["text", "text", "image_url", "image_url", "text"]
    # Gemma3 sets newlines around images itself: text that begins or ends with one runs into them.
    assert all(part["text"] == part["text"].strip() != "" for part in content if part["type"] == "text")


def test_a_prompts_hash_follows_its_text_and_schema(tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("Look.\n[[images]]\nWhat?")
    mine = load_prompt(str(tmp_path / "mine.md"))
    (tmp_path / "other.md").write_text("Look!\n[[images]]\nWhat?")
    hashes = {mine.hash, load_prompt(str(tmp_path / "other.md")).hash, load_prompt(str(tmp_path / "mine.md"), NAME_ANSWER).hash}
    assert len(hashes) == 3
    (tmp_path / "none.md").write_text("Look.")
    with pytest.raises(ConfigError, match="exactly once"):
        load_prompt(str(tmp_path / "none.md"))
    with pytest.raises(ConfigError, match="name-v1"):
        load_prompt("name-v0")


def test_a_template_cannot_be_injected_by_a_name() -> None:
    content = load_prompt("detect-v1").messages(["data:a"], concept="{{ 7 * 7 }}", description="")[0]["content"]
    assert "{{ 7 * 7 }}" in content[-1]["text"]


class Words:
    """A text tower that knows four words, shifted by a common mean as CLIP's are."""

    def encode_text(self, texts: list[str]) -> np.ndarray:
        out = np.full((len(texts), 6), 3.0, np.float32)
        for i, text in enumerate(texts):
            for j, word in enumerate(("edema", "nodule", "pacemaker", "rotation")):
                out[i, j] += word in text
        return out / np.linalg.norm(out, axis=1, keepdims=True)


def test_the_vocabulary_namer_finds_the_planted_directions() -> None:
    vocabulary = parse_vocabulary("test", "[finding]\nedema\nnodule\n[device]\npacemaker\n[position]\nrotation")
    directions = 5 + np.concatenate([np.eye(6)[:4], -np.eye(6)[4:5], np.zeros((1, 6))])
    namer = VocabularyNamer(Words(), vocabulary, directions, directions[:4].mean(0), "words")
    names: list[Name] = []
    namer.run([Subject(j) for j in range(6)], lambda key, name: names.append(name))
    assert [n.concept for n in names[:4]] == ["edema", "nodule", "pacemaker", "rotation"]
    assert [n.kind for n in names[:4]] == ["finding", "finding", "device", "position"]
    assert names[4].status == "no shared concept"
    assert names[4].concept == ""


def test_vocabularies_are_whole() -> None:
    chest = load_vocabulary("chest")
    assert len(chest.terms) > 100
    assert set(chest.kinds) == {"finding", "anatomy", "device", "position", "image quality", "other"}
    from medsae.encoders.phantom_text import concept_vocabulary

    assert set(load_vocabulary("phantom").terms) == set(concept_vocabulary())
    with pytest.raises(ConfigError, match="twice"):
        parse_vocabulary("x", "edema\nEdema")
    with pytest.raises(ConfigError, match="unknown kind"):
        parse_vocabulary("x", "[mood]\nedema")
    with pytest.raises(ConfigError, match="chest"):
        load_vocabulary("no-such")

    class Own:
        def concept_vocabulary(self) -> dict[str, str]:
            return {"edema": "a radiograph with edema", "nodule": "a radiograph with a nodule"}

    own = load_vocabulary("auto", Own())
    assert own.texts[0] == "a radiograph with edema"
    assert own.kinds == ("other", "other")
    assert load_vocabulary("auto", object()).name == "chest"


def test_a_label_name_carries_its_figures() -> None:
    figures = {"top_label": "Edema", "top_r": 0.61, "r_Edema": 0.61, "r_Pneumonia": -0.2, "entropy": 0.4, "frequency": 0.031}
    name = LabelNamer().name_one(Subject(7, figures))
    assert (name.concept, name.status, name.kind) == ("Edema", "ok", "finding")
    assert "r +0.61 with Edema" in name.description
    assert "active on 3.1 % of images" in name.description
    none = LabelNamer().name_one(Subject(8, {"top_label": None, "top_r": math.nan}))
    assert (none.concept, none.status) == ("", "no correlation is defined")
    table = names_table([none, name])
    assert table.schema == NAME_SCHEMA
    assert table["neuron"].to_pylist() == [7, 8]
    assert json.loads(table["evidence"][0].as_py())["r"]["Edema"] == 0.61


@pytest.mark.parametrize(("a", "b"), [("Pleural effusions", "effusion, pleural"), ("Edema of the lung", "lung edema"), ("A pacemaker", "pacemaker")])
def test_the_same_name_in_other_words_is_one(a: str, b: str) -> None:
    assert canonical(a) == canonical(b)


@given(st.lists(st.sampled_from(["edema", "Edemas", "nodule", "chest radiograph", "left pacemaker"]), max_size=20))
def test_groups_cover_every_neuron_once(concepts: list[str]) -> None:
    found = group_names(list(enumerate(concepts)))
    shared = [n for g in found["shared"] for n in g["neurons"]]
    assert len(shared) == len(set(shared))
    alone = len(concepts) - len(shared)
    assert found["distinct"] == alone + len(found["shared"])
    assert found["unique"] == (alone / len(concepts) if concepts else None)
    assert found["say_nothing"] == [i for i, c in enumerate(concepts) if c == "chest radiograph"]


def test_names_that_say_nothing() -> None:
    assert says_nothing("Normal chest X-ray findings")
    assert not says_nothing("Normal heart")


def test_images_are_shrunk_kept_and_read_once(tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((300, 200)).save(tmp_path / "a.png")
    store = ImageStore(str(tmp_path), 100, keep=1)
    url = store.get("a.png")
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == (100, 67)
    (tmp_path / "a.png").unlink()
    assert store.get("a.png") == url
    with pytest.raises(DataError, match="missing"):
        store.get("b.png")


@pytest.mark.parametrize(
    "path",
    [
        "../a.png",
        "/etc/hostname",
        "x/../../a.png",
        "http://127.0.0.1/a.png",
        "file:///etc/hostname",
        "..\\a.png",
        "data:image/png;base64,!!",
        "data:x",
    ],
)
def test_requests_reach_nothing_outside_the_root(tmp_path: Path, path: str) -> None:
    (tmp_path / "root").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "root" / "in.png")
    images = RequestImages(64, ImageStore(str(tmp_path / "root"), 64))
    with pytest.raises(DataError):
        images.get(path)
    assert images.get("in.png").startswith("data:image/jpeg")
    assert images.get(data_url(Image.new("L", (8, 8)), 64)).startswith("data:image/jpeg")
    with pytest.raises(DataError, match="no data root"):
        RequestImages(64, None).get("in.png")


def test_answers_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    with AnswerLog(run, "a") as log:
        log.append("k1", {"v": 1})
        log.append("k2", {"v": 2})
        # Readable before the log is closed: a kill would lose nothing.
        assert set(AnswerLog(run, "a").read()) == {"k1", "k2"}
    file = next((tmp_path / "a").iterdir())
    file.write_text(file.read_text() + '{"key": "k3", "v"')
    with AnswerLog(run, "a") as log:
        assert {k: r["v"] for k, r in log.read().items()} == {"k1": 1, "k2": 2}
        log.append("k1", {"v": 9})
    assert AnswerLog(run, "a").read()["k1"]["v"] == 9
