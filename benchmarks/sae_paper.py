"""The time of the paper's training run: 223,414 embeddings of width 512, 8,192 neurons, batch 1,024, 200 epochs, data resident on the device.

    python benchmarks/sae_paper.py --device cuda [--architecture standard --epochs 200 --json FILE]
    python benchmarks/sae_paper.py --device cpu --epochs 1 --samples 20000

The embeddings are synthetic (sparse combinations of directions, around a common mean); the loop is the one that `medsae fit` runs. Prints seconds, milliseconds
a step and samples a second, of all epochs and of the last (the first steps of the ReLU architectures are dense), and the FVU that was reached.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

from medsae.sae.config import OPTIONS, SAEConfig
from medsae.sae.data import fit_scaling
from medsae.sae.source import Held
from medsae.sae.training import Trainer, train


def embeddings(samples: int, dim: int, seed: int = 0) -> np.ndarray:
    """Rows of about 20 out of 4 d directions with a common mean, of norm 1, as contrastive encoders give."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(4 * dim, dim)).astype(np.float32)
    x = np.empty((samples, dim), np.float32)
    for start in range(0, samples, 8192):
        rows = min(8192, samples - start)
        code = np.zeros((rows, 4 * dim), np.float32)
        np.put_along_axis(code, rng.integers(0, 4 * dim, (rows, 20)), rng.exponential(size=(rows, 20)).astype(np.float32), 1)
        x[start : start + rows] = code @ directions + 100.0
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in {"samples": 223_414, "dim": 512, "dict-size": 8192, "k": 32, "batch": 1024, "epochs": 200}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--architecture", default="standard", choices=list(OPTIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    device = torch.device(given.device)
    x = embeddings(given.samples, given.dim)
    source = Held(torch.from_numpy(fit_scaling(x).apply(x)).to(device))
    extra: dict[str, Any] = {"k": given.k} if "k" in OPTIONS[given.architecture] else {}
    config = SAEConfig(architecture=given.architecture, dict_size=given.dict_size, batch_size=given.batch, epochs=given.epochs, **extra)
    trainer = Trainer(config, given.dim, given.samples, device=device)
    ends = []

    def on_epoch(_: list[Trainer], due: bool) -> None:
        ends.append(time.perf_counter())  # the line of the log, which was read from the device, is there

    begin = time.perf_counter()
    train([trainer], source, 0, on_epoch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    last = ends[-1] - (ends[-2] if len(ends) > 1 else begin)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    figures = {
        "device": name,
        "seconds": round(seconds, 2),
        "ms_per_step": round(1000 * seconds / trainer.steps, 3),
        "ms_per_step_last_epoch": round(1000 * last / trainer.steps_per_epoch, 3),
        "samples_per_second": round(trainer.steps * trainer.batch / seconds),
        "fvu": round(trainer.log[-1]["fvu"], 4),
        "l0": round(trainer.log[-1]["l0"], 1),
    }
    print(
        f"{given.architecture}: {given.samples} x {given.dim}, {given.dict_size} neurons, batch {trainer.batch}, {trainer.steps} steps, torch {torch.__version__}"
    )
    print(", ".join(f"{key} {value}" for key, value in figures.items()))
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"sizes": vars(given), **figures}, file, indent=1)


if __name__ == "__main__":
    main()
