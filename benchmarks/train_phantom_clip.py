"""Trains `phantom-clip`, the encoder in the package, and writes its weights and model card.

    python benchmarks/train_phantom_clip.py --out medsae/encoders --cache /var/tmp/phantom-clip

Deterministic: the same arguments on the same machine give the same bytes. `--cache` keeps the drawn radiographs between runs (optional).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from medsae.data.phantom import Phantom, render, rows
from medsae.data.phantom.sampling import DEVICES, LABEL_OF, Row, patient_rows
from medsae.encoders import phantom_clip
from medsae.encoders.phantom_clip import DIM, SIZE, PhantomCLIP, PhantomModel, as_ids, preprocess, standardise, zero_shot_prompts
from medsae.encoders.phantom_text import PAD, UNKNOWN, WordTokenizer

sys.path.insert(0, str(Path(__file__).parent))
from phantom_captions import Sentence, agreement, caption, facts, statement, vocabulary

TRAIN_SEED, TEST_SEEDS = 101, (303, 777, 911)
"""Seeds of the phantoms: patients of different seeds are different patients."""
DRAWN_SIZE = 192
"""Shorter side that training images are drawn at: less than the 320 of a data set, for speed; evaluation draws at 320."""
SHIFT = 6
"""Pixels by which a training image is moved, at most."""
CHUNK = 500

PLANTED = {
    "nodule": 4,
    "fracture": 4,
    "atelectasis": 3,
    "pneumothorax": 2,
    "consolidation": 2,
    "mediastinum": 2,
    "central_line": 2,
    "endotracheal_tube": 1,
    "cardiomegaly": 1,
    "pacemaker": 1,
}
"""How often each finding is planted into training images besides those that are there, relative to each other: small and rare ones most."""
PLANTED_SHARE = 0.7


def enrich(row: Row, seed: int, index: int) -> Row:
    """Plants one more finding into most of the training images, so that all are seen often enough, and apart from those they occur with."""
    rng = np.random.default_rng([seed, index, 7])
    if rng.random() > PLANTED_SHARE:
        return row
    names, weights = list(PLANTED), np.array(list(PLANTED.values()), float)
    name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    key = name if hasattr(row.phantom.findings, name) else f"{name}_{('left', 'right')[int(rng.integers(2))]}"
    severity = 1.0 if name in DEVICES else round(float(rng.uniform(0.15, 1)), 4)
    return replace(row, phantom=replace(row.phantom, findings=replace(row.phantom.findings, **{key: severity})))


def collection(images: int, seed: int, enriched: bool) -> list[Row]:
    """Rows to draw. `enriched` for training only: one image of each patient (bodies and places of findings differ most), more findings planted."""
    if not enriched:
        return list(rows(images, seed))
    found = []
    for patient in range(1, images + 1):
        mine = list(patient_rows(patient, seed))
        found.append(enrich(mine[int(np.random.default_rng([seed, patient, 5]).integers(len(mine)))], seed, patient))
    return found


def _draw(phantoms: list[Phantom], size: int, stored: int) -> np.ndarray:
    return np.stack([preprocess(Image.fromarray(render(p, size)), stored) for p in phantoms])


def draw(collected: list[Row], size: int, stored: int, cache: Path | None, name: str, workers: int) -> np.ndarray:
    """All images of a collection, uint8 [n, stored, stored]; from the cache where they were drawn before."""
    chunks = [collected[i : i + CHUNK] for i in range(0, len(collected), CHUNK)]
    parts: list[np.ndarray] = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, chunk in enumerate(chunks):
            # The name holds a hash of what is to be drawn and of how the first one looks: a changed phantom is drawn again.
            mark = hashlib.sha256(repr([r.phantom for r in chunk]).encode() + render(chunk[0].phantom, size).tobytes()).hexdigest()[:12]
            path = cache / f"{name}{stored}-{number:03d}-{mark}.npy" if cache else None
            if path is not None and path.exists():
                part = np.load(path)
            else:
                phantoms = [r.phantom for r in chunk]
                part = np.concatenate(
                    list(pool.map(partial(_draw, size=size, stored=stored), [phantoms[i : i + 25] for i in range(0, len(phantoms), 25)]))
                )
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    np.save(path, part)
            parts.append(part)
    return np.concatenate(parts)


def batch_texts(rng: np.random.Generator, truth: np.ndarray, statements: int) -> list[Sentence]:
    """A report of each image and statements that are drawn without looking at the images."""
    return [caption(rng, t) for t in truth] + [statement(rng) for _ in range(statements)]


def token_ids(tokenizer: WordTokenizer, sentences: list[Sentence], rng: np.random.Generator) -> torch.Tensor:
    """Padded ids; one word in thirty is made unknown, so that the unknown-word token learns to say little."""
    ids = as_ids(tokenizer, [s.text for s in sentences])
    hidden = torch.from_numpy(rng.random(tuple(ids.shape)) < 1 / 30)
    return torch.where(hidden & (ids != PAD), torch.tensor(UNKNOWN), ids)


def jitter(pixels: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Each image moved by a few pixels and with a little gain: uint8 [B, SIZE, SIZE] to float32 [B, 1, SIZE, SIZE], standardised."""
    moved = np.zeros_like(pixels)
    for image, out, (dy, dx) in zip(pixels, moved, rng.integers(-SHIFT, SHIFT + 1, (len(pixels), 2)), strict=True):
        out[max(dy, 0) : SIZE + min(dy, 0), max(dx, 0) : SIZE + min(dx, 0)] = image[max(-dy, 0) : SIZE - max(dy, 0), max(-dx, 0) : SIZE - max(dx, 0)]
    gain = torch.from_numpy(rng.uniform(0.93, 1.07, (len(pixels), 1, 1, 1)).astype(np.float32))
    return standardise(torch.from_numpy(moved)) * gain


