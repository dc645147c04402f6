"""Configuration of naming and scoring."""

from typing import Any, Literal

from pydantic import Field

from medsae.settings import Section


class NameConfig(Section):
    """Who names the neurons, and which."""

    namer: Literal["label", "vocabulary", "medgemma"] = "label"
    """`label`: the best-correlated label with its figures. `vocabulary`: the term whose text embedding is nearest to the neuron's direction.
    `medgemma`: the naming service."""
    select: Literal["alive", "active", "all"] = "alive"
    """Neurons to name: those above `measure.alive_correlation`, those that are not dead, or all."""
    neurons: int | None = Field(None, gt=0)
    """Name at most this many neurons, strongest correlation first; default all selected."""
    vocabulary: str = "auto"
    """Terms of the `vocabulary` namer: `chest`, a file, or `auto` (the encoder's own concepts where it has any, else `chest`)."""
    model: str = "google/medgemma-4b-it"
    """Model directory or hub id behind the naming service."""
    url: str | None = None
    """Base URL of a running naming service; without one the stage starts its own and stops it."""
    api_key_env: str = "MEDSAE_API_KEY"
    """Environment variable that holds the service's API key, where it asks for one."""
    recipe: Literal["quantile", "top", "paper", "contrast"] = "quantile"
    """Images that name a neuron, of the naming half of the patients. `quantile`: spread over the ranks of the activating images, with their strength.
    `top`: the strongest. `paper`: both ends of the upper two thirds, shuffled (the paper: 30 images). `contrast`: half of them near misses."""
    images: int = Field(8, gt=0)
    """Images a prompt."""
    image_size: int = Field(448, gt=0)
    """Longest side, in pixels, of the images that are sent."""
    metadata: list[Literal["view", "projection", "sex", "age"]] = Field(default_factory=list)
    """Columns told beside each image. They can name the answer by themselves: the names are marked, and scored without them."""
    columns: list[str] = Field(default_factory=list)
    """Further columns of the CSV that are told beside each image, such as its report (the first 500 characters). As with `metadata`, names are marked."""
    prompt: str | None = None
    """Prompt file: one of the package's, or a path. Default: `name-v1`, with `contrast` `contrast-v1`."""
    concurrency: int = Field(32, gt=0)
    """Requests in flight; about twice the engine's `max_num_seqs` keeps it busy."""
    retries: int = Field(40, ge=0)
    """Times that a request is sent again after 429, 5xx, a time-out or a lost connection, with back-off up to 10 s: some five minutes, in which an engine
    that died is up again. When as many requests in a row as `concurrency` are lost all the same, the stage ends; run again, it goes on."""
    timeout: float = Field(300.0, gt=0)
    """Seconds a request may take."""
    max_tokens: int = Field(300, gt=0)
    """Tokens an answer may take."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM engine arguments of an own service, on top of the defaults (`{load_format: dummy}`, `{max_num_seqs: 64}`)."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of an own service's engine (`{VLLM_CPU_KVCACHE_SPACE: "4"}`)."""


class ScoreConfig(Section):
    """How names are scored. Images are of patients that named nothing."""

    methods: list[Literal["labels", "embedding", "detection", "intruder", "paper"]] | None = None
    """`labels`: the data set's labels judge (label names only). `embedding`: the encoder's text tower. `detection`: the naming service, one image a
    request. `paper`: the same with five images a request. `intruder`: the service finds the image that does not belong. Default: `labels` for label
    names, `embedding` for vocabulary names, `detection` and `intruder` for names of the service."""
    images: int = Field(20, gt=0)
    """Activating images a neuron, and as many not activating, half of them hard."""
    min_images: int = Field(5, gt=0)
    """Neurons that fire on fewer scoring images are counted, not scored."""
    neurons: int | None = Field(None, gt=0)
    """Score at most this many neurons an SAE, in the order of their index drawn by the seed; default all named."""
    prompt: str | None = None
    """Prompt file of `detection`; default `detect-v1`."""
