"""The feature service: an uploaded radiograph to the active neurons of a run's SAE, as a Ray Serve application.

Two deployments: the ingress checks, decodes and preprocesses (CPU, no weights); the model batches, encodes and runs the SAE (a GPU where it has one).
Neither logs, stores or repeats anything of a request.
"""

from __future__ import annotations

import asyncio
import math
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, File, HTTPException, Path, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field, ValidationError
from ray import serve
from ray.serve.deployment import Application
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartParser

from medsae.artifacts import RunDir
from medsae.data import radiograph
from medsae.encoders.config import EncoderConfig
from medsae.errors import ArtifactError, ConfigError, DataError
from medsae.pipeline.guard import Guard, api_key, error
from medsae.report.load import Measured, read_measured
from medsae.settings import Section

RETRY_AFTER = 2


class FeatureServiceConfig(Section):
    """Arguments of the service."""

    run: str
    """Run directory or bucket prefix whose encoder and SAE are served."""
    sae: str | None = None
    """Which SAE; default: the first of the run's configuration."""
    top: int = Field(20, gt=0)
    """Neurons in an answer when the request does not say."""
    api_key_env: str | None = None
    """Environment variable that holds the key which requests must bear. Set it on every node before Ray starts, or by `runtime_env`."""
    max_body_mb: float = Field(32, gt=0)
    """Largest body of a request."""
    max_pixels: int = Field(50_000_000, gt=0)
    """Images with more pixels are refused before they are decoded."""
    max_in_work: int = Field(64, gt=0)
    """Requests in work at one ingress replica; one more is answered 429 with Retry-After."""
    batch: int = Field(32, gt=0)
    """Images a forward pass at most."""
    batch_wait_s: float = Field(0.01, ge=0)
    """How long a forward pass waits for more images."""
    replicas: int = Field(1, gt=0)
    """Replicas of the model."""
    ingress_replicas: int = Field(1, gt=0)
    """Replicas of the ingress: decoding is CPU work."""
    num_gpus: float = Field(0, ge=0)
    """GPUs a model replica."""
    num_cpus: float = Field(1, gt=0)
    """CPUs a model replica; the forward pass uses as many threads."""
    environment: dict[str, str] = {}
    """Environment variables of the replicas, for what is not secret: Serve shows an application's arguments to whoever may see the cluster."""


def build(args: dict[str, Any]) -> Application:
    """The Serve application; `args` as in `FeatureServiceConfig`.

    Raises:
        ConfigError: an argument is missing, unknown or out of range.
        ArtifactError: the run has no such SAE.
    """
    try:
        config = FeatureServiceConfig.model_validate(args)
    except ValidationError as problem:
        raise ConfigError("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in problem.errors())) from problem
    run = RunDir(config.run)
    name = config.sae or first_sae(run)
    if not run.exists(f"sae/{name}/cfg.json"):
        raise ArtifactError(f"{run.path('sae')} holds no SAE {name!r}; there is {', '.join(run.folders('sae')) or 'none'}")
    measured, encoder = read_measured(run, name), run.read_manifest().get("encoder")
    if not encoder:
        raise ArtifactError(f"{run.path('manifest.json')} names no encoder; run `medsae extract` first")
    environment = {"env_vars": config.environment} if config.environment else {}
    model = FeatureModel.options(  # type: ignore[attr-defined]
        num_replicas=config.replicas,
        # Serve hands a replica at most this many requests at once: fewer than a batch would cap the batch.
        max_ongoing_requests=2 * config.batch + 8,
        max_queued_requests=4 * config.max_in_work,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus, "runtime_env": environment},
    ).bind(config, name)
    api = FeatureAPI.options(  # type: ignore[attr-defined]
        num_replicas=config.ingress_replicas,
        ray_actor_options={"num_cpus": 0.5, "runtime_env": environment},
        # Above the guard's own limit, so that the guard answers and health checks still get through.
        max_ongoing_requests=2 * config.max_in_work + 16,
        max_queued_requests=2 * config.max_in_work,
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_AFTER},
    )
    application: Application = api.bind(config, measured, encoder, model)
    return application


def first_sae(run: RunDir) -> str:
    """The SAE that is served unless another is asked for: the first of the run's configuration that was trained."""
    configured = [s["name"] for s in (run.read_manifest().get("config") or {}).get("sae") or []]
    trained = run.folders("sae")
    names = [n for n in configured if n in trained] or trained
    if not names:
        raise ArtifactError(f"{run.path('sae')} holds no SAE; run `medsae fit` first")
    return names[0]


