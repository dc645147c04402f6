"""fit: trains the sparse autoencoders of a run with Ray Train, all in one pass over shared batches."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from medsae.artifacts import RunDir, embedding_parts, fingerprint, read_embeddings
from medsae.config import RunConfig
from medsae.errors import ConfigError, DataError, MedSAEError
from medsae.pipeline.cluster import cluster_gpus, ray_session
from medsae.pipeline.done import Done
from medsae.pipeline.stage import StageResult
from medsae.pipeline.stream import Stream, survey
from medsae.pipeline.trackers import check_trackers, open_trackers
from medsae.progress import progress
from medsae.sae.base import Workspace
from medsae.sae.checkpoint import save
from medsae.sae.collective import Collective
from medsae.sae.config import SAEConfig
from medsae.sae.data import Scaling, batch_plan, center_rows, check_embeddings, fit_scaling, geometric_median
from medsae.sae.model import fold, reconstruction
from medsae.sae.source import LANES, Held, Source, as_tensor
from medsae.sae.training import Trainer, train

SCRATCH = "sae/.train"
"""Ray Train's storage in the run directory: training checkpoints, removed on success."""
STATE = "trainers.pt"
MAX_FAILURES = 3
"""Restarts from the last checkpoint after the loss of a worker."""


def run(config: RunConfig, run: RunDir) -> StageResult:
    """Trains every autoencoder of `config.sae` on the split `train` and publishes it under `sae/NAME`; `sae/frontier.json` sets them side by side.

    An interrupted run with the same embeddings, seed and configuration goes on from its last checkpoint.

    Raises:
        MedSAEError: embeddings that cannot be trained on, a dictionary that cannot fit, too few CPUs or GPUs, or training that diverged.
    """
    encoder = run.read_manifest().get("encoder", {})
    where = run.path("embeddings") + " (split train)"
    check_trackers(config.fit.trackers, run)
    streamed = is_streamed(config, run)
    held = None if streamed else hold(run, where, encoder.get("dim"), config.seed)
    with ray_session(config.ray):
        gpus, workers = cluster_gpus(config.ray), config.ray.train_workers
        groups = deal(config.sae, config.fit.parallel)
        _check_workers(workers, gpus, streamed, len(groups))
        lanes = workers * -(-LANES // workers)
        given: Stream | HeldInputs = held or survey(run, where, encoder.get("dim"), config.seed, config.fit.window, lanes)
        about = {"encoder": encoder, "scale": given.scaling.scale, "training_samples": given.samples, "seed": config.seed, "order": given.told}
        arguments = {
            "given": given.put() if isinstance(given, HeldInputs) else given,
            "plans": {size: given.plan(size) for size in {s.batch_size for s in config.sae}},
            "seed": config.seed,
            "run": run,
            "trackers": config.fit.trackers,
            "side_by_side": len(groups),
            "metadata": about,
        }
        del held
        clock = time.perf_counter()
        returned = fit_groups(arguments, groups, workers, gpus)
        seconds = time.perf_counter() - clock if len(groups) > 1 else returned[0].get("seconds", 0.0)
    for result in returned:
        if "error" in result:
            raise MedSAEError(result["error"])
    found = {figures["name"]: figures for result in returned for figures in result["results"]}
    frontier = [found[s.name] for s in config.sae]
    outputs = {path: digest for result in returned for path, digest in result["outputs"].items()}
    outputs["sae/frontier.json"] = run.write_json("sae/frontier.json", frontier)
    run.delete(SCRATCH)
    counts = {
        "samples": given.samples,
        "width": given.dim,
        "saes": len(config.sae),
        "train_seconds": round(seconds, 3),
        "frontier": frontier,
    }
    return StageResult(counts=counts, outputs=outputs)


@dataclass
class HeldInputs:
    """The scaled training split in memory, `inputs` float32 [n, d] or, on its way to the workers, where it lies in the object store."""

    scaling: Scaling
    center: np.ndarray
    digest: str
    samples: int
    dim: int
    inputs: Any
    told = "exact shuffle"

    def plan(self, batch_size: int) -> tuple[int, int]:
        return batch_plan(self.samples, batch_size)

    def put(self) -> HeldInputs:
        """Inputs moved to the object store: once a node, read by all its workers without a copy."""
        reference = [ray.put(self.inputs)]
        self.inputs = None
        return replace(self, inputs=reference)

    def open(self, device: torch.device) -> Held:
        return Held(as_tensor(ray.get(self.inputs[0])).to(device))


def hold(run: RunDir, where: str, dim: int | None, seed: int) -> HeldInputs:
    """Reads, checks and scales the training split."""
    try:
        x = read_embeddings(run, "train").x
    except ValueError as error:
        raise DataError(f"{where}: embeddings differ in width from row to row; delete the folder and run extract again") from error
    check_embeddings(x, where, dim)
    scaling = fit_scaling(x, where)
    inputs = scaling.apply(x)
    center = geometric_median(inputs[center_rows(len(inputs), seed)])
    return HeldInputs(scaling, center, hashlib.sha256(inputs.data).hexdigest(), len(inputs), inputs.shape[1], inputs)


def is_streamed(config: RunConfig, run: RunDir) -> bool:
    """Whether embeddings are too large to hold. Holding takes several times their size for a moment: tables, the split, the scaled copy, the object store."""
    size = sum(info.size for info in run.fs.get_file_info([run.path(part) for part in embedding_parts(run)]))
    limit = memory_limit() / 8 if config.fit.hold_gb is None else config.fit.hold_gb * 2**30
    return size > limit


def deal(saes: Sequence[SAEConfig], hands: int) -> list[list[SAEConfig]]:
    """The SAEs in at most `hands` groups of about equal work: the largest first, each to the group that has the least so far."""
    groups: list[list[SAEConfig]] = [[] for _ in range(min(hands, len(saes)))]
    work = [0] * len(groups)
    for size, sae in sorted(((s.dict_size * s.epochs, s) for s in saes), key=lambda pair: -pair[0]):
        least = work.index(min(work))
        groups[least].append(sae)
        work[least] += size
    return groups


def _check_workers(workers: int, gpus: int, streamed: bool, side_by_side: int) -> None:
    """Ray Train waits without end for what a cluster does not have; an autoscaled cluster may still grow, so only a cluster of one node is refused."""
    if len(ray.nodes()) != 1:
        return
    cpus = int(ray.cluster_resources().get("CPU", 0))
    have = gpus or cpus
    asked = f"ray.train_workers = {workers}" + (f" for each of {side_by_side} trainings (fit.parallel)" if side_by_side > 1 else "")
    if workers * side_by_side > have:
        raise ConfigError(f"{asked}, but the cluster has {have} {'GPUs' if gpus else 'CPUs'}; lower it, or raise ray.num_cpus")
    if streamed and workers * side_by_side >= cpus:
        raise ConfigError(f"{asked} of {cpus} CPUs leave none to read embeddings that are streamed; lower it, or raise ray.num_cpus")


def fit_groups(arguments: dict[str, Any], groups: list[list[SAEConfig]], workers: int, gpus: int) -> list[dict[str, Any]]:
    """One Ray Train run a group, all at the same time; returns what each returned, in order. Each is resumed by its own name."""
    runs = []
    for group in groups:
        saes = [s.model_dump(mode="json") for s in group]
        name = fingerprint([arguments["given"].digest, arguments["seed"], saes])
        # Whether a lost worker can be replaced is Ray's to know; a user's error comes back as a value, because it would only happen again.
        runs.append({**arguments, "saes": saes, "name": name, "done": ray.remote(num_cpus=0)(Done).remote()})
    done = [r["done"] for r in runs]
    with _shown(done, sum(map(passes, runs))):
        if len(runs) == 1:  # in the main thread, where Ray Train can handle an interrupt
            returned = [fit_on_ray(runs[0], workers, gpus)]
        else:
            with ThreadPoolExecutor(len(runs)) as pool:
                returned = list(pool.map(lambda r: fit_on_ray(r, workers, gpus), runs))
    for actor in done:
        ray.kill(actor)
    return returned


def fit_on_ray(
    arguments: dict[str, Any], workers: int, gpus: int, worker: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """One Ray Train run; returns what rank 0 returned. The same `name` among the arguments finds the checkpoints of an interrupted run."""
    run = arguments["run"]
    trainer = TorchTrainer(
        worker or train_worker,
        train_loop_config=arguments,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpus > 0),
        run_config=ray.train.RunConfig(
            name=arguments["name"],
            storage_path=run.path(SCRATCH),
            storage_filesystem=run.fs,
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    returned = trainer.fit().return_value
    assert isinstance(returned, dict)
    return returned


def passes(arguments: dict[str, Any]) -> int:
    """Samples that pass in all: those of the longest training of each batch size, which the others share."""
    configs = [SAEConfig.model_validate(s) for s in arguments["saes"]]
    longest = {c.batch_size: max(o.epochs for o in configs if o.batch_size == c.batch_size) for c in configs}
    return sum(epochs * math.prod(arguments["plans"][size]) for size, epochs in longest.items())


@contextlib.contextmanager
def _shown(done: list[Any], total: int) -> Iterator[None]:
    """A progress bar of what the workers have done, while they do it."""
    stop = threading.Event()
    bar = progress(total, "fit", "sample")

    def poll() -> None:
        while not stop.wait(0.5):
            try:
                bar.update(sum(ray.get([d.get.remote() for d in done], timeout=5)) - bar.n)
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
    # Workers that may be on this node: its own training's, and as many of each that runs beside it.
    neighbours = ray.train.get_context().get_local_world_size() * arguments["side_by_side"]
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        # Ray gives a process of one logical CPU one thread; the cores of the node are for the workers on it.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // neighbours))
    collective = Collective()
    seed, run = arguments["seed"], arguments["run"]
    configs = [SAEConfig.model_validate(s) for s in arguments["saes"]]
    given = arguments["given"]
    clock = time.perf_counter()
    try:
        check_memory(configs, (given.samples if isinstance(given, HeldInputs) else 0, given.dim), device, neighbours)
        source = given.open(device)
        plans, workspace = arguments["plans"], Workspace()
        trainers = [Trainer(c, given.dim, given.samples, seed, given.center, device, collective, plans[c.batch_size], workspace) for c in configs]
        _resume(trainers)
        before = dict.fromkeys(dict.fromkeys(c.batch_size for c in configs), 0)

        trackers = open_trackers(arguments["trackers"], run, SCRATCH, arguments["name"], configs) if collective.rank == 0 else []

        def on_epoch(current: list[Trainer], due: bool) -> None:
            before[current[0].config.batch_size] = current[0].step_count * current[0].batch
            if collective.rank == 0:
                arguments["done"].set.remote(sum(before.values()))
            for tracker in trackers:
                for trainer in current:
                    tracker.write(trainer.config.name, trainer.log)
            if due:
                _report(trainers, collective.rank)

        with contextlib.ExitStack() as stack:
            for tracker in trackers:
                stack.callback(tracker.close)
            train(trainers, source, seed, on_epoch)
    except MedSAEError as error:
        return {"error": str(error)}
    seconds = round(time.perf_counter() - clock, 3)
    results, outputs = [], {}
    for trainer in trainers:
        figures, files = publish(trainer, source, given.scaling, run, arguments["metadata"])
        results.append(figures)
        outputs.update(files)
    return {"results": results, "outputs": outputs, "seconds": seconds}


def check_memory(configs: list[SAEConfig], shape: tuple[int, int], device: torch.device, workers: int) -> None:
    """Stops where the autoencoders cannot fit a worker's device.

    Weights, gradients and Adam's two moments are 4 copies of 2 m d floats, 6 where workers share a node (gradients passed on, and a checkpoint put together);
    the largest step holds about 4 copies of its [B, m] pre-activations; on a GPU the embeddings are held too.

    Raises:
        ConfigError: names the sizes and what to lower.
    """
    n, d = shape
    copies = 4 if workers == 1 else 6
    need = sum(copies * 2 * c.dict_size * d * 4 for c in configs) + max(4 * c.batch_size * c.dict_size * 4 for c in configs)
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
    states = [t.state_dict(keep=rank == 0) for t in trainers]
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(states, os.path.join(folder, STATE))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def publish(trainer: Trainer, source: Source, scaling: Scaling, run: RunDir, metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Measures a trained autoencoder, as inference will run it, on the training split, and (rank 0) writes `sae/NAME`.

    Returns the figures, and relative paths to SHA-256 (empty on other ranks).
    """
    config, collective = trainer.config, trainer.collective
    activation, tensors, options = trainer.sae.export()
    # The inputs are scaled already, so the figures come from weights that are not folded; FVU, L0 and dead share do not depend on it.
    plain = fold(activation, tensors, options, Scaling(np.zeros(source.dim), 1.0, 1.0), {}).to(trainer.device)
    zero = torch.zeros(source.dim, dtype=torch.float64)
    sums = reconstruction(plain, torch.zeros(0, source.dim, device=trainer.device), zero)
    for part in source.shares(collective.rank, collective.world):
        sums = {key: value + sums[key] for key, value in reconstruction(plain, part, zero).items()}
    sums = {key: collective.sum(value) for key, value in sums.items()}
    figures = {
        "name": config.name,
        "architecture": config.architecture,
        "dict_size": config.dict_size,
        "fvu": float(sums["sse"] / sums["variance"]),
        "l0": float(sums["active"] / source.samples),
        "dead_share": float((sums["count"] == 0).double().mean()),
        "steps": trainer.step_count,
    }
    if collective.rank != 0:
        return figures, {}
    about = {**metadata, "sae": config.model_dump(mode="json", exclude_none=True), "train": figures}
    return figures, save(fold(activation, tensors, options, scaling, about), run, f"sae/{config.name}", trainer.log)
