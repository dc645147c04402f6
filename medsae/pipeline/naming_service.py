"""The naming service: a Gemma3-class vision-language model (MedGemma) through vLLM behind Ray Serve, OpenAI-compatible."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import ray
from pydantic import Field, ValidationError
from ray import serve
from ray.serve.context import _get_global_client

from medsae.errors import ConfigError, ServiceError
from medsae.settings import Section

if TYPE_CHECKING:
    from ray.serve.deployment import Application

log = logging.getLogger("medsae")

MODEL_ID = "medgemma"


class ServiceConfig(Section):
    """Arguments of the service's builder (`args` in a Serve YAML)."""

    model: str = "google/medgemma-4b-it"
    """Model directory or hub id: anything of vLLM's that takes images and chat, Gemma3 first of all."""
    model_id: str = MODEL_ID
    """Id that requests name."""
    images: int = Field(16, gt=0)
    """Most images a prompt."""
    image_size: int = Field(448, gt=0)
    """Longest side, in pixels, of the images that `/v1/names` shows the model."""
    data_root: str | None = None
    """Folder or URI that references to images (`exemplars`) are relative to; without one, only images in the request."""
    api_key_env: str | None = None
    """Environment variable, on the machine of the ingress, that holds the key which requests must bear. Default: no key is asked for."""
    max_body_mb: float = Field(64.0, gt=0)
    """Largest body of a request."""
    max_neurons: int = Field(256, gt=0)
    """Most neurons in one `/v1/names` request."""
    max_queued: int = Field(512, gt=0)
    """Requests in work at an ingress; more get 429 with Retry-After."""
    accelerator: str | None = None
    """`cpu`, or a Ray accelerator type such as `L4` or `A100`; default: `cpu` where the cluster has no GPU, else any GPU."""
    replicas: int | None = Field(None, gt=0)
    """A fixed number of engines; default: between `min_replicas` and `max_replicas`, by load."""
    min_replicas: int = Field(1, ge=0)
    """Fewest engines."""
    max_replicas: int = Field(1, gt=0)
    """Most engines."""
    max_ongoing_requests: int = Field(256, gt=0)
    """Requests that an engine takes at a time; it batches them continuously."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM engine arguments, on top of the defaults."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the engine."""


def service_config(args: dict[str, Any]) -> ServiceConfig:
    """Builder arguments as a ServiceConfig.

    Raises:
        ConfigError: one line that names the key.
    """
    try:
        return ServiceConfig.model_validate(args)
    except ValidationError as error:
        problems = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise ConfigError("naming service: " + "; ".join(problems)) from error


def check_model(model: str) -> None:
    """Says early what a missing model directory would say after minutes.

    Raises:
        ConfigError: `model` looks like a path and holds no `config.json`.
    """
    looks_like_path = model.startswith((".", "/", "~")) or Path(model).expanduser().is_dir()
    if looks_like_path and not (Path(model).expanduser() / "config.json").is_file():
        raise ConfigError(f"model directory {model} holds no config.json; give a directory as `save_pretrained` writes it, or a hub id")


def llm_config(config: ServiceConfig, gpus: int) -> Any:
    """The `ray.serve.llm.LLMConfig` of a ServiceConfig on a cluster with this many GPUs."""
    from ray.serve.llm import LLMConfig

    check_model(config.model)
    accelerator = config.accelerator or (None if gpus else "cpu")
    engine: dict[str, Any] = {
        "max_model_len": 8192,
        "limit_mm_per_prompt": {"image": config.images},
        "enable_prefix_caching": True,
        # Without it answers do not say how much of a prompt came from the cache.
        "enable_prompt_tokens_details": True,
        # Images come in the request: the engine must not fetch addresses that a request names.
        "allowed_media_domains": ["none.invalid"],
        # The backend must be named: without it, white space between the keys stays allowed and a weak model loops on it.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    if accelerator == "cpu":
        engine |= {"dtype": "bfloat16", "max_num_seqs": 16}
    deployment: dict[str, Any] = {"max_ongoing_requests": config.max_ongoing_requests}
    if config.replicas is not None:
        deployment["num_replicas"] = config.replicas
    else:
        deployment["autoscaling_config"] = {
            "min_replicas": config.min_replicas,
            "max_replicas": max(config.max_replicas, config.min_replicas),
            "target_ongoing_requests": max(1, config.max_ongoing_requests // 2),
        }
    source = str(Path(config.model).expanduser()) if Path(config.model).expanduser().is_dir() else config.model
    options: dict[str, Any] = {"accelerator_config": {"kind": "cpu"}} if accelerator == "cpu" else {}
    if accelerator not in (None, "cpu"):
        options["accelerator_type"] = accelerator
    return LLMConfig(
        model_loading_config={"model_id": config.model_id, "model_source": source},
        engine_kwargs={**engine, **config.engine},
        deployment_config=deployment,
        runtime_env={"env_vars": config.environment} if config.environment else None,
        log_engine_metrics=False,
        **options,
    )


def build(args: dict[str, Any]) -> Application:
    """The Serve application; `args` are those of `ServiceConfig`. Usable as `import_path` of a Serve YAML."""
    try:
        from medsae.pipeline.naming_ingress import application
    except ImportError as error:
        raise ConfigError(f"the naming service needs vLLM ({error.name} is missing): install medsae[gpu], or medsae[cpu] without a GPU") from error
    config = service_config(args)
    gpus = int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0
    app: Application = application(config, llm_config(config, gpus))
    return app


@contextmanager
def naming_service(args: dict[str, Any], port: int = 8123, app_name: str = "naming", timeout: float = 1800.0) -> Iterator[str]:
    """Starts the service for the length of a block and yields its base URL. Ray must be connected.

    On a cluster where Serve runs already the application joins it, on Serve's own port; otherwise Serve is started on this machine's loopback, on `port`,
    and shut down afterwards.

    Raises:
        ServiceError: it did not come up.
    """
    application = build(args)
    log.info("naming: starting the service with %s", args.get("model", ServiceConfig().model))
    started = time.perf_counter()
    own = _get_global_client(raise_if_no_controller_running=False) is None
    if own:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        try:
            serve.run(application, name=app_name, route_prefix=f"/{app_name}")
        except (RuntimeError, ray.exceptions.RayError) as error:
            raise ServiceError(f"the naming service did not start with {args.get('model')}: {str(error).splitlines()[0]}") from error
        url = f"http://127.0.0.1:{_get_global_client().http_config.port}/{app_name}"
        _wait(url, timeout)
        log.info("naming: the service is up after %.0f s", time.perf_counter() - started)
        yield url
    finally:
        serve.delete(app_name)
        if own:
            serve.shutdown()


def _wait(url: str, timeout: float) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/v1/models", timeout=10, trust_env=False).status_code in (200, 401):
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise ServiceError(f"the naming service at {url} did not answer within {timeout:.0f} s")
