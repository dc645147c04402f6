"""The HTTP side of the naming service: OpenAI's chat endpoint, `/v1/names` and `/v1/names/score`, with key, limits and back-pressure."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Annotated, Any

import numpy as np
import ray
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.serve.llm import build_llm_deployment
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from medsae.errors import MedSAEError
from medsae.naming.client import ChatClient, Reply, status_of
from medsae.naming.images import ImageStore, RequestImages
from medsae.naming.judges import ChatJudge
from medsae.naming.namers import ChatNamer, Exemplar, Subject
from medsae.naming.prompts import NAME_ANSWER, load_prompt
from medsae.naming.scoring import evaluate
from medsae.pipeline.guard import Guard, api_key
from medsae.pipeline.guard import error as refusal
from medsae.pipeline.naming_service import ServiceConfig

RETRY_AFTER = 2
"""Seconds that a caller is told to wait when the queue is full."""


class NeuronRequest(BaseModel):
    """A neuron to name, by images in the request or by references to files that the service can read."""

    model_config = ConfigDict(extra="forbid")

    neuron: int = 0
    images: list[str] = Field(default_factory=list)
    exemplars: list[str] = Field(default_factory=list)
    captions: list[Annotated[str, Field(max_length=200)]] | None = None


class NamesRequest(BaseModel):
    """Body of `POST /v1/names`."""

    model_config = ConfigDict(extra="forbid")

    neurons: list[NeuronRequest] = Field(min_length=1)
    prompt: str = Field("name-v1", pattern="^(name|contrast)-v[0-9]+$")
    max_tokens: int = Field(300, gt=0, le=4096)


class ScoreRequest(BaseModel):
    """Body of `POST /v1/names/score`: a name, images, and whether the neuron fires on each."""

    model_config = ConfigDict(extra="forbid")

    concept: str = Field(max_length=400)
    description: str = Field("", max_length=2000)
    images: list[str] = Field(default_factory=list)
    exemplars: list[str] = Field(default_factory=list)
    active: list[bool] | None = None


def guarded_app(config: ServiceConfig) -> FastAPI:
    """The FastAPI application that the ingress is made with. No answer repeats what a request held: it may be an image of a patient."""
    app = FastAPI(title="MedSAE naming")
    app.add_middleware(
        Guard,
        key_env=config.api_key_env,
        max_body=int(config.max_body_mb * 2**20),
        max_in_work=config.max_queued,
        retry_after=RETRY_AFTER,
        open_paths=(),
    )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return refusal(422, f"{'.'.join(str(p) for p in first['loc'])}: {first['msg']}")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return refusal(code_of(error), f"the engine did not answer ({type(error).__name__})")

    return app


def code_of(error: BaseException) -> int:
    """HTTP status of what went wrong in the engine: 400 where the request is to blame, 503 where the engine is gone or full."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None else error
    told = getattr(cause, "status_code", None)
    if isinstance(told, int):
        return told
    if isinstance(cause, ray.exceptions.RayActorError | ray.serve.exceptions.BackPressureError | ray.serve.exceptions.DeploymentUnavailableError):
        return 503
    return 400 if isinstance(cause, ValueError) or isinstance(error, ValueError) else 500


def reason_of(error: BaseException) -> str:
    """A sentence for the caller: of a refusal the engine's own first line, else only what kind of failure it is."""
    if code_of(error) in (400, 404):
        lines = str(getattr(error, "message", "") or getattr(error, "cause", "") or error).splitlines()
        return lines[-1][:300] if lines else "the engine refused the request"
    return f"the engine did not answer ({type(error).__name__})"


class Inside(ChatClient):
    """A client that asks the engine of its own ingress."""

    def __init__(self, ingress: NamingIngress, request: Request, model: str, concurrency: int = 32) -> None:
        super().__init__("", model, concurrency=concurrency, retries=4)
        self.ingress, self.request = ingress, request
        self._begin()

    async def post(self, body: dict[str, Any]) -> Reply:
        """Sends one question to the engine."""
        response = await self.ingress.chat(ChatCompletionRequest(**body), self.request)
        code = response.status_code
        return Reply("ok", 200, json.loads(bytes(response.body))) if code == 200 else Reply(status_of(code), code)


