"""An OpenAI-compatible chat server that looks at the planted images: it names the bright quarter, and says whether an image shows a name.

Real HTTP, scripted answers, and faults on request.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image

from tests.support.planted import LABELS


@dataclass
class Script:
    """What the server does and what it saw. `faults`: answers given, in turn, instead of the first real ones."""

    faults: list[Any] = field(default_factory=list)
    requests: int = 0
    answered: int = 0
    most_in_flight: int = 0
    in_flight: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    key: str | None = None
    delay: float = 0.0


def quarters(url: str) -> list[bool]:
    """Which label each quarter of a planted image shows."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("L"), float)
    return [bool(pixels[16 * (c // 2) : 16 * (c // 2) + 16, 16 * (c % 2) : 16 * (c % 2) + 16].mean() > 90) for c in range(4)]


def chat(content: str, finish: str = "stop", logprobs: dict[str, float] | None = None) -> dict[str, Any]:
    """A chat completion."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
    if logprobs:
        tops = [{"token": t, "logprob": math.log(p)} for t, p in logprobs.items()]
        choice["logprobs"] = {"content": [{"token": content, "logprob": math.log(logprobs[content]), "top_logprobs": tops}]}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 60}}
    return {"id": "x", "object": "chat.completion", "model": "scripted", "choices": [choice], "usage": usage}


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """What an expert would say."""
    content = body["messages"][0]["content"]
    shown = [quarters(part["image_url"]["url"]) for part in content if part["type"] == "image_url"]
    text = " ".join(part["text"] for part in content if part["type"] == "text")
    concept = (re.search(r"Concept: ([\w ]+?)(?: \(|\n| Does| Answer|$)", text) or [None, ""])[1]
    column = LABELS.index(concept) if concept in LABELS else None
    choices = (body.get("structured_outputs") or {}).get("choice")
    if choices == ["0", "1"]:
        sure = 0.5 if column is None else 0.95 if shown[0][column] else 0.05
        yes = "1" if sure > 0.5 else "0"
        return chat(yes, logprobs={"1": sure, "0": 1 - sure})
    if choices:
        share = np.array(shown).sum(0)
        common = int(share.argmax())
        odd = next((i for i, image in enumerate(shown) if not image[common]), 0)
        return chat(choices[odd])
    if "shown" in body["response_format"]["json_schema"]["schema"]["properties"]:
        return chat(json.dumps({"shown": [int(column is not None and image[column]) for image in shown]}))
    # Of captioned contrast prompts, the silent images count against.
    captions = [part["text"] for part in content if part["type"] == "text"][1:-1]
    sign = np.array([-1 if c.startswith("silent") else 1 for c in captions]) if len(captions) == len(shown) else np.ones(len(shown))
    votes = (np.array(shown) * sign[:, None]).sum(0)
    if votes.max() < 0.6 * (sign > 0).sum():
        return chat(json.dumps({"description": "Nothing.", "shared": False, "concept": "none", "kind": "other", "confidence": 10}))
    concept = LABELS[int(votes.argmax())]
    return chat(json.dumps({"description": f"A bright {concept}.", "shared": True, "concept": concept, "kind": "finding", "confidence": 90}))


@contextmanager
def scripted_server(script: Script) -> Iterator[str]:
    """Runs the server on a free port of the loopback and yields its URL."""
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "scripted"}]}

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> JSONResponse:
        import asyncio

        script.requests += 1
        script.in_flight += 1
        script.most_in_flight = max(script.most_in_flight, script.in_flight)
        try:
            body = await request.json()
            await asyncio.sleep(script.delay)
            if script.key and request.headers.get("Authorization") != f"Bearer {script.key}":
                return JSONResponse({"error": "key"}, 401)
            if script.faults:
                fault = script.faults.pop(0)
                if isinstance(fault, int):
                    return JSONResponse({"error": "no"}, fault, headers={"Retry-After": "0.01"} if fault == 429 else None)
                return JSONResponse(fault)
            script.answered += 1
            script.bodies.append(body)
            return JSONResponse(answer(body))
        finally:
            script.in_flight -= 1

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