def pair_loss(model: PhantomModel, images: torch.Tensor, texts: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sigmoid loss of every image and text of the batch (Zhai et al. 2023), with computed agreement as target.

    Of each text the true and the false images weigh the same; pairs that cannot be told (NaN) weigh nothing.
    """
    logits = model.scale.exp() * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T + model.bias
    known = ~target.isnan()
    positive, negative = (target == 1) & known, (target == 0) & known
    share = 0.5 / positive.sum(0, keepdim=True).clamp(min=1) * positive + 0.5 / negative.sum(0, keepdim=True).clamp(min=1) * negative
    return (share * F.softplus(torch.where(positive, -logits, logits))).sum() / target.shape[1]


def train(
    pixels: np.ndarray, truth: np.ndarray, words: list[str], epochs: int, batch: int, seed: int, checkpoint: Path | None = None, verbose: bool = True
) -> tuple[PhantomModel, list[tuple[int, float]]]:
    """Trains both towers from nothing; returns them and the loss curve as (step, mean loss of the epoch).

    `checkpoint` is written after every epoch and continued from where it is there; the result is the same.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 17])
    tokenizer = WordTokenizer(words)
    model = PhantomModel(len(tokenizer))
    model.image.to(memory_format=torch.channels_last)
    per_epoch = len(pixels) // batch
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=epochs * per_epoch, pct_start=0.1)
    curve: list[tuple[int, float]] = []
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        rng.bit_generator.state, curve = saved["rng"], saved["curve"]
    model.train()
    for epoch in range(len(curve), epochs):
        started, losses = time.perf_counter(), []
        order = rng.permutation(len(pixels))
        for first in range(0, per_epoch * batch, batch):
            index = order[first : first + batch]
            sentences = batch_texts(rng, truth[index], 3 * batch)
            target = torch.from_numpy(agreement(truth[index], sentences))
            images = model.image(jitter(pixels[index], rng))
            loss = pair_loss(model, images, model.text(token_ids(tokenizer, sentences, rng)), target)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if verbose and len(losses) % 40 == 0:
                print(f"  {len(losses)}/{per_epoch} {np.mean(losses[-40:]):.4f} {time.perf_counter() - started:.0f} s", flush=True)
        curve.append(((epoch + 1) * per_epoch, float(np.mean(losses))))
        print(f"epoch {epoch + 1}/{epochs} loss {curve[-1][1]:.4f} {time.perf_counter() - started:.0f} s", flush=True)
        if checkpoint is not None:
            saved = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
            torch.save({**saved, "rng": rng.bit_generator.state, "curve": curve}, checkpoint)
    return model.eval(), curve