@serve.deployment(name="FeatureModel")
class FeatureModel:
    """Holds the encoder and the SAE; images that arrive together go through together."""

    def __init__(self, config: FeatureServiceConfig, sae: str) -> None:
        import torch

        from medsae.encoders import load_encoder
        from medsae.sae import load

        self.device = "cuda" if config.num_gpus > 0 else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(max(1, int(config.num_cpus)))
        run = RunDir(config.run)
        manifest = run.read_manifest()
        settings = EncoderConfig.model_validate(manifest["config"]["encoder"])
        self.encoder = load_encoder(settings.name, settings.weights, self.device, seed=settings.seed, dtype=settings.dtype, sha256=settings.sha256)
        # Not the fingerprint: it holds the arithmetic too, and a run made on a GPU may be served without one.
        for key in ("dim", "trained", "weights_sha256"):
            recorded, found = manifest["encoder"].get(key), getattr(self.encoder.info, key)
            if recorded != found:
                raise ArtifactError(f"encoder {settings.name}: {key} is {found}, the run was made with {recorded}; serve it with the same weights")
        self.sae = load((run, sae)).to(self.device)
        if self.sae.d != self.encoder.dim:
            raise ArtifactError(f"SAE {sae} takes {self.sae.d} features, encoder {settings.name} has {self.encoder.dim}")
        self.batch.set_max_batch_size(config.batch)
        self.batch.set_batch_wait_timeout_s(config.batch_wait_s)

    def forward(self, pixels: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """uint8 [H, W] images to, each, the embedding float32 [d], the active neurons' indices and their activations, highest first."""
        import torch

        x = self.encoder.encode(np.stack(pixels))
        with torch.inference_mode():
            z = self.sae.encode(torch.from_numpy(np.ascontiguousarray(x)).to(self.device)).cpu().numpy()
        answers = []
        for embedding, code in zip(x, z, strict=True):
            active = np.flatnonzero(code > 0)
            active = active[np.argsort(-code[active], kind="stable")]
            answers.append((embedding, active, code[active]))
        return answers

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def batch(self, pixels: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """One forward pass; in a thread, so that the replica goes on taking requests and answering health checks."""
        return await asyncio.to_thread(self.forward, pixels)

    async def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        answer: tuple[np.ndarray, np.ndarray, np.ndarray] = await self.batch(pixels)
        return answer

    async def ready(self) -> bool:
        """True: a replica that answers has loaded its weights."""
        return True


@serve.deployment(name="FeatureAPI")
@serve.ingress()
class FeatureAPI:
    """The ingress: checks, decodes, preprocesses, asks the model, and knows the neurons' names and figures."""

    def __init__(self, config: FeatureServiceConfig, measured: Measured, encoder: dict[str, Any], model: DeploymentHandle) -> None:
        from medsae.encoders import load_preprocess

        self.config, self.measured, self.model = config, measured, model
        api_key(config.api_key_env)  # says at once that it is not set
        self.preprocess = load_preprocess(encoder["name"])
        self.about = {"encoder": {k: encoder.get(k) for k in ("name", "trained", "notice")}, "sae": measured.name}
        # A decoded image may hold `max_pixels` bytes: few at a time.
        self.decoding = asyncio.Semaphore(4)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The HTTP application, made in the replica."""
        # An upload stays in memory: a temporary file would leave a patient's image on the disk.
        MultiPartParser.spool_max_size = int(self.config.max_body_mb * 2**20) + 1
        app = FastAPI(title="MedSAE features", description="An uploaded radiograph to the active neurons of a sparse autoencoder.")
        app.add_middleware(
            Guard,
            key_env=self.config.api_key_env,
            max_body=int(self.config.max_body_mb * 2**20),
            max_in_work=self.config.max_in_work,
            retry_after=RETRY_AFTER,
        )
        _add_errors(app)
        _add_features(app, self)
        _add_neurons(app, self)
        _add_health(app, self)
        return app

    async def encode(self, upload: UploadFile) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An upload to its embedding, its active neurons and their activations."""
        async with self.decoding:
            pixels = await asyncio.to_thread(self._prepare, await upload.read())
        answer: tuple[np.ndarray, np.ndarray, np.ndarray] = await self.model.remote(pixels)
        return answer

    def _prepare(self, data: bytes) -> np.ndarray:
        return self.preprocess(radiograph.decode(data, self.config.max_pixels))

    def neuron(self, index: int) -> dict[str, Any]:
        """What a list says of a neuron: name and main figures."""
        m, named = self.measured, self.measured.names.get(index)
        return {
            "neuron": index,
            "name": named["concept"] if named and named["status"] == "ok" else None,
            "top_label": str(m.columns["top_label"][index]) or None,
            "top_r": _number(m.columns["top_r"][index]),
        }

    def neuron_details(self, index: int) -> dict[str, Any]:
        """All that is known of a neuron. Exemplars go by `image_id`, never by path."""
        m, named = self.measured, self.measured.names.get(index)
        keys = ("namer", "model", "concept", "description", "kind", "status")
        return {
            **self.neuron(index),
            **{k: _number(m.columns[k][index]) for k in ("frequency", "mean", "max", "entropy", "monosemanticity") if k in m.columns},
            "dead": bool(m.columns["dead"][index]),
            "correlations": {label: _number(m.r[index, c]) for c, label in enumerate(m.labels)},
            "naming": {k: named[k] for k in keys} if named else None,
            "exemplars": [{"image_id": e["image_id"], "activation": _number(e["activation"]), "role": e["role"]} for e in m.exemplars.get(index, [])],
        }


def _number(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _add_errors(app: FastAPI) -> None:
    """Every error is one line of JSON that repeats nothing of the request."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, problem: StarletteHTTPException) -> JSONResponse:
        return error(problem.status_code, str(problem.detail), dict(problem.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, problem: RequestValidationError) -> JSONResponse:
        first = problem.errors()[0]
        return error(422, f"{'.'.join(str(p) for p in first['loc'])}: {first['msg']}")

    @app.exception_handler(DataError)
    async def unusable(request: Request, problem: DataError) -> JSONResponse:
        return error(413 if str(problem).startswith("too many pixels") else 422, str(problem))

    @app.exception_handler(BackPressureError)
    async def busy(request: Request, problem: BackPressureError) -> JSONResponse:
        return error(429, "the service is busy, try again later", {"Retry-After": str(RETRY_AFTER)})

    @app.exception_handler(Exception)
    async def failed(request: Request, problem: Exception) -> JSONResponse:
        return error(500, f"the model did not answer ({type(problem).__name__})")


def _add_features(app: FastAPI, api: Any) -> None:
    @app.post("/v1/features", summary="The active neurons of an image, highest first")
    async def features(image: Annotated[UploadFile, File()], top: Annotated[int | None, Query(ge=1, le=65536)] = None) -> dict[str, Any]:
        _, neurons, activations = await api.encode(image)
        shown = top or api.config.top
        rows = [{**api.neuron(int(n)), "activation": _number(a)} for n, a in zip(neurons[:shown], activations[:shown], strict=True)]
        return {**api.about, "n_active": len(neurons), "neurons": rows}

    @app.post("/v1/embeddings", summary="The encoder's embedding of an image")
    async def embeddings(image: Annotated[UploadFile, File()]) -> dict[str, Any]:
        embedding, _, _ = await api.encode(image)
        return {**api.about, "dim": len(embedding), "embedding": [float(v) for v in embedding]}


def _add_neurons(app: FastAPI, api: Any) -> None:
    @app.get("/v1/neurons", summary="The SAE's neurons, highest correlation first")
    async def neurons(
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        label: Annotated[str | None, Query(max_length=200)] = None,
    ) -> dict[str, Any]:
        m = api.measured
        if label is not None and label not in m.labels:
            raise HTTPException(404, f"no such label; there are {', '.join(m.labels)}")
        r = m.columns["top_r"].astype(np.float64) if label is None else m.r[:, m.labels.index(label)]
        order = np.argsort(-np.nan_to_num(r, nan=-np.inf), kind="stable")[offset : offset + limit]
        return {**api.about, "total": m.n_neurons, "neurons": [api.neuron(int(n)) for n in order]}

    @app.get("/v1/neurons/{index}", summary="All that is known of one neuron")
    async def neuron(index: Annotated[int, Path(ge=0)]) -> dict[str, Any]:
        if index >= api.measured.n_neurons:
            raise HTTPException(404, f"no such neuron; they are numbered 0 to {api.measured.n_neurons - 1}")
        return {**api.about, **api.neuron_details(index)}


def _add_health(app: FastAPI, api: Any) -> None:
    @app.get("/healthz", summary="The ingress lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="The model answers")
    async def readyz() -> JSONResponse:
        try:
            await asyncio.wait_for(_await(api.model.ready.remote()), 5)
        except Exception:  # whatever it is, the model does not answer
            return error(503, "the model does not answer")
        return JSONResponse({"status": "ready", **api.about})


async def _await(response: Any) -> Any:
    return await response
