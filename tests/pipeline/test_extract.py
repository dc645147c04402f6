"""The extract stage on a real Ray cluster: right, whole, resumable, exactly once."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medsae.artifacts import RunDir, read_embeddings
from medsae.config import RunConfig, validate_config
from medsae.data import radiograph
from medsae.data.manifest import read_manifest
from medsae.encoders import load_encoder
from medsae.errors import ConfigError, DataError, WeightsError
from medsae.pipeline.extract import plan_parts
from medsae.pipeline.stage import run_stage

pytestmark = pytest.mark.ray

HEADER = "Path,A,B,who"
TOY = "toy_encoders:Projection"


def write_images(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Images of several kinds, and a CSV; returns the rows."""
    rng = np.random.default_rng(seed)
    (folder / "i").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        pixels = rng.integers(0, 256, (40 + i % 7, 50), dtype=np.uint8)
        image = [Image.fromarray(pixels), Image.fromarray(np.stack([pixels] * 3, -1)), Image.fromarray(pixels.astype(np.uint16) * 256)][i % 3]
        image.save(folder / "i" / f"{i}.png")
        rows.append(f"i/{i}.png,{i % 2},{['', '-1', '0', '1'][i % 4]},p{i // 2}")
    return rows


def configuration(tmp_path: Path, rows: list[str], **encoder: object) -> RunConfig:
    (tmp_path / "train.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    return validate_config(
        {
            "run": str(tmp_path / "run"),
            "data": {"format": "csv", "root": str(tmp_path), "label_columns": ["A", "B"], "patient_column": "who"},
            "encoder": {"name": TOY, "rows_per_part": 10, **encoder},
        }
    )


def bad_files(folder: Path) -> list[str]:
    whole = io.BytesIO()
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(whole, "JPEG")
    (folder / "i" / "empty.png").write_bytes(b"")
    (folder / "i" / "cut.jpg").write_bytes(whole.getvalue()[:150])
    (folder / "i" / "text.png").write_text("not an image")
    return [f"i/{name},1,0,bad" for name in ("empty.png", "cut.jpg", "text.png", "missing.png")]


def test_embeddings_labels_rejects_and_duplicates(ray_cluster: None, tmp_path: Path) -> None:
    rows = write_images(tmp_path, 33)
    (tmp_path / "i" / "again.png").write_bytes((tmp_path / "i" / "4.png").read_bytes())
    config = configuration(tmp_path, [*rows[:15], *bad_files(tmp_path), *rows[15:], "i/again.png,1,1,other"])
    result = run_stage("extract", config)
    assert result is not None
    assert {k: result.counts[k] for k in ("images", "encoded", "resumed", "rejected", "duplicates", "parts")} == {
        "images": 38,
        "encoded": 38,
        "resumed": 0,
        "rejected": 4,
        "duplicates": 1,
        "parts": 4,
    }
    run = RunDir(config.run)
    found = read_embeddings(run)
    assert sorted(found.column("path")) == sorted([f"i/{i}.png" for i in range(33)] + ["i/again.png"])
    assert len(set(found.column("image_id"))) == len(found) == 34
    encoder = load_encoder(TOY)
    for path, x in zip(found.column("path"), found.x, strict=True):
        pixels = encoder.preprocess(radiograph.decode((tmp_path / path).read_bytes()))
        np.testing.assert_allclose(x, encoder.encode(pixels[None])[0], rtol=1e-5)
    by_path = dict(zip(found.column("path"), found.labels.tolist(), strict=True))
    assert [by_path[f"i/{i}.png"] for i in range(4)] == [[0, -2], [1, -1], [0, 0], [1, 1]]
    reasons = dict(run.read_table("rejects.parquet").select(["path", "reason"]).to_pandas().values)
    assert reasons == {
        "i/empty.png": "empty file",
        "i/cut.jpg": "truncated or damaged image",
        "i/missing.png": "file is missing",
        "i/text.png": reasons["i/text.png"],
    }
    [duplicate] = run.read_table("duplicates.parquet").to_pylist()
    assert duplicate["other_patient"] is True
    manifest = run.read_manifest()
    assert manifest["labels"] == ["A", "B"]
    assert manifest["encoder"]["name"] == TOY
    assert run_stage("extract", config) is None


