"""Two workers on two cores against one worker on one core: milliseconds a step on the same global batch, through Ray Train, start-up left out.

    python benchmarks/sae_ddp.py [--dim 512 --dict-size 8192 --k 32 --batches 1024,2048,4096 --architectures topk --steps 6 --rounds 2 --json FILE]

Each worker has one thread and is pinned to a core of its own, so that one worker has half of what two have. Gradients of 2 m d numbers are passed on and
the parameters updated in every step whatever the batch is: the larger the batch, the smaller that share. Rounds with one worker and with two take turns; the fastest step of each counts.
Two workers that share nothing, each stepping on half the batch by itself, tell what the two cores can do when both are busy: virtual cores often do less.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from sae_step import SAMPLES

from medsae.sae.collective import Collective
from medsae.sae.config import OPTIONS, SAEConfig
from medsae.sae.source import Held
from medsae.sae.training import Trainer


def fastest(trainer: Trainer, x: torch.Tensor, steps: int, collective: Collective) -> float:
    """Milliseconds of the fastest step; all workers begin together, and a step is as slow as the slowest."""
    times = []
    for _ in range(steps):
        collective.barrier()
        clock = time.perf_counter()
        trainer.step(x)
        collective.barrier()
        times.append(1000 * (time.perf_counter() - clock))
    return min(times[2:])


def worker(sizes: dict[str, Any]) -> dict[str, float]:
    """The fastest step of each architecture and batch size, ms; a step is as slow as the slowest worker."""
    rank = ray.train.get_context().get_world_rank()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    collective = Collective()
    found = {}
    for name in sizes["architectures"]:
        for batch in sizes["batches"]:
            extra: dict[str, Any] = {"k": sizes["k"]} if "k" in OPTIONS[name] else {}
            config = SAEConfig(architecture=name, dict_size=sizes["dict_size"], batch_size=batch, epochs=10_000, warmup=0, lr=1e-4, **extra)
            trainer = Trainer(config, sizes["dim"], SAMPLES, collective=collective, plan=(100, batch))
            x = torch.randn(batch, sizes["dim"], generator=torch.Generator().manual_seed(1))
            share = next(Held(x).batches(0, 0, batch, collective.rank, collective.world))
            found[f"{name} {batch}"] = fastest(trainer, share, 2 + sizes["steps"], collective)
            if collective.world > 1:
                apart = Collective()
                apart.rank, apart.world = 0, 1
                trainer = Trainer(config, sizes["dim"], SAMPLES, collective=apart, plan=(100, len(share)))
                found[f"{name} {batch} apart"] = fastest(trainer, share, 2 + sizes["steps"], collective)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in {"dim": 512, "dict-size": 8192, "k": 32, "steps": 6, "rounds": 2}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--batches", type=lambda s: [int(v) for v in s.split(",")], default=[1024, 2048, 4096])
    parser.add_argument("--architectures", type=lambda s: s.split(","), default=["topk"])
    parser.add_argument("--json", default=None)
    given = vars(parser.parse_args())
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    best: dict[int, dict[str, float]] = {1: {}, 2: {}}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given["rounds"]):
            for workers in (1, 2):
                trainer = TorchTrainer(
                    worker,
                    train_loop_config=given,
                    torch_config=TorchConfig(backend="gloo"),
                    scaling_config=ray.train.ScalingConfig(num_workers=workers),
                    run_config=ray.train.RunConfig(name=f"{turn}-{workers}", storage_path=folder),
                )
                for key, ms in trainer.fit().return_value.items():
                    best[workers][key] = min(ms, best[workers].get(key, ms))
    ray.shutdown()
    print(f"d {given['dim']}, m {given['dict_size']}, k {given['k']}, float32, one thread a worker, torch {torch.__version__}")
    rows = []
    for key, one in best[1].items():
        two, apart = best[2][key], best[2][f"{key} apart"]
        rows.append({"what": key, "one_ms": round(one, 1), "two_ms": round(two, 1), "ratio": round(one / two, 2), "apart_ms": round(apart, 1)})
        print(
            f"{key:24} one worker {one:8.1f} ms   two {two:8.1f} ms   {one / two:.2f}x   two that share nothing, half the batch each {apart:8.1f} ms"
        )
    if given["json"]:
        with open(given["json"], "w") as file:
            json.dump({"sizes": given, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
