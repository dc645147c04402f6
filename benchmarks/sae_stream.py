"""Memory of training on embeddings that are held in memory and on embeddings that are streamed, at the size of CheXpert and at four times that.

    python benchmarks/sae_stream.py [--rows 223414 893656] [--dim 512] [--window 131072] [--json FILE]

Embeddings are standard normal, on disk as extract leaves them. Each row is a run of `medsae fit` for an epoch, in a process and on a Ray of its own, with one small SAE (topk, m 1024), so that
what is measured is the way of the data and not the work on it; the memory of every process is sampled all along. Reported: peaks of the driver, the training worker,
the largest reader, all processes together (private pages) and Ray's object store, which is shared, and the rate.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from extract_scale import CHEXPERT, MB, sampled
from measure import write_run


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, whose memory is that of the call."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_embeddings(folder: str, rows: int, dim: int) -> None:
    """A run that extract might have left, all of it training split."""
    write_run(folder, rows, dim, None, split="train")


def measure(folder: str, streamed: bool, window: int) -> dict[str, Any]:
    """One run of the stage: peaks by kind of process, samples a second."""
    tree = {
        "run": folder,
        "sae": [{"architecture": "topk", "dict_size": 1024, "k": 16, "epochs": 1, "batch_size": 4096, "checkpoints": 1}],
        "fit": {"hold_gb": 0 if streamed else 1000, "window": window},
    }
    counts, seconds, peak = sampled("fit", tree, int(6000 * MB), actor="TrainWorker")
    samples = counts["samples"]
    return {"rows": samples, "streamed": streamed, "seconds": seconds, "samples_per_second": samples / seconds, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[CHEXPERT, 4 * CHEXPERT])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--window", type=int, default=131_072)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    figures = []
    print("| rows | embeddings | | driver | training worker | largest reader | all processes | object store | samples/s, with start-up |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            apart(write_embeddings, folder, rows, given.dim)
            for streamed in (False, True):
                one = apart(measure, folder, streamed, given.window)
                figures.append(one)
                peaks = " | ".join(f"{one['peak_bytes'].get(kind, 0) / MB:.0f} MB" for kind in ("driver", "actor", "worker", "all", "store"))
                print(
                    f"| {one['rows']:,} | {one['rows'] * given.dim * 4 / MB:.0f} MB | {'streamed' if streamed else 'held'} | {peaks} | {one['samples_per_second']:,.0f} |",
                    flush=True,
                )
    if given.json:
        Path(given.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
