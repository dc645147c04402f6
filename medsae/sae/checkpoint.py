"""Saving and loading of trained autoencoders (`docs/artifacts.md`), readable by SAELens."""

from __future__ import annotations

import json
import posixpath
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from medsae.artifacts import RunDir
from medsae.errors import ArtifactError
from medsae.sae.interop import DL_WEIGHTS, from_dictionary_learning, from_saelens
from medsae.sae.model import SAE

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
LOG = "training.jsonl"


def saelens_config(sae: SAE) -> dict[str, Any]:
    """`cfg.json`: SAELens' own keys, and the rest under `metadata`."""
    config: dict[str, Any] = {
        "architecture": sae.activation,
        "d_in": sae.d,
        "d_sae": sae.m,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": sae.metadata,
    }
    if sae.activation == "topk":
        config.update(k=sae.k, rescale_acts_by_decoder_norm=False)
    return config


def as_lines(log: list[dict[str, Any]]) -> bytes:
    """A training log as JSON lines."""
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in log).encode()


def save(sae: SAE, run: RunDir, folder: str, log: list[dict[str, Any]] | None = None) -> dict[str, str]:
    """Publishes an autoencoder under a folder of the run (`sae/NAME`); returns relative paths to SHA-256."""
    outputs = {}
    path = posixpath.join(folder, WEIGHTS)
    outputs[path] = run.write_bytes(path, save_tensors({k: v.cpu().contiguous() for k, v in sae.tensors.items()}))
    if log is not None:
        path = posixpath.join(folder, LOG)
        outputs[path] = run.write_bytes(path, as_lines(log))
    # Last: whoever finds the configuration finds the weights.
    path = posixpath.join(folder, CONFIG)
    outputs[path] = run.write_json(path, saelens_config(sae))
    return outputs


def load(where: str | Path | tuple[RunDir, str]) -> SAE:
    """A trained autoencoder, from its folder (or URI), or from a run and its name. Reads what this package, sae-lens and dictionary-learning save.

    Raises:
        ArtifactError: what is missing or does not fit, in one line.
    """
    run, folder = (where[0], f"sae/{where[1]}") if isinstance(where, tuple) else (RunDir(str(where)), "")
    place = run.path(folder)
    if not run.exists(posixpath.join(folder, CONFIG)):
        if run.exists(posixpath.join(folder, DL_WEIGHTS)):
            return from_dictionary_learning(run, folder)
        raise ArtifactError(f"{place} holds no {CONFIG}; run `medsae fit` first or give the folder of an SAE")
    try:
        config = run.read_json(posixpath.join(folder, CONFIG))
        tensors = load_tensors(run.read_bytes(posixpath.join(folder, WEIGHTS)))
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ArtifactError(f"{place}: damaged SAE ({' '.join(str(error).split())}); run `medsae fit` again") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{place}: {CONFIG} is not a mapping; run `medsae fit` again")
    return from_saelens(config, tensors, place)
