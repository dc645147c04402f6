"""The measure stage on a made-up run directory, against numpy on the whole matrix."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from medsae.artifacts import EMBEDDING_SCHEMA, RunDir, read_embeddings
from medsae.config import RunConfig, validate_config
from medsae.data.manifest import image_id_of
from medsae.errors import ArtifactError, ConfigError
from medsae.metrics.features import LinearFeatures
from medsae.metrics.labels import apply_policy, balanced_subset
from medsae.metrics.targets import image_keys
from medsae.pipeline import measure

LABELS = ["Edema", "Pleural Effusion", "Support Devices"]
N, D = 360, 12


def write_run(folder: Path, n: int = N, parts: int = 5, split: str | None = None, seed: int = 0) -> RunDir:
    """A run directory with random embeddings whose first coordinates carry the labels."""
    rng = np.random.default_rng(seed)
    run = RunDir(str(folder))
    patients = np.array([f"p{i // 2}" for i in range(n)])
    labels = rng.choice([1, 0, -1, -2], p=[0.25, 0.3, 0.1, 0.35], size=(n, len(LABELS))).astype(np.int8)
    x = rng.standard_normal((n, D)).astype(np.float32) + 1
    x[:, : len(LABELS)] += 1.5 * (labels == 1)
    paths = [f"patient{i:05d}/view1.png" for i in range(n)]
    ids = [image_id_of(p) for p in paths]
    table = pa.table(
        {
            "image_id": ids,
            "path": paths,
            "patient_id": patients,
            "study_id": [f"{p}/s1" for p in patients],
            "view": rng.choice(["frontal", "lateral"], n),
            "projection": rng.choice(["AP", "PA", ""], n),
            "sex": rng.choice(["F", "M", ""], n),
            "age": rng.uniform(20, 90, n).astype(np.float32),
            "split": [split or ("eval" if int(p[1:]) % 3 else "train") for p in patients],
            "pixel_hash": ids,
            "labels": list(labels),
            "embedding": list(x),
        },
        schema=EMBEDDING_SCHEMA,
    )
    bounds = np.linspace(0, n, parts + 1).astype(int)
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        run.write_table(f"embeddings/part-{i:05d}.parquet", table.slice(a, b - a))
    run.write_manifest({"schema": 1, "labels": LABELS, "encoder": {"name": "none", "dim": D, "trained": False, "notice": "random"}, "stages": {}})
    return run


def config_for(run: RunDir, **measure: object) -> RunConfig:
    return validate_config(
        {
            "run": run.uri,
            "measure": {"permutations": 20, "bootstrap": 200, "baselines": ["pca"], **measure},
            "sae": [{"name": "standard", "dict_size": 40}],
        }
    )


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> LinearFeatures:
    """A ReLU dictionary in the place of a trained SAE, handed to the tasks."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((D, 40))
    made = LinearFeatures(weight, np.full(D, 1.0), 0.05 * weight.T, relu=True)
    original = measure.measure_one

    def with_features(plan: Any, shared: Any, images: Any, name: str, given: Any, *rest: Any) -> Any:
        return original(plan, shared, images, name, made if name == "standard" else given, *rest)

    monkeypatch.setattr(measure, "measure_one", with_features)
    return made


