"""fit: trains the sparse autoencoders of a run with Ray Train, all in one pass over shared batches."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from medsae.artifacts import RunDir, fingerprint, read_embeddings
from medsae.config import RunConfig
from medsae.errors import MedSAEError
from medsae.pipeline.cluster import cluster_gpus, ray_session
from medsae.pipeline.stage import StageResult
from medsae.progress import progress
from medsae.sae.checkpoint import save
from medsae.sae.collective import Collective
from medsae.sae.config import SAEConfig
from medsae.sae.data import Scaling, check_embeddings, fit_scaling, geometric_median
from medsae.sae.model import fold, reconstruction
from medsae.sae.training import Trainer, train

SCRATCH = "sae/.train"
"""Ray Train's storage in the run directory: training checkpoints, removed on success."""
STATE = "trainers.pt"
MAX_FAILURES = 3
"""Restarts from the last checkpoint after the loss of a worker."""
MEDIAN_ROWS = 32768


def run(config: RunConfig, run: RunDir) -> StageResult:
    """Trains every autoencoder of `config.sae` on the split `train` and publishes it under `sae/NAME`.

    Raises:
        MedSAEError: embeddings that cannot be trained on, a dictionary that cannot fit, or training that diverged.
    """
    embeddings = read_embeddings(run, "train")
    where = run.path("embeddings") + " (split train)"
    check_embeddings(embeddings.x, where, run.read_manifest().get("encoder", {}).get("dim"))
    x = embeddings.x
    scaling = fit_scaling(x, where)
    inputs = scaling.apply(x)
    center = geometric_median(inputs[np.random.default_rng(config.seed).permutation(len(x))[:MEDIAN_ROWS]])
    name = fingerprint([hashlib.sha256(inputs.data).hexdigest(), config.seed, [s.model_dump(mode="json") for s in config.sae]])
    encoder = run.read_manifest().get("encoder", {})
    with ray_session(config.ray):
        gpus = cluster_gpus(config.ray)
        arguments = {
            "inputs": [ray.put(inputs)],
            "scaling": scaling,
            "center": center,
            "saes": [s.model_dump(mode="json") for s in config.sae],
            "seed": config.seed,
            "run": run,
            "metadata": {"encoder": encoder, "scale": scaling.scale, "training_samples": len(x), "seed": config.seed},
        }
        result = _fit(arguments, name, run, config.ray.train_workers, gpus)
    if "error" in result:
        raise MedSAEError(result["error"])
    run.delete(SCRATCH)
    counts: dict[str, Any] = {"samples": len(x), "width": x.shape[1], "saes": len(config.sae), "train_seconds": result["seconds"]}
    counts["results"] = result["results"]
    return StageResult(counts=counts, outputs=result["outputs"])


def _fit(arguments: dict[str, Any], name: str, run: RunDir, workers: int, gpus: int) -> dict[str, Any]:
    """One Ray Train run; returns what rank 0 returned. The same name finds the checkpoints of an interrupted run."""
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=arguments,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpus > 0),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=run.path(SCRATCH),
            storage_filesystem=run.fs,
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    returned = trainer.fit().return_value
    assert isinstance(returned, dict)
    return returned


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs: trains from the last checkpoint to the end, publishes, returns figures or an error line."""
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    collective = Collective()
    x = _as_tensor(ray.get(arguments["inputs"][0])).to(device)
    seed, run = arguments["seed"], arguments["run"]
    configs = [SAEConfig.model_validate(s) for s in arguments["saes"]]
    trainers = [Trainer(c, x.shape[1], len(x), seed, arguments["center"], device, collective) for c in configs]
    _resume(trainers)
    total = sum(size * max(t.steps for t in trainers if t.batch == size) for size in {t.batch for t in trainers})
    bar = progress(total, "fit", "sample", 0) if collective.rank == 0 else None

    def on_epoch(current: list[Trainer], due: bool) -> None:
        if bar is not None:
            bar.update(current[0].steps_per_epoch * current[0].batch)
        if due:
            _report(trainers, run, collective.rank)

    clock = time.perf_counter()
    try:
        train(trainers, x, seed, on_epoch)
    except MedSAEError as error:
        return {"error": f"{error}; the last good checkpoint is kept in {run.path(SCRATCH)}"}
    finally:
        if bar is not None:
            bar.close()
    seconds = round(time.perf_counter() - clock, 3)
    results, outputs = [], {}
    for trainer in trainers:
        figures, files = publish(trainer, x, arguments["scaling"], run, arguments["metadata"])
        results.append(figures)
        outputs.update(files)
    return {"results": results, "outputs": outputs, "seconds": seconds}


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on the memory of the object store: no copy a worker. It is only read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _resume(trainers: list[Trainer]) -> None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        states = torch.load(os.path.join(folder, STATE), map_location=trainers[0].device, weights_only=True)
    for trainer, state in zip(trainers, states, strict=True):
        trainer.load_state_dict(state)


def _report(trainers: list[Trainer], run: RunDir, rank: int) -> None:
    """Takes a checkpoint; every worker must come here the same number of times."""
    metrics = {t.config.name: t.log[-1]["fvu"] for t in trainers if t.log}
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save([t.state_dict() for t in trainers], os.path.join(folder, STATE))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def publish(trainer: Trainer, x: torch.Tensor, scaling: Scaling, run: RunDir, metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Measures a trained autoencoder, as inference will run it, on the training split, and (rank 0) writes `sae/NAME`.

    Returns the figures, and relative paths to SHA-256 (empty on other ranks).
    """
    config, collective = trainer.config, trainer.collective
    activation, tensors, options = trainer.sae.export()
    # The inputs are scaled already, so the figures come from weights that are not folded; FVU, L0 and dead share do not depend on it.
    plain = fold(activation, tensors, options, Scaling(np.zeros(x.shape[1]), 1.0, 1.0), {}).to(x.device)
    sums = reconstruction(plain, x[collective.rank :: collective.world], torch.zeros(x.shape[1], dtype=torch.float64))
    sums = {key: collective.sum(value) for key, value in sums.items()}
    figures = {
        "name": config.name,
        "architecture": config.architecture,
        "dict_size": config.dict_size,
        "fvu": float(sums["sse"] / sums["variance"]),
        "l0": float(sums["active"] / len(x)),
        "dead_share": float((sums["count"] == 0).double().mean()),
        "steps": trainer.step_count,
    }
    if collective.rank != 0:
        return figures, {}
    about = {**metadata, "sae": config.model_dump(mode="json", exclude_none=True), "train": figures}
    return figures, save(fold(activation, tensors, options, scaling, about), run, f"sae/{config.name}", trainer.log)
