"""fit: trains the sparse autoencoders of a run with Ray Train, all in one pass over shared batches."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from medsae.artifacts import RunDir, fingerprint, read_embeddings
from medsae.config import RunConfig
from medsae.errors import ConfigError, DataError, MedSAEError
from medsae.pipeline.cluster import cluster_gpus, ray_session
from medsae.pipeline.done import Done
from medsae.pipeline.stage import StageResult
from medsae.progress import progress
from medsae.sae.checkpoint import save
from medsae.sae.collective import Collective
from medsae.sae.config import SAEConfig
from medsae.sae.data import Scaling, batch_plan, check_embeddings, fit_scaling, geometric_median
from medsae.sae.model import fold, reconstruction
from medsae.sae.training import Trainer, train

SCRATCH = "sae/.train"
"""Ray Train's storage in the run directory: training checkpoints, removed on success."""
STATE = "trainers.pt"
MAX_FAILURES = 3
"""Restarts from the last checkpoint after the loss of a worker."""
MEDIAN_ROWS = 32768


def run(config: RunConfig, run: RunDir) -> StageResult:
    """Trains every autoencoder of `config.sae` on the split `train` and publishes it under `sae/NAME`; `sae/frontier.json` sets them side by side.

    An interrupted run with the same embeddings, seed and configuration goes on from its last checkpoint.

    Raises:
        MedSAEError: embeddings that cannot be trained on, a dictionary that cannot fit, too few CPUs or GPUs, or training that diverged.
    """
    encoder = run.read_manifest().get("encoder", {})
    where = run.path("embeddings") + " (split train)"
    x = _read_training_split(run, where)
    check_embeddings(x, where, encoder.get("dim"))
    scaling = fit_scaling(x, where)
    inputs = scaling.apply(x)
    del x
    center = geometric_median(inputs[np.random.default_rng(config.seed).permutation(len(inputs))[:MEDIAN_ROWS]])
    name = fingerprint([hashlib.sha256(inputs.data).hexdigest(), config.seed, [s.model_dump(mode="json") for s in config.sae]])
    samples, width = inputs.shape
    with ray_session(config.ray):
        gpus = cluster_gpus(config.ray)
        _check_workers(config.ray.train_workers, gpus)
        arguments = {
            "inputs": [ray.put(inputs)],
            "scaling": scaling,
            "center": center,
            "saes": [s.model_dump(mode="json") for s in config.sae],
            "seed": config.seed,
            "run": run,
            "metadata": {"encoder": encoder, "scale": scaling.scale, "training_samples": samples, "seed": config.seed},
        }
        result = fit_on_ray(arguments, name, run, config.ray.train_workers, gpus)
    if "error" in result:
        raise MedSAEError(result["error"])
    outputs = dict(result["outputs"])
    outputs["sae/frontier.json"] = run.write_json("sae/frontier.json", result["results"])
    run.delete(SCRATCH)
    counts = {"samples": samples, "width": width, "saes": len(config.sae), "train_seconds": result["seconds"], "frontier": result["results"]}
    return StageResult(counts=counts, outputs=outputs)


def _read_training_split(run: RunDir, where: str) -> np.ndarray:
    try:
        return read_embeddings(run, "train").x
    except ValueError as error:
        raise DataError(f"{where}: embeddings differ in width from row to row; delete the folder and run extract again") from error


def _check_workers(workers: int, gpus: int) -> None:
    """Ray Train waits without end for what a cluster does not have; an autoscaled cluster may still grow, so only a cluster of one node is refused."""
    have = gpus or int(ray.cluster_resources().get("CPU", 0))
    if len(ray.nodes()) == 1 and workers > have:
        raise ConfigError(f"ray.train_workers = {workers}, but the cluster has {have} {'GPUs' if gpus else 'CPUs'}; lower it, or raise ray.num_cpus")


