"""The fit stage: bad input in one line, training on Ray Train with one worker and two, the loss of a worker, divergence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medsae.artifacts import EMBEDDING_SCHEMA, RunDir, read_embeddings
from medsae.config import RunConfig, validate_config
from medsae.errors import ConfigError, DataError, MedSAEError
from medsae.pipeline import fit, stream
from medsae.sae import SAE, load
from medsae.sae.config import FitConfig, SAEConfig
from medsae.sae.data import fit_scaling, geometric_median
from medsae.sae.model import fold
from medsae.sae.training import Trainer, train

D, N = 10, 240


def embeddings(n: int = N) -> np.ndarray:
    rng = np.random.default_rng(1)
    code = rng.uniform(0.5, 1.5, (n, 16)) * (rng.random((n, 16)) < 0.15)
    return (code @ rng.normal(size=(16, D)) + 3 * rng.normal(size=D)).astype(np.float32)


def make_run(folder: Path, x: np.ndarray | None = None, splits: tuple[str, ...] = ("train", "train", "train", "eval"), dim: int = D) -> RunDir:
    x = embeddings() if x is None else x
    run, n = RunDir(str(folder)), len(x)
    columns: dict[str, Any] = {field.name: [""] * n for field in EMBEDDING_SCHEMA}
    columns |= {"image_id": [f"{i:016x}" for i in range(n)], "age": [60.0] * n, "split": [splits[i % len(splits)] for i in range(n)]}
    columns |= {"labels": [[1, 0]] * n, "embedding": list(x)}
    table = pa.table(columns, schema=EMBEDDING_SCHEMA)
    run.write_table("embeddings/part-00000.parquet", table.slice(0, n // 2))
    run.write_table("embeddings/part-00001.parquet", table.slice(n // 2))
    run.write_manifest(
        {"schema": 1, "stages": {}, "labels": ["a", "b"], "encoder": {"name": "test", "dim": dim, "trained": False, "notice": "stand-in"}}
    )
    return run


SAES: list[dict[str, Any]] = [
    {"architecture": "standard", "dict_size": 32, "epochs": 6, "batch_size": 48, "l1": 0.5},
    {"architecture": "batch_topk", "dict_size": 32, "k": 4, "epochs": 4, "batch_size": 48},
    {"architecture": "jumprelu", "dict_size": 24, "epochs": 4, "batch_size": 60},
]


def config(run: RunDir, saes: list[dict[str, Any]] | None = None, **ray: Any) -> RunConfig:
    return validate_config({"run": run.uri, "seed": 4, "sae": SAES if saes is None else saes, "ray": ray})


def trained_here(run: RunDir, sae: dict[str, Any]) -> tuple[Trainer, SAE]:
    """What one process gives, without Ray."""
    x = read_embeddings(run, "train").x
    scaling = fit_scaling(x)
    inputs = scaling.apply(x)
    trainer = Trainer(SAEConfig(**sae), D, len(x), 4, geometric_median(inputs[np.random.default_rng(4).permutation(len(x))]))
    train([trainer], torch.from_numpy(inputs), 4)
    return trainer, fold(*trainer.sae.export(), scaling, {})


# --- before any training ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.where(np.arange(N)[:, None] == 8, np.nan, embeddings())}, "1 of 180 embeddings hold NaN"),
        ({"dim": 512}, "embeddings are 10 wide and the encoder of the manifest is 512 wide"),
        ({"splits": ("eval",)}, "0 embeddings are too few"),
        ({"x": np.ones((N, D), np.float32)}, "all 180 embeddings are alike"),
        ({"x": [np.ones(3 + i % 2, np.float32) for i in range(N)]}, "differ in width"),
    ],
)
def test_bad_embeddings_stop_with_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run = make_run(tmp_path, **change)
    with pytest.raises(DataError, match=message) as caught:
        fit.run(config(run), run)
    assert "\n" not in str(caught.value)


def test_a_dictionary_that_cannot_fit_is_refused() -> None:
    huge = [SAEConfig(dict_size=2**22, name="huge")]
    with pytest.raises(ConfigError, match=r"training needs about .* GiB .* huge 4194304.* lower dict_size") as caught:
        fit.check_memory(huge, (1000, 65536), torch.device("cpu"), 1)
    assert "\n" not in str(caught.value)
    fit.check_memory([SAEConfig(dict_size=1024)], (1000, 128), torch.device("cpu"), 1)


# --- streamed from the parts -----------------------------------------------------------------------------------------------------------------------


def many_parts(folder: Path, sizes: tuple[int, ...] = (60, 20, 75, 45, 40)) -> RunDir:
    """The run of `make_run` in parts of unequal sizes, one of which has no sample of the training split."""
    run = make_run(folder)
    table = pa.concat_tables([run.read_table(path) for path in run.list("embeddings")])
    split = table["split"].to_pylist()
    split[60:80] = ["eval"] * 20
    table = table.set_column(table.schema.get_field_index("split"), "split", pa.array(split))
    for index, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
        run.write_table(f"embeddings/part-{index:05d}.parquet", table.slice(int(end) - size, size))
    return run


class Local:
    """A streamed source without Ray: the same windows, read by the same code in this process."""

    def __init__(self, given: stream.Stream) -> None:
        self.given, self.samples, self.dim, self.plan = given, given.samples, given.dim, given.plan

    def batches(self, seed: int, epoch: int, batch_size: int, rank: int, world: int) -> Iterator[torch.Tensor]:
        for window in self.given.order.windows(seed, epoch, batch_size, rank, world):
            payload = np.frombuffer(stream.read_window(window, self.given, seed), np.float32)
            yield from torch.from_numpy(payload.reshape(window.steps, -1, self.dim).copy())

    def shares(self, rank: int, world: int) -> Iterator[torch.Tensor]:
        yield from ()


@pytest.mark.ray
def test_a_survey_of_the_parts_gives_what_the_whole_gives(tmp_path: Path, ray_cluster: None) -> None:
    run = many_parts(tmp_path)
    x = read_embeddings(run, "train").x
    found = stream.survey(run, "here", D, 4, 64, 8)
    whole = fit.hold(run, "here", D, 4)
    assert found.samples == len(x) == whole.samples
    assert found.order.counts[1] == 0
    assert found.scaling.scale == pytest.approx(whole.scaling.scale, rel=1e-13)
    np.testing.assert_allclose(found.scaling.mean, whole.scaling.mean, rtol=1e-13)
    np.testing.assert_allclose(found.center, whole.center, atol=1e-6)
    source = found.open(torch.device("cpu"))
    torch.testing.assert_close(torch.cat(list(source.shares(0, 1))), torch.from_numpy(whole.inputs), rtol=0, atol=1e-6)
    # Through Ray Data in the order that is due; two workers share what one sees.
    batches = [b.clone() for b in source.batches(4, 1, 48, 0, 1)]
    assert [torch.equal(a, b) for a, b in zip(batches, Local(found).batches(4, 1, 48, 0, 1), strict=True)] == [True] * source.plan(48)[0]
    assert all(torch.equal(a, b[1::2]) for a, b in zip(source.batches(4, 1, 48, 1, 2), batches, strict=True))


@pytest.mark.ray
@pytest.mark.slow
def test_streamed_training_on_two_workers_gives_what_one_process_gives(tmp_path: Path, ray_cluster: None) -> None:
    run = many_parts(tmp_path)
    c = validate_config({**config(run, SAES[1:2], train_workers=2).model_dump(mode="json"), "fit": {"hold_gb": 0, "window": 64}})
    result = fit.run(c, run)
    given = stream.survey(run, "here", D, 4, 64, 8)
    trainer = Trainer(c.sae[0], D, given.samples, 4, given.center, plan=given.plan(48))
    train([trainer], Local(given), 4)
    there, here = load((run, "batch_topk")), fold(*trainer.sae.export(), given.scaling, {})
    for key, value in here.tensors.items():
        torch.testing.assert_close(there.tensors[key], value, rtol=1e-4, atol=2e-5)
    assert there.metadata["order"] == "streamed, shuffled in windows of 64 samples"
    (row,) = result.counts["frontier"]
    x = read_embeddings(run, "train").x
    code = there.encode(x)
    fvu = ((x - there.decode(code)).astype(np.float64) ** 2).sum() / ((x - x.mean(0, dtype=np.float64)) ** 2).sum()
    assert row["fvu"] == pytest.approx(fvu, rel=1e-3)
    assert row["dead_share"] == pytest.approx(1 - (code > 0).any(0).mean(), abs=1e-6)


@pytest.mark.ray
def test_bad_embeddings_that_are_streamed_stop_with_one_line(tmp_path: Path, ray_cluster: None) -> None:
    whole = embeddings()
    for index, (change, message) in enumerate(
        [
            ({"x": np.where(np.arange(N)[:, None] == 8, np.nan, whole)}, "1 of 180 embeddings hold NaN"),
            ({"x": [np.ones(3 + i % 2, np.float32) for i in range(N)]}, "part-00000.parquet: embeddings differ in width"),
            ({"x": [np.ones(3 + (i >= N // 2), np.float32) for i in range(N)]}, "embeddings are 3 and 4 wide"),
            ({"splits": ("eval",)}, "0 embeddings are too few"),
        ]
    ):
        run = make_run(tmp_path / str(index), **change)
        with pytest.raises(DataError, match=message) as caught:
            stream.survey(run, "here", None, 4, 64, 8)
        assert "\n" not in str(caught.value)
    run = make_run(tmp_path / "few")
    c = validate_config({"run": run.uri, "sae": SAES, "fit": {"hold_gb": 0}, "ray": {"train_workers": 4}})
    with pytest.raises(ConfigError, match="train_workers = 4 of 4 CPUs leave none to read"):
        fit.run(c, run)


def test_what_is_streamed_follows_the_size_of_the_files(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    size = sum((tmp_path / path).stat().st_size for path in run.list("embeddings"))
    for limit, streamed in ((size / 2**30 - 1e-7, True), (size / 2**30, False), (None, False)):
        assert fit.is_streamed(validate_config({"run": run.uri, "fit": {"hold_gb": limit}}), run) is streamed


def test_saes_are_dealt_by_their_work() -> None:
    sizes = {"a": 64, "b": 512, "c": 256, "d": 256, "e": 32}
    saes = [SAEConfig(name=name, dict_size=size) for name, size in sizes.items()]
    assert [[s.name for s in group] for group in fit.deal(saes, 2)] == [["b", "a"], ["c", "d", "e"]]
    assert [len(group) for group in fit.deal(saes, 9)] == [1] * 5


# --- on Ray Train ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "parallel"), [(1, 1), (2, 1), (1, 2)])
def test_stage_gives_what_one_process_gives(tmp_path: Path, ray_cluster: None, workers: int, parallel: int) -> None:
    run = make_run(tmp_path)
    c = config(run, train_workers=workers)
    result = fit.run(c.model_copy(update={"fit": FitConfig(trackers=("tensorboard",), parallel=parallel)}), run)
    files = {
        f"sae/{name}/{file}" for name in ("standard", "batch_topk", "jumprelu") for file in ("cfg.json", "sae_weights.safetensors", "training.jsonl")
    }
    assert set(result.outputs) == files | {"sae/frontier.json"}
    assert all(run.exists(path) for path in result.outputs)
    assert run.folders("sae") == sorted({"standard", "batch_topk", "jumprelu"})  # nothing of Ray Train is left
    frontier = run.read_json("sae/frontier.json")
    assert frontier == result.counts["frontier"]
    x = read_embeddings(run, "train").x
    for row, sae in zip(frontier, SAES, strict=True):
        trainer, here = trained_here(run, sae)
        there = load((run, row["name"]))
        assert row["steps"] == trainer.steps
        for key, value in here.tensors.items():
            torch.testing.assert_close(there.tensors[key], value, rtol=1e-4, atol=2e-5)
        code = there.encode(x)
        fvu = ((x - there.decode(code)).astype(np.float64) ** 2).sum() / ((x - x.mean(0, dtype=np.float64)) ** 2).sum()
        assert row["fvu"] == pytest.approx(fvu, rel=1e-3)
        assert row["l0"] == pytest.approx((code > 0).sum(1).mean(), rel=1e-3)
        assert row["dead_share"] == pytest.approx(1 - (code > 0).any(0).mean(), abs=1e-6)
        assert there.metadata["encoder"]["notice"] == "stand-in"
        lines = run.read_bytes(f"sae/{row['name']}/training.jsonl").decode().splitlines()
        assert len(lines) == sae["epochs"]
        events = EventAccumulator(run.path(f"tensorboard/{row['name']}")).Reload()
        assert [e.step for e in events.Scalars("fvu")] == [json.loads(line)["step"] for line in lines]


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_goes_on_from_the_last_checkpoint(tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    saes = [{**SAES[1], "epochs": 10, "checkpoints": 5}]

    def dies_once(arguments: dict[str, Any]) -> dict[str, Any]:
        """The real worker, killed in the middle of its 7th epoch the first time; notes at which step each life begins."""
        import os
        import signal

        from medsae.pipeline.fit import train_worker
        from medsae.sae.training import Trainer

        step, folder = Trainer.step, str(deaths)

        def watched(self: Trainer, x: torch.Tensor) -> None:
            name = os.path.join(folder, str(os.getpid()))
            if not os.path.exists(name):
                with open(name, "w") as file:
                    file.write(str(self.step_count))
            if self.step_count == 6 * self.steps_per_epoch + 2 and len(os.listdir(folder)) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self, x)

        Trainer.step = watched  # type: ignore[method-assign]
        try:
            return train_worker(arguments)
        finally:
            Trainer.step = step  # type: ignore[method-assign]

    real = fit.fit_on_ray
    monkeypatch.setattr(fit, "fit_on_ray", lambda *given: real(*given, dies_once))
    fit.run(config(run, saes), run)
    first, second = sorted(int((deaths / name).read_text()) for name in os.listdir(deaths))
    # Checkpoints at 2, 4 and 6 epochs of 4 steps; the controller may not have registered the last before the worker died.
    assert first == 0
    assert second in (16, 24)
    trainer, here = trained_here(run, saes[0])
    there = load((run, "batch_topk"))
    for key, value in here.tensors.items():
        torch.testing.assert_close(there.tensors[key], value, rtol=1e-4, atol=2e-5)
    assert len(run.read_bytes("sae/batch_topk/training.jsonl").decode().splitlines()) == len(trainer.log)


@pytest.mark.ray
@pytest.mark.slow
def test_divergence_is_one_line_and_keeps_the_checkpoint(tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)

    def poisoned(arguments: dict[str, Any]) -> dict[str, Any]:
        from medsae.pipeline.fit import train_worker
        from medsae.sae.training import Trainer

        step = Trainer.step

        def nan_in_the_third_epoch(self: Trainer, x: torch.Tensor) -> None:
            step(self, x * float("nan") if self.epoch == 2 else x)

        Trainer.step = nan_in_the_third_epoch  # type: ignore[method-assign]
        try:
            return train_worker(arguments)
        finally:
            Trainer.step = step  # type: ignore[method-assign]

    real = fit.fit_on_ray
    monkeypatch.setattr(fit, "fit_on_ray", lambda *given: real(*given, poisoned))
    with pytest.raises(MedSAEError, match=r"sae batch_topk: .* at step 8 .* lower lr") as caught:
        fit.run(config(run, [SAES[1]]), run)
    assert "\n" not in str(caught.value)
    kept = [path for folder in run.folders(fit.SCRATCH) for path in run.folders(f"{fit.SCRATCH}/{folder}") if "checkpoint_" in path]
    assert kept


@pytest.mark.ray
def test_more_workers_than_the_cluster_has_are_refused(tmp_path: Path, ray_cluster: None) -> None:
    run = make_run(tmp_path)
    with pytest.raises(ConfigError, match=r"ray.train_workers = 64, but the cluster has \d+ CPUs"):
        fit.run(config(run, train_workers=64), run)
