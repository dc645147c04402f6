"""Configuration of naming and scoring."""

from typing import Any, Literal

from pydantic import Field

from medsae.settings import Section


class NameConfig(Section):
    """Who names the neurons, and which."""

    namer: Literal["label", "medgemma"] = "label"
    """`label`: the best-correlated label with its figures. `medgemma`: the naming service."""
    model: str = "google/medgemma-4b-it"
    """Model directory or hub id behind the naming service."""
    url: str | None = None
    """Base URL of a running naming service; without one the stage starts its own and stops it."""
    api_key_env: str = "MEDSAE_API_KEY"
    """Environment variable that holds the service's API key, where it asks for one."""
    images: int = Field(8, gt=0)
    """Images a prompt."""
    image_size: int = Field(448, gt=0)
    """Longest side, in pixels, of the images that are sent."""
    neurons: int | None = Field(None, gt=0)
    """Name at most this many neurons, best first; default all selected."""
    prompt: str = "name-v1"
    """Prompt file: one of the package's, or a path."""
    concurrency: int = Field(32, gt=0)
    """Requests in flight; about twice the engine's `max_num_seqs` keeps it busy."""
    retries: int = Field(6, ge=0)
    """Times that a request is sent again after 429, 5xx, a time-out or a lost connection, with back-off."""
    timeout: float = Field(300.0, gt=0)
    """Seconds a request may take."""
    max_tokens: int = Field(300, gt=0)
    """Tokens an answer may take."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM engine arguments of an own service, on top of the defaults (`{load_format: dummy}`, `{max_num_seqs: 64}`)."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of an own service's engine (`{VLLM_CPU_KVCACHE_SPACE: "4"}`)."""


class ScoreConfig(Section):
    """How names are scored."""

    images: int = Field(20, gt=0)
    """Activating images a neuron, and as many not activating."""
