"""Requests and tokens per second of the naming service beside the same engine offline, one request at a time, and the paper's way; in one run.

    python benchmarks/naming.py [--model DIRECTORY] [--requests N] [--images N] [--hidden 1024 --layers 8] [--json FILE]

Without --model a Gemma3 of toy size with random weights is made (--hidden, --layers); with it, any Gemma3-class directory, with --load-format dummy or auto.
All rows answer the same prompts (the naming prompt, N images each) under the same JSON schema and engine arguments; every engine starts with an empty cache.

* offline: vLLM's own `LLM.chat` on the whole batch: what the engine can do.
* serve: the service over HTTP, twice as many requests in flight as the engine takes sequences.
* serve-one: the service, one request at a time.
* transformers-4: `generate` of transformers on the same model, batches of 4, as many new tokens as the engine's answers have on average (the paper's way).

The first row of a pair warms up on other images. `cached` is the share of prompt tokens that the engine found in its prefix cache. `CPU seconds` says which
processes worked while a row was timed: on a machine where client, proxy, ingress and engine share the cores, that is where the difference goes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil
from PIL import Image

from medsae.naming.client import ChatClient
from medsae.naming.images import data_url
from medsae.naming.prompts import NAME_ANSWER, load_prompt
from tests.support.ports import free_port
from tests.support.tiny_gemma3 import ENVIRONMENT, write_tiny_gemma3


def prompts(count: int, images: int, size: int, pool: int, seed: int) -> list[list[dict[str, Any]]]:
    """`count` naming prompts of `images` images each, drawn from a pool: neurons share images."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    urls = []
    for _ in range(pool):
        cy, cx, r = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), rng.uniform(0.1, 0.3)
        pixels = rng.integers(0, 60, (size, size)) + 150 * ((y - cy) ** 2 + (x - cx) ** 2 < r**2)
        urls.append(data_url(Image.fromarray(pixels.astype(np.uint8)), size))
    prompt = load_prompt("name-v1", NAME_ANSWER)
    return [prompt.messages([urls[i] for i in np.sort(rng.choice(pool, images, replace=False))]) for _ in range(count)]


def row(seconds: float, requests: int, prompt: int, completion: int, cached: int, failed: int) -> dict[str, Any]:
    return {
        "requests": requests,
        "seconds": round(seconds, 2),
        "requests/s": round(requests / seconds, 2),
        "tokens/s": round((prompt + completion) / seconds, 1),
        "answer tokens": completion,
        "cached": round(cached / max(prompt, 1), 3),
        "failed": failed,
    }


KINDS = {
    "EngineCore": "engine",
    "VLLM": "engine",
    "LLMServer": "replica of the engine",
    "NamingIngress": "ingress",
    "Proxy": "proxy",
    "haproxy": "proxy",
    "raylet": "Ray",
    "gcs_server": "Ray",
    "ray::": "Ray",
    "ServeController": "Ray",
}
"""What a process is, by the first of these that its title holds; the rest is the caller (and, offline, the engine's front)."""


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far, user and system, of this process and its descendants, by what they are."""
    found: dict[str, float] = {}
    here = psutil.Process()
    for process in [here, *here.children(recursive=True)]:
        try:
            title, times = " ".join(process.cmdline()[:2]), process.cpu_times()
        except psutil.Error:
            continue
        kind = "caller" if process.pid == here.pid else next((v for k, v in KINDS.items() if k in title), "Ray")
        found[kind] = found.get(kind, 0.0) + times.user + times.system
    return found


def spent(before: dict[str, float]) -> dict[str, float]:
    """CPU seconds since `before`, where they are worth telling."""
    return {kind: round(now - before.get(kind, 0.0), 1) for kind, now in cpu_seconds().items() if now - before.get(kind, 0.0) >= 0.1}


def offline(settings: dict[str, Any]) -> dict[str, Any]:
    """vLLM's LLM class on the whole batch; in a process of its own."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    engine = LLM(model=settings["model"], disable_log_stats=True, **settings["engine"])
    sampling = SamplingParams(
        temperature=0.0, seed=0, max_tokens=settings["max_tokens"], structured_outputs=StructuredOutputsParams(json=NAME_ANSWER)
    )
    engine.chat(prompts(8, settings["images"], settings["size"], 32, 999), sampling, use_tqdm=False)
    questions = prompts(settings["requests"], settings["images"], settings["size"], settings["pool"], 0)
    before, started = cpu_seconds(), time.perf_counter()
    outputs = engine.chat(questions, sampling, use_tqdm=False)
    seconds, cpu = time.perf_counter() - started, spent(before)
    prompt = sum(len(o.prompt_token_ids) for o in outputs)
    completion = sum(len(o.outputs[0].token_ids) for o in outputs)
    cached = sum(o.num_cached_tokens or 0 for o in outputs)
    return row(seconds, len(outputs), prompt, completion, cached, sum(o.outputs[0].finish_reason == "length" for o in outputs)) | {"cpu": cpu}