def test_resume_makes_only_what_is_missing(ray_cluster: None, tmp_path: Path) -> None:
    config = configuration(tmp_path, write_images(tmp_path, 35))
    run_stage("extract", config)
    run = RunDir(config.run)
    before = {p: os.stat(run.path(p)).st_mtime_ns for p in run.list("embeddings", ".parquet")}
    content = {p: run.read_bytes(p) for p in before}
    run.delete("embeddings/part-00002.parquet")
    result = run_stage("extract", config)
    assert result is not None
    assert (result.counts["encoded"], result.counts["resumed"]) == (10, 25)
    for part in before:
        assert run.read_bytes(part) == content[part]
        assert (os.stat(run.path(part)).st_mtime_ns == before[part]) == (part != "embeddings/part-00002.parquet")


def test_other_images_or_settings_make_stale_parts_go(ray_cluster: None, tmp_path: Path) -> None:
    rows = write_images(tmp_path, 25)
    run_stage("extract", configuration(tmp_path, rows))
    fewer = configuration(tmp_path, rows[:13])
    result = run_stage("extract", fewer, force=True)
    assert result is not None
    assert (result.counts["encoded"], result.counts["resumed"]) == (3, 10)
    assert len(read_embeddings(RunDir(fewer.run))) == 13
    other = configuration(tmp_path, rows[:13], seed=5)
    result = run_stage("extract", other)
    assert result is not None
    assert result.counts["encoded"] == 13


def test_an_encoder_actor_that_dies_costs_nothing(ray_cluster: None, tmp_path: Path) -> None:
    rows = write_images(tmp_path, 60)
    config = configuration(tmp_path, rows, name="toy_encoders:DiesOnce", weights=str(tmp_path))
    run_stage("extract", config)
    assert (tmp_path / "died").exists()
    found = read_embeddings(RunDir(config.run))
    assert sorted(found.column("path")) == sorted(f"i/{i}.png" for i in range(60))
    assert len(set(found.column("image_id"))) == 60


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGKILL to the driver in the middle; the next run encodes the rest, and every image is there once."""
    rows = write_images(tmp_path, 120)
    config = configuration(tmp_path, rows, name="toy_encoders:Slow", rows_per_part=4)
    (tmp_path / "c.yaml").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "medsae.cli", "extract", str(tmp_path / "c.yaml")]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    embeddings = tmp_path / "run" / "embeddings"
    # Starting Ray and the encoder takes as long as the machine wants; the wait ends with the third part or with the run itself.
    while child.poll() is None and len(list(embeddings.glob("part-*.parquet"))) < 3:
        time.sleep(0.02)
    child.kill()
    child.wait()
    done = sum(pq.read_metadata(p).num_rows for p in embeddings.glob("part-*.parquet"))
    assert 0 < done < 120
    finished = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    found = read_embeddings(RunDir(config.run))
    assert sorted(found.column("path")) == sorted(f"i/{i}.png" for i in range(120))
    counts = RunDir(config.run).read_manifest()["stages"]["extract"]["counts"]
    assert counts["resumed"] >= done
    assert counts["encoded"] + counts["resumed"] == 120


def test_user_errors_are_one_line(ray_cluster: None, tmp_path: Path) -> None:
    rows = write_images(tmp_path, 5)
    cases: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"name": "toy_encoders:Broken"}, ConfigError, "not finite"),
        ({"name": "no-such-encoder"}, ConfigError, "not known"),
        ({"name": "medclip-resnet50", "weights": str(tmp_path / "none.bin")}, WeightsError, "does not exist"),
    ]
    for encoder, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            run_stage("extract", configuration(tmp_path, rows, **encoder))
        assert "\n" not in str(caught.value)


def test_only_unreadable_images_is_an_error(ray_cluster: None, tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    with pytest.raises(DataError, match="none of the 4 images"):
        run_stage("extract", configuration(tmp_path, bad_files(tmp_path)))


def test_parts_cover_the_manifest_in_order(tmp_path: Path) -> None:
    config = configuration(tmp_path, write_images(tmp_path, 23))
    manifest = read_manifest(config.data)
    parts = plan_parts(manifest, config.data, config.encoder)
    assert [p.table.num_rows for p in parts] == [10, 10, 3]
    assert [i for p in parts for i in p.table["image_id"].to_pylist()] == manifest.table["image_id"].to_pylist()
    assert len({p.plan for p in parts}) == 3
    faster = config.encoder.model_copy(update={"batch_size": 3, "actors": 7})
    assert [p.plan for p in plan_parts(manifest, config.data, faster)] == [p.plan for p in parts]