class NamingIngress(OpenAiIngress):
    """OpenAI's chat endpoint and, on the same engine, naming and scoring."""

    def __init__(self, llm_deployments: dict[str, Any], model_cards: dict[str, Any], *, service: ServiceConfig) -> None:
        super().__init__(llm_deployments, model_cards)
        self.service = service
        api_key(service.api_key_env)
        self.store = ImageStore(service.data_root, service.image_size) if service.data_root else None

    async def completions_of_chat(self, request: Request) -> Response:
        """OpenAI's chat endpoint. Parsed here: vLLM's request class answers some malformed bodies with a TypeError, which would be our fault to the caller."""
        try:
            body = ChatCompletionRequest.model_validate(await request.json())
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            what = f"{error.error_count()} invalid fields" if isinstance(error, ValidationError) else "not a chat completion request"
            return refusal(422, what)
        return await self.chat(body, request)

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """One chat completion; what goes wrong becomes a status and a sentence."""
        try:
            response: Response = await super().chat(body, request)
        except Exception as error:
            return refusal(code_of(error), reason_of(error))
        return response

    async def names(self, body: NamesRequest, request: Request) -> Response:
        """Names neurons; a JSON line each as it comes, then a line with the totals."""
        if len(body.neurons) > self.service.max_neurons:
            return refusal(422, f"{len(body.neurons)} neurons: at most {self.service.max_neurons} a request")
        for index, neuron in enumerate(body.neurons):
            count = len(neuron.images) + len(neuron.exemplars)
            if not 0 < count <= self.service.images:
                return refusal(422, f"neurons.{index}: {count} images: between 1 and {self.service.images} a neuron")
            if neuron.captions is not None and len(neuron.captions) != count:
                return refusal(422, f"neurons.{index}: {len(neuron.captions)} captions for {count} images")
        try:
            prompt = load_prompt(body.prompt, NAME_ANSWER)
        except MedSAEError as error:
            return refusal(422, str(error))
        images = RequestImages(self.service.image_size, self.store)
        asker = Inside(self, request, self.service.model_id)
        namer = ChatNamer(lambda: asker, prompt, images, self.service.model_id, body.max_tokens)
        return StreamingResponse(_stream(namer, asker, body.neurons), media_type="application/x-ndjson")

    async def names_score(self, body: ScoreRequest, request: Request) -> Response:
        """Judges a name on images, one a request to the engine: a probability each, and the figures where `active` is given."""
        paths = [*body.images, *body.exemplars]
        if not 0 < len(paths) <= self.service.max_neurons:
            return refusal(422, f"{len(paths)} images: between 1 and {self.service.max_neurons} a request")
        if body.active is not None and len(body.active) != len(paths):
            return refusal(422, f"active has {len(body.active)} values for {len(paths)} images")
        asker = Inside(self, request, self.service.model_id)
        rows = np.arange(len(paths))
        images = RequestImages(self.service.image_size, self.store)
        judge = ChatJudge(asker, load_prompt("detect-v1"), images, rows, np.array(paths, object), self.service.model_id, {})
        scores = await judge.judge(body.concept, body.description, rows)
        answer: dict[str, Any] = {"probabilities": [_number(s) for s in scores], "failures": int(np.isnan(scores).sum()), "usage": vars(asker.usage)}
        if body.active is not None:
            figures = evaluate(np.array(body.active), scores, rows)
            answer["figures"] = {k: _number(v) for k, v in vars(figures).items()}
        return JSONResponse(answer)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


async def _stream(namer: ChatNamer, asker: Inside, neurons: list[NeuronRequest]) -> AsyncIterator[bytes]:
    async def one(index: int, neuron: NeuronRequest) -> dict[str, Any]:
        paths = [*neuron.images, *neuron.exemplars]
        captions = neuron.captions or [""] * len(paths)
        shown = tuple(Exemplar(str(i), path, 0.0, i, caption) for i, (path, caption) in enumerate(zip(paths, captions, strict=True)))
        name = await namer.name_one(asker, Subject(neuron.neuron, {}, shown))
        row = {k: v for k, v in vars(name).items() if k not in ("evidence", "namer")}
        return {"index": index, **row, "confidence": _number(name.confidence), "unreadable": name.evidence["unreadable"]}

    slots = asyncio.Semaphore(asker.concurrency)

    async def bounded(index: int, neuron: NeuronRequest) -> dict[str, Any]:
        async with slots:
            return await one(index, neuron)

    tasks = [asyncio.create_task(bounded(i, n)) for i, n in enumerate(neurons)]
    statuses: dict[str, int] = {}
    try:
        for task in asyncio.as_completed(tasks):
            row = await task
            statuses[row["status"]] = statuses.get(row["status"], 0) + 1
            yield json.dumps(row).encode() + b"\n"
    finally:
        # The client went away: what is not answered yet need not be.
        for task in tasks:
            task.cancel()
    yield json.dumps({"done": True, "statuses": statuses, "usage": vars(asker.usage)}).encode() + b"\n"


ENDPOINTS: dict[str, Any] = {
    "models": lambda app: app.get("/v1/models"),
    "completions_of_chat": lambda app: app.post("/v1/chat/completions"),
    "names": lambda app: app.post("/v1/names"),
    "names_score": lambda app: app.post("/v1/names/score"),
}


def application(config: ServiceConfig, llm: Any) -> Any:
    """Engine and ingress as one Serve application."""
    ingress = make_fastapi_ingress(NamingIngress, endpoint_map=ENDPOINTS, app=guarded_app(config))
    # num_cpus 0: the engine's placement group may hold all CPUs of a small machine.
    options = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 10 * config.max_queued, "num_replicas": 1}
    return serve.deployment(ingress, name="NamingIngress", **options).bind(
        llm_deployments={config.model_id: build_llm_deployment(llm)},
        model_cards={config.model_id: to_model_metadata(config.model_id, llm)},
        service=config,
    )
