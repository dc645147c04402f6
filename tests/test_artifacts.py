"""The run directory: atomic publishing, tables, embeddings; on a folder and on S3."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsae import artifacts
from medsae.artifacts import EMBEDDING_SCHEMA, RunDir, fingerprint, iter_embeddings, read_embeddings
from medsae.errors import ArtifactError


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket of a local S3 server, as a URI prefix."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_EC2_METADATA_DISABLED="true")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="runs")
    yield f"s3://runs/one?endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    if request.param == "folder":
        return RunDir(str(tmp_path / "run"))
    return RunDir(request.getfixturevalue("s3").replace("/one?", f"/{tmp_path.name}?"))


def table(n: int, seed: int = 0, d: int = 4) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "image_id": [f"{seed}-{i}" for i in range(n)],
            **{c: [f"{c}{i % 3}" for i in range(n)] for c in ("path", "patient_id", "study_id", "view", "projection", "sex")},
            "age": pa.array(np.full(n, 50), pa.float32()),
            "split": ["eval" if i % 3 == 0 else "train" for i in range(n)],
            "pixel_hash": ["h"] * n,
            "labels": rng.integers(-2, 2, (n, 2)).tolist(),
            "embedding": rng.normal(size=(n, d)).astype(np.float32).tolist(),
        },
        schema=EMBEDDING_SCHEMA,
    )


def test_bytes_json_and_listing(run: RunDir) -> None:
    digest = run.write_bytes("a/b.txt", b"x")
    assert digest == artifacts.sha256(b"x")
    run.write_bytes("a/b.txt", b"yy")
    assert run.read_bytes("a/b.txt") == b"yy"
    run.write_json("a/c.json", {"k": [1, None]})
    assert run.read_json("a/c.json") == {"k": [1, None]}
    assert run.list("a") == ["a/b.txt", "a/c.json"]
    assert run.list("a", ".json") == ["a/c.json"]
    assert run.list("nothing") == []
    assert run.folders("") == ["a"]
    run.delete("a/b.txt")
    run.delete("a/b.txt")
    assert not run.exists("a/b.txt")
    assert run.exists("a/c.json")


def test_what_is_not_there_is_one_line(run: RunDir) -> None:
    for read in (run.read_bytes, run.read_table):
        with pytest.raises(ArtifactError, match="does not exist"):
            read("none")
    with pytest.raises(ArtifactError, match="no embeddings"):
        artifacts.embedding_parts(run)
    with pytest.raises(ArtifactError, match="names no labels"):
        artifacts.label_names(run)
    assert run.read_manifest() == {"schema": 1, "stages": {}}


def test_embeddings_round_trip(run: RunDir) -> None:
    run.write_manifest({"schema": 1, "stages": {}, "labels": ["A", "B"]})
    tables = [table(7, 0), table(0, 1), table(5, 2)]
    for i, t in enumerate(tables):
        run.write_table(f"embeddings/part-{i:05d}.parquet", t)
    run.write_table("embeddings/.hidden.parquet", tables[0])
    whole = read_embeddings(run)
    everything = pa.concat_tables(tables)
    np.testing.assert_array_equal(whole.x, np.array(everything["embedding"].to_pylist(), np.float32))
    np.testing.assert_array_equal(whole.labels, np.array(everything["labels"].to_pylist(), np.int8))
    assert whole.label_names == ["A", "B"]
    assert whole.column("image_id").tolist() == everything["image_id"].to_pylist()
    train = read_embeddings(run, "train")
    assert set(train.column("split")) == {"train"}
    assert sum(len(p) for p in iter_embeddings(run, "train")) == len(train) == 7
    np.testing.assert_array_equal(np.concatenate([p.x for p in iter_embeddings(run) if len(p)]), whole.x)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    run.write_bytes("f", b"old")
    with pytest.raises(TypeError):
        run.write_bytes("f", object())  # type: ignore[arg-type]
    assert run.read_bytes("f") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_run_that_cannot_be_opened_is_one_line() -> None:
    with pytest.raises(ArtifactError, match="cannot be opened") as caught:
        RunDir("nosuch://place/x")
    assert "\n" not in str(caught.value)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=6))
def test_fingerprint_ignores_key_order(value: dict[str, object]) -> None:
    assert fingerprint(value) == fingerprint(dict(reversed(value.items())))


def test_nan_never_reaches_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        RunDir(str(tmp_path)).write_json("x.json", {"a": float("nan")})


def test_a_relative_run_keeps_its_place_when_it_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train's workers run in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    packed = pickle.dumps(RunDir("runs/x"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(packed).path("a") == str(tmp_path / "runs/x/a")