Score = tuple[float, float, int]
"""AUROC by the label as reported, AUROC by what is planted, and the number of images that have the label."""


def zero_shot(encoder: PhantomCLIP, embeddings: np.ndarray, collected: list[Row]) -> dict[str, Score]:
    """`Score` of each label for the embeddings [n, dim] of frontal views."""
    planted = {LABEL_OF[n]: [r.phantom.findings.worst(n) > 0 for r in collected] for n in LABEL_OF}
    result = {}
    for label, (positive, negative) in zero_shot_prompts().items():
        score = embeddings @ (encoder.encode_text(positive).mean(0) - encoder.encode_text(negative).mean(0))
        stated = np.array([r.labels[label] == 1.0 for r in collected])
        there = np.array(planted.get(label, stated))
        result[label] = (float(roc_auc_score(stated, score)), float(roc_auc_score(there, score)), int(stated.sum()))
    return result


def evaluate(encoder: PhantomCLIP, images: int, cache: Path | None, workers: int) -> dict[str, dict[str, Score]]:
    """Scores of the frontal views among `images` phantoms of each of `TEST_SEEDS`, and of all together (`all`)."""
    result, together = {}, []
    for seed in TEST_SEEDS:
        tested = [r for r in collection(images, seed, False) if r.phantom.capture.view == "frontal"]
        pixels = draw(tested, 320, SIZE, cache, f"test{seed}-", workers)
        x = np.concatenate([encoder.encode(pixels[i : i + 64]) for i in range(0, len(pixels), 64)])
        result[str(seed)] = zero_shot(encoder, x, tested)
        together.append((x, tested))
    result["all"] = zero_shot(encoder, np.concatenate([x for x, _ in together]), [r for _, t in together for r in t])
    return result


def mean(scores: dict[str, Score], kind: int = 0) -> float:
    """Mean over labels: 0 of the stated, 1 of the planted."""
    return float(np.mean([s[kind] for s in scores.values()]))


