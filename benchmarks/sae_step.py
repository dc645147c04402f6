"""Milliseconds a training step, this project beside dictionary-learning, sae-lens and eai-sparsify, in one process on the same batches.

    python benchmarks/sae_step.py [--dim 512 --dict-size 8192 --k 32 --batch 2048 --rounds 5 --threads 2 --device cpu --json FILE]

A step is what each package's own trainer does: forward, loss, backward, gradient constraints, optimiser (fp32, AuxK code where the package has it; no
neuron is dead in the first steps, so AuxK costs nothing to anybody). All start from the same weights; encoder biases of the ReLU architectures are set so
that about k neurons are active a sample, as late in training. Packages take turns, and the fastest round of each counts. Agreement is the cosine between this project's
first update of the decoder and the peer's, for peers with the same loss. Peers that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from medsae.sae.config import OPTIONS, SAEConfig
from medsae.sae.training import Trainer

Step = Callable[[torch.Tensor], Any]
Weights = dict[str, torch.Tensor]
Made = tuple[Step, Callable[[], torch.Tensor]]
MATRYOSHKA = [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]


DEVICE = torch.device("cpu")
SAMPLES = 223_414
"""CheXpert's size: two epochs of it must pass without a sign of life before a neuron is dead."""


def start(dim: int, neurons: int, k: int, early: bool) -> Weights:
    """Weights that all start from: W [m, d] with unit rows, and a bias at which ReLU leaves about k active for standard normal inputs; 0 if early."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(neurons, dim, generator=generator)
    w /= w.norm(dim=1, keepdim=True)
    if early:
        return {"w": w, "bias": torch.zeros(neurons)}
    return {"w": w, "bias": torch.full((neurons,), -math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * k / neurons))))}


def relu_family(name: str) -> bool:
    return name in ("standard", "april", "gated", "jumprelu")


def medsae(name: str, dim: int, neurons: int, k: int, batch: int, weights: Weights, **options: Any) -> Made:
    given: dict[str, Any] = {"k": k} if "k" in OPTIONS[name] else {}
    config = SAEConfig(architecture=name, dict_size=neurons, batch_size=batch, epochs=10_000, warmup=0, lr=1e-4, **given, **options)  # type: ignore[arg-type]
    trainer = Trainer(config, dim, SAMPLES, device=DEVICE, plan=(100, batch))
    with torch.no_grad():
        trainer.sae.W_enc.copy_(weights["w"])
        trainer.sae.W_dec.copy_(weights["w"])
        if relu_family(name):
            (trainer.sae.b_gate if name == "gated" else trainer.sae.b_enc).copy_(weights["bias"])
    return trainer.step, lambda: trainer.sae.W_dec.detach()


def medsae_bfloat16(name: str, dim: int, neurons: int, k: int, batch: int, weights: Weights) -> Made | None:
    """Selection in bfloat16, selected values exact in float32; reported apart, with the share of selected pairs that are those of float32."""
    return medsae(name, dim, neurons, k, batch, weights, selection="bfloat16") if name == "topk" else None


def agreement(sizes: argparse.Namespace, x: torch.Tensor, weights: Weights) -> float:
    """Share of the k neurons of a sample that are chosen in bfloat16 and in float32 alike."""
    w, x = weights["w"].to(DEVICE), x.to(DEVICE)
    chosen = [(x.to(dtype) @ w.to(dtype).T).topk(sizes.k, dim=1).indices for dtype in (torch.float32, torch.bfloat16)]
    both = torch.zeros(2, len(x), len(w), dtype=torch.bool, device=DEVICE)
    for mask, index in zip(both, chosen, strict=True):
        mask.scatter_(1, index, True)
    return float((both[0] & both[1]).sum() / (len(x) * sizes.k))


def dictionary_learning(name: str, dim: int, neurons: int, k: int, batch: int, weights: Weights) -> Made | None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "standard": (StandardTrainer, {"lr": 1e-4, "warmup_steps": 0, "sparsity_warmup_steps": None}),
        "april": (StandardTrainerAprilUpdate, {"lr": 1e-4, "warmup_steps": 0, "sparsity_warmup_steps": None}),
        "topk": (TopKTrainer, {"k": k, "lr": 1e-4, "warmup_steps": 0}),
        "batch_topk": (BatchTopKTrainer, {"k": k, "lr": 1e-4, "warmup_steps": 0}),
        "matryoshka_batch_topk": (MatryoshkaBatchTopKTrainer, {"k": k, "lr": 1e-4, "warmup_steps": 0, "group_fractions": MATRYOSHKA}),
        "jumprelu": (JumpReluTrainer, {"lr": 1e-4, "warmup_steps": 0, "sparsity_warmup_steps": None}),
        "gated": (GatedSAETrainer, {"lr": 1e-4, "warmup_steps": 0, "sparsity_warmup_steps": None}),
    }
    kind, options = kinds[name]
    trainer = kind(steps=10**6, activation_dim=dim, dict_size=neurons, layer=0, lm_name="", device=str(DEVICE), seed=0, **options)
    state = dict(trainer.ae.named_parameters())
    with torch.no_grad():
        for key, value in state.items():
            if key in ("encoder.weight", "decoder.weight", "W_enc", "W_dec"):
                value.copy_(weights["w"] if value.shape == weights["w"].shape else weights["w"].T)
            if relu_family(name) and key in ("encoder.bias", "gate_bias", "b_enc"):
                value.copy_(weights["bias"])
    counter = iter(range(10**9))

    def step(x: torch.Tensor) -> None:
        index = next(counter)
        if index == 0 and name in ("topk", "batch_topk", "matryoshka_batch_topk"):
            index = 1  # step 0 sets b_dec to the geometric median; not part of a step
        trainer.update(index, x)

    decoder = state.get("decoder.weight", state.get("W_dec"))
    assert decoder is not None
    return step, lambda: decoder.detach() if decoder.shape == weights["w"].shape else decoder.detach().T


def sae_lens(name: str, dim: int, neurons: int, k: int, batch: int, weights: Weights) -> Made | None:
    import sae_lens as lens
    from sae_lens.saes.sae import TrainStepInput

    common: dict[str, Any] = {"d_in": dim, "d_sae": neurons, "device": str(DEVICE), "apply_b_dec_to_input": name != "april"}
    ends = [round(neurons * sum(MATRYOSHKA[: i + 1])) for i in range(len(MATRYOSHKA))]
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "april": ("Standard", {}),
        "topk": ("TopK", {"k": k}),
        "batch_topk": ("BatchTopK", {"k": k}),
        "matryoshka_batch_topk": ("MatryoshkaBatchTopK", {"k": k, "matryoshka_widths": ends}),
        "jumprelu": ("JumpReLU", {}),
        "gated": ("Gated", {}),
    }
    kinds["standard"] = kinds["april"]
    kind, options = kinds[name]
    module = getattr(lens, f"{kind}TrainingSAE")(getattr(lens, f"{kind}TrainingSAEConfig")(**common, **options))
    with torch.no_grad():
        module.W_enc.copy_(weights["w"].T)
        module.W_dec.copy_(weights["w"])
        if relu_family(name):
            (module.b_gate if name == "gated" else module.b_enc).copy_(weights["bias"])
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4, betas=(0.9, 0.999))
    silent = torch.zeros(neurons, device=DEVICE)
    coefficients = {key: getattr(value, "value", value) for key, value in module.get_coefficients().items()}

    def step(x: torch.Tensor) -> None:
        out = module.training_forward_pass(
            step_input=TrainStepInput(sae_in=x, dead_neuron_mask=silent > 1000, coefficients=coefficients, n_training_steps=1, is_logging_step=False)
        )
        with torch.no_grad():
            fired = out.feature_acts.bool().float().sum(-2).bool()
            fired = fired.to_dense() if fired.is_sparse else fired
            silent.add_(1)
            silent[fired] = 0
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: module.W_dec.detach()


def sparsify(name: str, dim: int, neurons: int, k: int, batch: int, weights: Weights) -> Made | None:
    if name != "topk":
        return None
    from sparsify import SparseCoder, SparseCoderConfig

    module = SparseCoder(dim, SparseCoderConfig(num_latents=neurons, k=k), device=DEVICE, dtype=torch.float32)
    with torch.no_grad():
        module.encoder.weight.copy_(weights["w"])
        module.W_dec.copy_(weights["w"])
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)
    silent = torch.zeros(neurons, dtype=torch.long, device=DEVICE)

    def step(x: torch.Tensor) -> None:
        module.set_decoder_norm_to_unit_norm()
        out = module(x, dead_mask=silent > 10_000_000)
        (out.fvu + out.auxk_loss / 32).backward()
        module.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(x))
        silent[out.latent_indices.flatten()] = 0

    return step, lambda: module.W_dec.detach()


PEERS: dict[str, tuple[str, Callable[..., Made | None]]] = {
    "dictionary-learning": ("dictionary_learning", dictionary_learning),
    "sae-lens": ("sae_lens", sae_lens),
    "eai-sparsify": ("sparsify", sparsify),
}
SAME_LOSS = {("topk", "dictionary-learning"), ("topk", "eai-sparsify"), ("batch_topk", "dictionary-learning"), ("standard", "dictionary-learning")}
"""Where the peer's first update should be this project's: the reconstruction loss up to its scale, which Adam takes out (the L1 weights differ a little)."""


def settle() -> None:
    """Waits for the device, so that a clock tells what was done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measure(name: str, sizes: argparse.Namespace, contestants: dict[str, Callable[..., Made | None]]) -> list[dict[str, Any]]:
    weights = start(sizes.dim, sizes.dict_size, sizes.k, sizes.early)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(sizes.batch, sizes.dim, generator=generator).to(DEVICE) for _ in range(3)]
    made = {}
    updates = {}
    rows = []
    for who, maker in contestants.items():
        try:
            found = maker(name, sizes.dim, sizes.dict_size, sizes.k, sizes.batch, weights)
        except (TypeError, AttributeError, ImportError, AssertionError) as error:
            rows.append({"architecture": name, "package": who, "ms": None, "why": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
            continue
        if found is None:
            continue
        step, decoder = found
        before = decoder().clone()
        step(batches[0])
        updates[who] = decoder() - before
        step(batches[1])
        made[who] = step
    times: dict[str, list[float]] = {who: [] for who in made}
    for turn in range(sizes.rounds):
        for who, step in made.items():
            settle()
            clock = time.perf_counter()
            step(batches[turn % 3])
            settle()
            times[who].append(1000 * (time.perf_counter() - clock))
    mine = min(times["medsae"])
    for who, taken in times.items():
        row = {"architecture": name, "package": who, "ms": round(min(taken), 1), "median_ms": round(statistics.median(taken), 1)}
        row["medsae_is_faster_by"] = round(min(taken) / mine, 2)
        if (name, who) in SAME_LOSS:
            row["cosine_of_first_update"] = round(float(torch.cosine_similarity(updates["medsae"].flatten(), updates[who].flatten(), dim=0)), 5)
        if who == "medsae, bfloat16":
            row["chosen_as_in_float32"] = round(agreement(sizes, batches[0], weights), 4)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in {"dim": 512, "dict-size": 8192, "k": 32, "batch": 2048, "rounds": 5, "threads": torch.get_num_threads()}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--architectures", default=",".join(OPTIONS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bfloat16", action="store_true", help="also time topk with selection in bfloat16")
    parser.add_argument(
        "--early", action="store_true", help="biases of 0, so that half of all neurons of the ReLU architectures are active, as at the start"
    )
    parser.add_argument("--json", default=None)
    sizes = parser.parse_args()
    torch.set_num_threads(sizes.threads)
    global DEVICE
    DEVICE = torch.device(sizes.device)
    missing = [who for who, (module, _) in PEERS.items() if importlib.util.find_spec(module) is None]
    contestants: dict[str, Callable[..., Made | None]] = {"medsae": medsae, **{w: m for w, (_, m) in PEERS.items() if w not in missing}}
    if sizes.bfloat16:
        contestants["medsae, bfloat16"] = medsae_bfloat16
    print(
        f"d {sizes.dim}, m {sizes.dict_size}, k {sizes.k}, batch {sizes.batch}, float32, {sizes.device}, {sizes.threads} threads, torch {torch.__version__}"
    )
    print(f"not installed here: {', '.join(missing) or 'none'}")
    rows = []
    for name in sizes.architectures.split(","):
        for row in measure(name, sizes, contestants):
            rows.append(row)
            line = f"{row['architecture']:24}{row['package']:22}" + (f"{row['ms']:9.1f} ms" if row["ms"] else f"  did not run: {row['why']}")
            print(
                line
                + (f"   {row['medsae_is_faster_by']:5.2f}x" if row["ms"] else "")
                + f"   {row.get('cosine_of_first_update', row.get('chosen_as_in_float32', ''))}",
                flush=True,
            )
    if sizes.json:
        with open(sizes.json, "w") as file:
            json.dump({"sizes": vars(sizes), "missing": missing, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
