"""Images per second of the extract stage beside the bare forward of the same model, in one run.

    python benchmarks/extract.py [--data FOLDER] [--encoder NAME] [--images N] [--json FILE]

FOLDER is in CheXpert's layout; without one, phantoms are drawn. On a machine with a GPU the forward and the stage use it, with the batch size that the stage finds; give
`--images 20000` or more there. Reported:

* read, decode and preprocess alone, one process;
* the bare forward: the same encoder, batch size and threads on pixels that lie in memory;
* the stage, steady state: from the first published part to the last, so Ray's and the model's start-up are not in it (they are shown apart). Decoding runs ahead of
  the encoder, and some of it may be over before the first part is; `stage_share_with_decode` adds the whole decode of every image on all cores to the stage's time,
  which is what a long run can cost at most;
* the loader of the paper's kind: one process, one image after the other through PIL, tensor, resize, PIL again, and the model's own processor, then the same model in
  the same batches;
* on a GPU, the lowest cosine of an image's embedding in the default arithmetic (bfloat16) to that in float32.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from medsae.artifacts import RunDir, resolve
from medsae.config import RunConfig, validate_config
from medsae.data import radiograph
from medsae.data.manifest import read_manifest
from medsae.encoders import find_batch_size, load_encoder, load_preprocess


def rate(count: int, seconds: float) -> float:
    return count / seconds


def time_decode(config: RunConfig, paths: list[str]) -> tuple[float, float, np.ndarray]:
    """Images per second of decode alone and of decode with preprocessing; and the pixels."""
    fs, base = resolve(config.data.root)
    preprocess = load_preprocess(config.encoder.name)
    started = time.perf_counter()
    images = [radiograph.load(fs, f"{base}/{p}") for p in paths]
    decoded = time.perf_counter()
    pixels = np.stack([preprocess(image) for image in images])
    finished = time.perf_counter()
    return rate(len(paths), decoded - started), rate(len(paths), finished - started), pixels


def time_forward(encoder: Any, pixels: np.ndarray, batch_size: int) -> float:
    encoder.encode(pixels[:batch_size])
    started = time.perf_counter()
    for i in range(0, len(pixels), batch_size):
        encoder.encode(pixels[i : i + batch_size])
    return rate(len(pixels), time.perf_counter() - started)


def lowest_cosine(arguments: argparse.Namespace, encoder: Any, pixels: np.ndarray, device: str) -> float:
    """Of embeddings in the encoder's own arithmetic to those in float32."""
    exact = load_encoder(arguments.encoder, arguments.weights, device=device, dtype="float32")
    pairs = [(encoder.encode(pixels[i : i + 32]), exact.encode(pixels[i : i + 32])) for i in range(0, min(len(pixels), 512), 32)]
    return min(float((a * b).sum(1).min()) for a, b in pairs)


def time_stage(config: RunConfig) -> tuple[float, float, float]:
    """Images per second in steady state, images per second of the whole stage, and its start-up in seconds."""
    from medsae.pipeline.stage import run_stage

    started = time.time()
    run_stage("extract", config, force=True)
    whole = time.time() - started
    run = RunDir(config.run)
    parts = sorted((os.path.getmtime(run.path(p)), pq.read_metadata(run.path(p)).num_rows) for p in run.list("embeddings", ".parquet"))
    images = sum(n for _, n in parts)
    steady = rate(images - parts[0][1], parts[-1][0] - parts[0][0])
    first = parts[0][0] - started - parts[0][1] / steady
    return steady, rate(images, whole), first


def paper_loader(config: RunConfig, paths: list[str], encoder: Any, batch_size: int) -> float:
    """One process; each image goes PIL -> float tensor -> resize -> PIL -> processor, and the model takes floats of three channels."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    _, base = resolve(config.data.root)
    processor = CLIPImageProcessorPil(size=224, do_center_crop=False, image_mean=[0.5862785803043838] * 3, image_std=[0.27950088968644304] * 3)
    height, width = encoder.input_size
    started = time.perf_counter()
    for i in range(0, len(paths), batch_size):
        batch = []
        for path in paths[i : i + batch_size]:
            image = Image.open(f"{base}/{path}").convert("RGB")
            tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
            tensor = torch.nn.functional.interpolate(tensor[None], (height, width), mode="bilinear", antialias=True)[0]
            again = Image.fromarray((tensor.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
            batch.append(processor(again, return_tensors="np")["pixel_values"][0])
        floats = np.stack(batch)
        if hasattr(encoder, "vision"):
            with torch.inference_mode():
                torch.nn.functional.normalize(encoder.vision(torch.from_numpy(floats).to(encoder.device, encoder.dtype)).float(), dim=-1).cpu()
        else:
            encoder.encode(np.clip(np.rint((floats[:, 0] * 0.27950088968644304 + 0.5862785803043838) * 255), 0, 255).astype(np.uint8))
    return rate(len(paths), time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder in CheXpert's layout (default: phantoms drawn for the run)")
    parser.add_argument("--encoder", default="medclip-resnet50")
    parser.add_argument("--weights", default="untrained")
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--batch-size", type=int, help="default: 32 on CPU, found by trial on a GPU")
    parser.add_argument("--json", help="write the figures here too")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.data
        if root is None:
            from medsae.data.phantom import write_phantoms

            root = str(Path(scratch) / "phantom")
            write_phantoms(root, arguments.images, seed=0)
        tree: dict[str, Any] = {
            "run": str(Path(scratch) / "run"),
            "data": {"root": root, "limit": arguments.images},
            "encoder": {"name": arguments.encoder, "weights": arguments.weights},
        }
        device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder: Any = load_encoder(arguments.encoder, arguments.weights, device=device)
        batch_size = arguments.batch_size or (find_batch_size(encoder) if device == "cuda" else 32)
        tree["encoder"]["batch_size"] = batch_size
        config = validate_config(tree)
        paths = read_manifest(config.data).table["path"].to_pylist()
        decode, preprocess, pixels = time_decode(config, paths)
        forwards = [time_forward(encoder, pixels, batch_size)]
        steady, whole, startup = time_stage(config)
        forwards.append(time_forward(encoder, pixels, batch_size))
        paper = paper_loader(config, paths, encoder, batch_size)
        forwards.append(time_forward(encoder, pixels, batch_size))
        cosine = lowest_cosine(arguments, encoder, pixels, device) if device == "cuda" else 1.0
    forward = statistics.median(forwards)
    figures = {
        "encoder": arguments.encoder,
        "images": len(paths),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "batch_size": batch_size,
        "lowest_cosine_to_float32": cosine,
        "decode_images_per_s": decode,
        "decode_and_preprocess_images_per_s": preprocess,
        "forward_images_per_s": forward,
        "forward_images_per_s_each": forwards,
        "stage_images_per_s": steady,
        "stage_share_of_forward": steady / forward,
        "stage_share_with_decode": 1 / (1 / steady + 1 / (preprocess * (os.cpu_count() or 1))) / forward,
        "stage_whole_images_per_s": whole,
        "stage_startup_s": startup,
        "paper_loader_images_per_s": paper,
        "paper_loader_share_of_forward": paper / forward,
        "floor_share_of_forward": 1 / (1 + forward / (preprocess * (os.cpu_count() or 1))),
    }
    for key, value in figures.items():
        print(f"{key:38} {value:.3f}" if isinstance(value, float) else f"{key:38} {value}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