@pytest.mark.ray
def test_artifacts_equal_numpy_on_the_whole_matrix(tmp_path: Path, ray_cluster: None, features: LinearFeatures) -> None:
    run = write_run(tmp_path)
    result = measure.run(config_for(run), run)
    data = read_embeddings(run, "eval")
    y = apply_policy(data.labels, "zeros", "negative")
    for name, z in (("raw", data.x), ("standard", features.encode(data.x))):
        z = z.astype(np.float64)
        neurons = run.read_table(f"measure/{name}/neurons.parquet").to_pandas()
        r = np.corrcoef(z.T, y.T)[: z.shape[1], z.shape[1] :]
        got = neurons[[f"r_{label}" for label in LABELS]].to_numpy()
        np.testing.assert_allclose(got, r, atol=1e-9)
        np.testing.assert_allclose(neurons["mean"], z.mean(0), atol=1e-12)
        np.testing.assert_array_equal(neurons["n_active"], (z > 0).sum(0))
        summary = run.read_json(f"measure/{name}/summary.json")
        assert summary["n_images"] == len(data)
        for c, label in enumerate(LABELS):
            assert summary["paper_table"][label]["neuron"] == r[:, c].argmax()
            assert summary["label_counts"][label]["positive"] == y[:, c].sum()
        assert summary["probing"]["linear_features"]["mean"] > 0.7
        assert ("linear_reconstruction" in summary["probing"]) == (name == "standard")
        exemplars = run.read_table(f"measure/{name}/exemplars.parquet").to_pandas()
        top = exemplars[(exemplars.neuron == 3) & (exemplars["rank"] == 0)].iloc[0]
        assert top.image_id == data.column("image_id")[z[:, 3].argmax()]
    files = {f"measure/{n}/{f}" for n in ("raw", "standard", "baseline-pca") for f in ("neurons.parquet", "summary.json", "exemplars.parquet")}
    assert set(result.outputs) == files | {"measure/headline.json"}
    headline = run.read_json("measure/headline.json")
    assert (headline["name"], headline["baseline"]) == ("standard", "raw")
    assert [(c["name"], c["baseline"]) for c in headline["comparisons"]] == [
        ("baseline-pca", "raw"),
        ("standard", "raw"),
        ("standard", "baseline-pca"),
    ]
    assert headline["correlation"]["low"] <= headline["correlation"]["value"] <= headline["correlation"]["high"]
    standard = run.read_json("measure/standard/summary.json")
    residual = data.x - features.decode(features.encode(data.x))
    centred = data.x.astype(np.float64) - data.x.astype(np.float64).mean(0)
    assert standard["fvu"] == pytest.approx((residual.astype(np.float64) ** 2).sum() / (centred**2).sum(), rel=1e-9)
    assert run.read_json("measure/raw/summary.json")["fvu"] is None


@pytest.mark.ray
def test_the_papers_subset_labels_and_uncertain_entries(tmp_path: Path, ray_cluster: None, features: LinearFeatures) -> None:
    run = write_run(tmp_path / "run")
    rng = np.random.default_rng(1)
    sites = rng.choice(["A", "B", ""], N)
    (tmp_path / "list.csv").write_text("file,site\n" + "".join(f"patient{i:05d}/view1.png,{sites[i]}\n" for i in range(N)))
    config = config_for(run, labels=["Support Devices", "Edema"], balanced=30, split="all", baselines=[])
    data_config = {
        "root": str(tmp_path),
        "format": "csv",
        "csv": ["list.csv"],
        "path_column": "file",
        "confound_columns": ["site"],
        "uncertain": "keep",
    }
    measure.run(config.model_copy(update={"data": config.data.model_copy(update=data_config)}), run)
    data = read_embeddings(run)
    chosen = np.isin(image_keys(data.column("image_id")), balanced_subset(image_keys(data.column("image_id")), data.labels[:, [2, 0]], 30, 0))
    raw = data.labels[chosen][:, [2, 0]]
    y = np.where(raw == -2, 0.0, raw)
    summary = run.read_json("measure/standard/summary.json")
    assert summary["n_images"] == chosen.sum() < N
    assert summary["label_counts"]["Edema"] == {"positive": (raw[:, 1] == 1).sum(), "negative": (raw[:, 1] != 1).sum(), "ignored": 0}
    assert summary["label_counts"]["Edema"]["positive"] >= 30
    z = features.encode(data.x[chosen]).astype(np.float64)
    neurons = run.read_table("measure/standard/neurons.parquet").to_pandas()
    got = neurons[["r_Support Devices", "r_Edema"]].to_numpy()
    np.testing.assert_allclose(got, np.corrcoef(z.T, y.T)[: z.shape[1], z.shape[1] :], atol=1e-9)
    known = sites[chosen] != ""
    site = np.corrcoef(z[known].T, sites[chosen][known] == "A")[:-1, -1]
    np.testing.assert_allclose(neurons["confound_site=A"], site, atol=1e-9)
    np.testing.assert_allclose(neurons["confound_site=B"], -site, atol=1e-9)
    confounds = neurons[[f"confound_{c}" for c in summary["confounds"]]].abs()
    np.testing.assert_array_equal(neurons["confounded"], confounds.max(axis=1) > np.abs(got).max(1))
    assert "r_Pleural Effusion" not in neurons
    with pytest.raises(ConfigError, match=r"measure\.labels: no label 'Nothing' in the run"):
        measure.run(config_for(run, labels=["Nothing"]), run)


