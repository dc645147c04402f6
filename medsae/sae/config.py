"""Configuration of sparse autoencoders."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from medsae.settings import Section

ArchitectureName = Literal["standard", "april", "topk", "batch_topk", "matryoshka_batch_topk", "jumprelu", "gated"]

_TOPK: dict[str, Any] = {"lr": None, "beta1": 0.9, "clip": 1.0, "k": 32, "aux": 1 / 32, "k_aux": None, "dead_epochs": 2.0, "selection": "float32"}
_BATCH_TOPK: dict[str, Any] = {**_TOPK, "threshold_decay": 0.99}

OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {"lr": 1e-3, "beta1": 0.9, "clip": None, "l1": 4.0, "sparsity_warmup": 0.1, "dead_epochs": 2.0, "resample_epochs": None},
    "april": {"lr": 5e-4, "beta1": 0.9, "clip": 1.0, "l1": 4.0, "sparsity_warmup": 0.1, "dead_epochs": 2.0},
    "topk": _TOPK,
    "batch_topk": _BATCH_TOPK,
    "matryoshka_batch_topk": {**_BATCH_TOPK, "groups": (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)},
    "jumprelu": {
        "lr": 5e-4,
        "beta1": 0.9,
        "clip": 1.0,
        "l0": 4.0,
        "sparsity_warmup": 0.3,
        "dead_epochs": 2.0,
        "threshold": 0.5,
        "bandwidth": 1.0,
    },
    "gated": {"lr": 5e-4, "beta1": 0.0, "clip": None, "l1": 4.0, "sparsity_warmup": 0.1, "dead_epochs": 2.0},
}
"""What an architecture takes beyond the options of all, with its defaults. `lr` None: 2e-4 / sqrt(dict_size / 16384)."""

_COMMON = {"name", "architecture", "dict_size", "epochs", "batch_size", "warmup", "decay", "checkpoints"}


class SAEConfig(Section):
    """One sparse autoencoder and how it is trained. An option that the architecture does not take is an error."""

    name: str = Field("standard", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the artifact folder; unique in a run. Default: the architecture."""
    architecture: ArchitectureName = "standard"
    """Architecture, see `docs/sae.md`."""
    dict_size: int = Field(8192, gt=0, le=2**22)
    """Dictionary size m: number of neurons."""
    epochs: int = Field(200, gt=0)
    """Passes over the training split."""
    batch_size: int = Field(1024, gt=0)
    """Global batch size in samples, over all workers; batches are made equal, so the last is not short."""
    lr: float | None = Field(None, gt=0, le=1)
    """Adam learning rate. Default: by architecture."""
    beta1: float | None = Field(None, ge=0, lt=1)
    """Adam's first-moment decay; the second is 0.999. Default: by architecture."""
    clip: float | None = Field(None, gt=0)
    """Clip the norm of the gradient. Default: by architecture (1.0, or none)."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises linearly from 0."""
    decay: float = Field(0.2, ge=0, le=1)
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    checkpoints: int = Field(10, ge=1, le=1000)
    """Training checkpoints taken over the whole training, at ends of epochs."""
    l1: float | None = Field(None, ge=0)
    """Sparsity coefficient of `standard`, `april` and `gated`, for inputs scaled to mean squared norm d."""
    l0: float | None = Field(None, ge=0)
    """Sparsity coefficient of `jumprelu` (on the number of active neurons), for inputs scaled to mean squared norm d."""
    sparsity_warmup: float | None = Field(None, ge=0, le=1)
    """Share of the steps over which the sparsity coefficient rises linearly from 0."""
    k: int | None = Field(None, gt=0)
    """Active neurons a sample (`topk`), or on average (`batch_topk`, `matryoshka_batch_topk`)."""
    aux: float | None = Field(None, ge=0)
    """Coefficient of the AuxK loss, which revives dead neurons; 0 turns it off."""
    k_aux: int | None = Field(None, gt=0)
    """Dead neurons a sample in AuxK. Default: half the embedding width."""
    dead_epochs: float | None = Field(None, gt=0)
    """A neuron silent for this many epochs' worth of samples counts as dead."""
    resample_epochs: float | None = Field(None, gt=0)
    """Re-initialise dead neurons of `standard` every so many epochs, until 60 % of the training. Default: never."""
    threshold_decay: float | None = Field(None, ge=0, lt=1)
    """Decay of the running mean that gives the inference threshold of `batch_topk` and `matryoshka_batch_topk`."""
    groups: tuple[float, ...] | None = Field(None, min_length=1)
    """Shares of the dictionary in each Matryoshka group, innermost first; they sum to 1."""
    threshold: float | None = Field(None, gt=0)
    """Initial threshold of `jumprelu`."""
    bandwidth: float | None = Field(None, gt=0)
    """Width of the kernel of `jumprelu`'s straight-through gradient."""
    selection: Literal["float32", "bfloat16"] | None = None
    """Arithmetic in which the TopK family selects neurons; the values of selected neurons are float32 in either case."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        architecture = data.get("architecture", "standard")
        if architecture not in OPTIONS:
            return data
        options = OPTIONS[architecture]
        filled = {key: value for key, value in data.items() if value is not None or key in _COMMON}
        strange = sorted(key for key in filled if key in cls.model_fields and key not in _COMMON and key not in options)
        if strange:
            raise ValueError(f"{architecture} takes no {', '.join(strange)}; it takes {', '.join(sorted(options))}")
        for key, value in options.items():
            filled.setdefault(key, value)
        filled.setdefault("name", architecture)
        if filled["lr"] is None:
            size = filled.get("dict_size", 8192)
            filled["lr"] = 2e-4 / (int(size) / 16384) ** 0.5 if isinstance(size, int) and size > 0 else 2e-4
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> SAEConfig:
        if self.k is not None and self.k > self.dict_size:
            raise ValueError(f"k = {self.k} is above dict_size = {self.dict_size}; lower k")
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup + decay = {self.warmup + self.decay:g} is above 1; lower one")
        if self.groups is not None and (min(self.groups) <= 0 or abs(sum(self.groups) - 1) > 1e-6):
            raise ValueError(f"groups {list(self.groups)} must be positive shares that sum to 1")
        if self.groups is not None and min(self.groups) * self.dict_size < 1:
            raise ValueError(f"the smallest of groups {list(self.groups)} holds no neuron of dict_size = {self.dict_size}")
        return self


class FitConfig(Section):
    """How the sparse autoencoders of a run are trained together."""

    hold_gb: float | None = Field(None, ge=0)
    """Embeddings whose files are larger than this, in GiB, are streamed from them instead of held in memory; 0 always streams. Default: an eighth of the machine's memory."""
    window: int = Field(131_072, gt=0)
    """Samples that are shuffled together when embeddings are streamed."""
    parallel: int = Field(1, ge=1, le=1024)
    """The SAEs are dealt to this many trainings that run side by side, each with `ray.train_workers` workers of its own. 1: all share one pass."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the training log goes beside `training.jsonl`; each must be installed."""