async def through(url: str, settings: dict[str, Any], seed: int, count: int, concurrency: int) -> dict[str, Any]:
    """The service over HTTP."""
    async with ChatClient(url, concurrency=concurrency) as client:
        await asyncio.gather(
            *(client.ask(m, schema=NAME_ANSWER, max_tokens=settings["max_tokens"]) for m in prompts(8, settings["images"], settings["size"], 32, 999))
        )
        warm = (client.usage.prompt_tokens, client.usage.completion_tokens, client.usage.cached_tokens, client.usage.failed)
        questions = prompts(count, settings["images"], settings["size"], settings["pool"], seed)
        before, started = cpu_seconds(), time.perf_counter()
        await asyncio.gather(*(client.ask(m, schema=NAME_ANSWER, max_tokens=settings["max_tokens"]) for m in questions))
        seconds, cpu = time.perf_counter() - started, spent(before)
        usage = client.usage
        now = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.failed)
    prompt, completion, cached, failed = (b - a for a, b in zip(warm, now, strict=True))
    return row(seconds, count, prompt, completion, cached, failed) | {"cpu": cpu}


def served(settings: dict[str, Any]) -> dict[str, Any]:
    """Both rows of the service; in a process of its own."""
    import ray

    from medsae.pipeline.naming_service import naming_service

    logging.disable(logging.INFO)
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=400 * 2**20, log_to_driver=False)
    args = {"model": settings["model"], "images": settings["images"], "engine": settings["engine"], "environment": settings["environment"]}
    with naming_service(args, port=free_port(), timeout=600) as url:
        many = asyncio.run(through(url, settings, 0, settings["requests"], 2 * settings["engine"]["max_num_seqs"]))
        one = asyncio.run(through(url, settings, 1, max(8, settings["requests"] // 8), 1))
    ray.shutdown()
    return {"serve": many, "serve-one": one}


def paper_way(settings: dict[str, Any]) -> dict[str, Any]:
    """transformers' generate in batches of 4; in a process of its own."""
    import base64
    import io

    import torch
    from transformers import AutoConfig, AutoProcessor, Gemma3ForConditionalGeneration

    dtype = getattr(torch, settings["engine"]["dtype"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(settings["model"])
    processor.tokenizer.padding_side = "left"
    torch.manual_seed(0)
    if settings["engine"].get("load_format") == "dummy":
        model = Gemma3ForConditionalGeneration(AutoConfig.from_pretrained(settings["model"])).to(device, dtype).eval()
    else:
        model = Gemma3ForConditionalGeneration.from_pretrained(settings["model"], dtype=dtype).to(device).eval()
    count = max(8, settings["requests"] // 8)
    questions = prompts(count, settings["images"], settings["size"], settings["pool"], 0)
    tokens = settings["answer_tokens"]

    def generate(batch: list[list[dict[str, Any]]]) -> int:
        texts, pictures = [], []
        for messages in batch:
            content = [{"type": "image"} if p["type"] == "image_url" else p for p in messages[0]["content"]]
            texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
            urls = [p["image_url"]["url"] for p in messages[0]["content"] if p["type"] == "image_url"]
            pictures.append([Image.open(io.BytesIO(base64.b64decode(u.split(",")[1]))).convert("RGB") for u in urls])
        inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True).to(device)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with torch.inference_mode():
            model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
        return int(inputs["input_ids"].numel())

    generate(questions[:4])
    before, started = cpu_seconds(), time.perf_counter()
    prompt = sum(generate(questions[i : i + 4]) for i in range(0, count, 4))
    return row(time.perf_counter() - started, count, prompt, count * tokens, 0, 0) | {"cpu": spent(before)}


ROWS = {"offline": offline, "served": served, "paper": paper_way}


def apart(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A row in a process of its own, so that no engine shares memory or threads with another."""
    with tempfile.TemporaryDirectory() as folder:
        task, out = Path(folder) / "task.json", Path(folder) / "out.json"
        task.write_text(json.dumps(settings))
        environment = {**os.environ, **settings["environment"], "RAY_AUTH_MODE": "disabled"}
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, "--row", name, str(task), str(out)], env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        result: dict[str, Any] = json.loads(out.read_text())
        print(f"{name}, {time.perf_counter() - begun:.0f} s with its start: {json.dumps(result)}", file=sys.stderr, flush=True)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--load-format", default=None)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--pool", type=int, default=100)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="float32 is the fastest on CPUs without bfloat16"
    )
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--skip", nargs="*", default=[], choices=list(ROWS))
    parser.add_argument("--json")
    parser.add_argument("--row", nargs=3)
    arguments = parser.parse_args()
    if arguments.row:
        name, task, out = arguments.row
        Path(out).write_text(json.dumps(ROWS[name](json.loads(Path(task).read_text()))))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or str(write_tiny_gemma3(Path(folder) / "gemma", arguments.size, arguments.hidden, arguments.layers))
        engine = {
            "dtype": arguments.dtype,
            "max_model_len": arguments.max_model_len,
            "max_num_seqs": arguments.max_num_seqs,
            "enforce_eager": True,
            "limit_mm_per_prompt": {"image": arguments.images},
            "enable_prefix_caching": True,
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
        load = arguments.load_format or (None if arguments.model else "dummy")
        if load:
            engine["load_format"] = load
        settings: dict[str, Any] = {"model": model, "engine": engine, "environment": ENVIRONMENT}
        settings |= {k: getattr(arguments, k) for k in ("requests", "images", "pool", "size", "max_tokens")}
        rows: dict[str, dict[str, Any]] = {}
        if "offline" not in arguments.skip:
            rows["offline"] = apart("offline", settings)
        if "served" not in arguments.skip:
            rows |= apart("served", settings)
        if "paper" not in arguments.skip and rows:
            first = next(iter(rows.values()))
            settings["answer_tokens"] = max(1, round(first["answer tokens"] / first["requests"]))
            rows["transformers-4"] = apart("paper", settings)
    keys = ["requests", "seconds", "requests/s", "tokens/s", "answer tokens", "cached", "failed"]
    print(f"{'':16}" + "".join(f"{k:>15}" for k in keys))
    for name, values in rows.items():
        print(f"{name:16}" + "".join(f"{values[k]:>15}" for k in keys))
    ratios = {n: round(rows["serve"]["requests/s"] / rows[n]["requests/s"], 2) for n in rows if "serve" in rows and n != "serve"}
    for name, values in rows.items():
        print(f"CPU seconds, {name}: " + ", ".join(f"{kind} {value}" for kind, value in sorted(values["cpu"].items(), key=lambda item: -item[1])))
    for name, ratio in ratios.items():
        print(f"serve / {name}: {ratio}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": {**settings, "model": None}, "rows": rows, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