@pytest.mark.ray
def test_phantom_truth_gives_a_calibration(tmp_path: Path, ray_cluster: None, features: LinearFeatures) -> None:
    run = write_run(tmp_path / "run")
    root = tmp_path / "phantoms"
    root.mkdir()
    rng = np.random.default_rng(0)
    data = read_embeddings(run)
    severity = np.where(data.labels[:, 0] == 1, rng.uniform(0.3, 1, N), 0.0)
    lines = ["Path,cardiomegaly,effusion_left,effusion_right,central_line,endotracheal_tube,ecg_leads,exposure,marker,sex"]
    lines += [
        f"phantoms/patient{i:05d}/view1.png,{severity[i]:.4f},{max(0, data.x[i, 5] - 2):.4f},0,{i % 2},0,{i % 3 // 2},{data.x[i, 6]:.4f},L,{'Female' if data.x[i, 7] < 0 else 'Male'}"
        for i in range(N)
    ]
    (root / "truth.csv").write_text("\n".join(lines) + "\n")
    config = config_for(run)
    measure.run(config.model_copy(update={"data": config.data.model_copy(update={"root": str(root)})}), run)
    raw = run.read_json("measure/raw/calibration.json")
    found = {f["name"]: f for f in raw["findings"]}
    assert set(found) == {"cardiomegaly", "effusion", "central_line", "endotracheal_tube", "ecg_leads"}
    assert found["cardiomegaly"]["neurons"] == [0, 0]
    assert found["effusion"]["neurons"] == [5, 5]
    assert found["effusion"]["found"]
    assert found["effusion"]["auroc"] == pytest.approx(1.0)
    nuisances = {f["name"]: f for f in raw["nuisances"]}
    assert set(nuisances) == {"exposure", "female"}
    assert nuisances["exposure"]["neurons"] == [6, 6]
    assert (nuisances["female"]["neurons"], nuisances["female"]["signs"]) == ([7, 7], [-1, -1])
    assert nuisances["female"]["auroc"] == pytest.approx(1.0)
    # Any of the lines is in more images than the most frequent of them.
    lines_positive = next(f["positive"] for f in raw["sides"] if f["name"] == "lines")
    assert lines_positive > max(found[name]["positive"] for name in ("central_line", "endotracheal_tube", "ecg_leads"))
    versus = run.read_json("measure/standard/calibration.json")["versus_raw"]
    assert versus["findings"] == 4  # all but the central line, which no image has
    # Tubes and leads are chance for both; what the features carry, the SAE does not carry better.
    assert all(versus["by_finding"][name]["auroc"] <= 0 for name in ("cardiomegaly", "effusion"))


@pytest.mark.ray
def test_an_empty_split_is_one_line(tmp_path: Path, ray_cluster: None) -> None:
    run = write_run(tmp_path, n=20, parts=1, split="train")
    with pytest.raises(ArtifactError, match="no image in the split 'eval'"):
        measure.run(config_for(run), run)