def fit_on_ray(
    arguments: dict[str, Any], name: str, run: RunDir, workers: int, gpus: int, worker: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """One Ray Train run; returns what rank 0 returned. The same name finds the checkpoints of an interrupted run."""
    # Whether a lost worker can be replaced is Ray's to know; a user's error comes back as a value, because it would only happen again.
    done = ray.remote(num_cpus=0)(Done).remote()
    trainer = TorchTrainer(
        worker or train_worker,
        train_loop_config={**arguments, "done": done},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpus > 0),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=run.path(SCRATCH),
            storage_filesystem=run.fs,
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    with _shown(done, passes(arguments)):
        returned = trainer.fit().return_value
    ray.kill(done)
    assert isinstance(returned, dict)
    return returned


def passes(arguments: dict[str, Any]) -> int:
    """Samples that pass in all: those of the longest training of each batch size, which the others share."""
    configs = [SAEConfig.model_validate(s) for s in arguments["saes"]]
    samples = arguments["metadata"]["training_samples"]
    longest = {c.batch_size: max(o.epochs for o in configs if o.batch_size == c.batch_size) for c in configs}
    return sum(epochs * math.prod(batch_plan(samples, size)) for size, epochs in longest.items())


@contextmanager
def _shown(done: Any, total: int) -> Iterator[None]:
    """A progress bar of what the workers have done, while they do it."""
    stop = threading.Event()
    bar = progress(total, "fit", "sample")

    def poll() -> None:
        while not stop.wait(0.5):
            try:
                bar.update(ray.get(done.get.remote(), timeout=5) - bar.n)
            except ray.exceptions.RayError:
                continue

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)
        bar.close()


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs: trains from the last checkpoint to the end, publishes, returns figures or an error line."""
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        # Ray gives a process of one logical CPU one thread; the cores of the node are for the workers on it.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    collective = Collective()
    seed, run = arguments["seed"], arguments["run"]
    configs = [SAEConfig.model_validate(s) for s in arguments["saes"]]
    inputs = ray.get(arguments["inputs"][0])
    clock = time.perf_counter()
    try:
        check_memory(configs, inputs.shape, device, context.get_local_world_size())
        x = _as_tensor(inputs).to(device)
        trainers = [Trainer(c, x.shape[1], len(x), seed, arguments["center"], device, collective) for c in configs]
        _resume(trainers)
        before = dict.fromkeys(dict.fromkeys(c.batch_size for c in configs), 0)

        def on_epoch(current: list[Trainer], due: bool) -> None:
            before[current[0].config.batch_size] = current[0].step_count * current[0].batch
            if collective.rank == 0:
                arguments["done"].set.remote(sum(before.values()))
            if due:
                _report(trainers, collective.rank)

        train(trainers, x, seed, on_epoch)
    except MedSAEError as error:
        return {"error": str(error)}
    seconds = round(time.perf_counter() - clock, 3)
    results, outputs = [], {}
    for trainer in trainers:
        figures, files = publish(trainer, x, arguments["scaling"], run, arguments["metadata"])
        results.append(figures)
        outputs.update(files)
    return {"results": results, "outputs": outputs, "seconds": seconds}


def check_memory(configs: list[SAEConfig], shape: tuple[int, int], device: torch.device, workers: int) -> None:
    """Stops where the autoencoders cannot fit a worker's device.

    Weights, gradients and Adam's two moments are 4 copies of 2 m d floats; the largest step holds about 3 copies of its [B, m] pre-activations; on a GPU the
    embeddings are held too.

    Raises:
        ConfigError: names the sizes and what to lower.
    """
    n, d = shape
    need = sum(4 * 2 * c.dict_size * d * 4 for c in configs) + max(3 * c.batch_size * c.dict_size * 4 for c in configs)
    if device.type == "cuda":
        have, what = torch.cuda.get_device_properties(device).total_memory, "the GPU"
        need += n * d * 4
    else:
        have, what = memory_limit() // workers, "a worker"
    if need > 0.95 * have:
        sizes = ", ".join(f"{c.name} {c.dict_size}" for c in configs)
        raise ConfigError(
            f"training needs about {need / 2**30:.1f} GiB and {what} has {have / 2**30:.1f} (dictionaries of width {d}: {sizes});"
            " lower dict_size or batch_size, or train fewer SAEs at once"
        )


def memory_limit() -> int:
    """Bytes of memory of this machine or container."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            text = file.read().strip()
        return min(limit, int(text)) if text.isdigit() else limit
    except OSError:
        return limit


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


def _report(trainers: list[Trainer], rank: int) -> None:
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