def card(arguments: argparse.Namespace, curve: list[tuple[int, float]], found: dict[str, dict[str, Score]], sizes: dict[str, float]) -> str:
    """The model card, Markdown."""
    loss = "\n".join(f"| {step} | {value:.4f} |" for step, value in curve)
    table = "\n".join(f"| {label} | {n} | {a:.3f} | {b:.3f} |" for label, (a, b, n) in found["all"].items())
    seeds = "\n".join(f"| mean, seed {seed} alone | | {mean(found[str(seed)]):.3f} | {mean(found[str(seed)], 1):.3f} |" for seed in TEST_SEEDS)
    weak = sorted((a, label) for label, (a, _, _) in found["all"].items() if a < 0.85)
    named = ", ".join(f"{label} ({a:.2f})" for a, label in weak)
    weakest = f"Weakest: {named}." if weak else "No label is below 0.85."
    return f"""# phantom-clip

A small image and text encoder trained on synthetic chest radiographs (`docs/phantom.md`). **A stand-in: it says nothing about clinical images.**
It lets every stage of MedSAE run on embeddings of real, entangled concepts on a machine without internet or GPU.

| | |
|---|---|
| image tower | {SIZE} x {SIZE} bytes, 8 convolutions, {sizes["image"]:.2f} M parameters |
| text tower | {sizes["words"]:.0f} words and one unknown-word token, a transformer layer of width 96, {sizes["text"]:.2f} M parameters |
| joint space | {DIM} dimensions, unit norm |
| file | float16 safetensors, {sizes["bytes"] / 1e6:.2f} MB |

## Training
{arguments.images} phantoms (seed {TRAIN_SEED}, one of each patient, drawn at {DRAWN_SIZE} pixels; one more finding is planted into {100 * PLANTED_SHARE:.0f} % of them,
small and rare ones most often), {arguments.epochs} epochs, batch {arguments.batch}, AdamW, seed {arguments.seed}. Texts are made from the truth: a short report of each
image (findings with side and severity, denials, view, sex, exposure, rotation) and statements drawn without looking at it. Many texts of a batch are true of many images,
so agreement is computed for every pair, and the loss is the sigmoid loss over all pairs (Zhai et al. 2023). No finding has an axis or an output of its own.
The script is `benchmarks/train_phantom_clip.py`; the same arguments on the same machine give the same file.

| step | loss |
|---:|---:|
{loss}

## Zero-shot on unseen patients
{arguments.test} phantoms of each of {len(TEST_SEEDS)} other seeds ({", ".join(map(str, TEST_SEEDS))}), natural prevalence, drawn at 320 pixels; frontal views. Score: mean
similarity to the texts for a label minus that to the texts against it (`medsae.encoders.phantom_text.zero_shot_prompts`). *Stated*: the label is 1.0 (what the pipeline
sees; a hedged label counts as negative although the finding is there). *Planted*: the finding is there, however slight.

| label | images | AUROC, stated | AUROC, planted |
|---|---:|---:|---:|
{table}
| **mean** | | **{mean(found["all"]):.3f}** | **{mean(found["all"], 1):.3f}** |
{seeds}

## Limits
{weakest}
Words outside of its vocabulary share one token: `PhantomCLIP.tokenizer.unknown(text)` names them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for phantom_clip.safetensors, .json and .md")
    parser.add_argument("--cache", type=Path, help="folder that keeps the drawn images")
    parser.add_argument("--images", type=int, default=8000, help="training phantoms")
    parser.add_argument("--test", type=int, default=400, help="phantoms of each seed of the zero-shot table; 0 for none")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of training; the weights depend on it in the last digits")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw; the result does not depend on it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    collected = collection(arguments.images, TRAIN_SEED, True)
    pixels = draw(collected, DRAWN_SIZE, SIZE, arguments.cache, "train", arguments.workers)
    print(f"drawn in {time.perf_counter() - started:.0f} s", flush=True)
    words = vocabulary()
    sources = (Path(__file__), Path(__file__).with_name("phantom_captions.py"), Path(phantom_clip.__file__))
    code = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:12]
    plan = f"{arguments.images}-{arguments.epochs}-{arguments.batch}-{arguments.seed}-{arguments.threads}-{code}"
    checkpoint = arguments.cache / f"training-{plan}.pt" if arguments.cache else None
    truth = np.stack([facts(r.phantom) for r in collected])
    model, curve = train(pixels, truth, words, arguments.epochs, arguments.batch, arguments.seed, checkpoint)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "phantom_clip.safetensors"
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    path.write_bytes(save(state))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (arguments.out / "phantom_clip.json").write_text(json.dumps({"sha256": digest, "words": words}, indent=1) + "\n")
    print(f"trained in {time.perf_counter() - started:.0f} s, sha256 {digest}", flush=True)
    if arguments.test:
        found = evaluate(PhantomCLIP(weights=str(path), words=words), arguments.test, arguments.cache, arguments.workers)
        sizes = {k: sum(p.numel() for p in getattr(model, k).parameters()) / 1e6 for k in ("image", "text")}
        sizes.update(words=len(words), bytes=path.stat().st_size)
        (arguments.out / "phantom_clip.md").write_text(card(arguments, curve, found, sizes))
        for label, (stated, planted, n) in found["all"].items():
            print(f"{label:28s} {n:5d} {stated:.3f} {planted:.3f}")
        print(" ".join(f"{seed} {mean(scores):.3f} {mean(scores, 1):.3f}" for seed, scores in found.items()))
        print(f"done in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
