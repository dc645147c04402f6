"""Autoencoders saved by `sae-lens` and `dictionary-learning`, read as `SAE`. Formats as those packages write them (sae-lens 6, dictionary-learning 0.1)."""

from __future__ import annotations

import io
import json
import pickle
import posixpath
from typing import Any

import torch
from torch import Tensor

from medsae.artifacts import RunDir
from medsae.errors import ArtifactError
from medsae.sae.model import SAE, TENSORS

DL_WEIGHTS, DL_CONFIG = "ae.pt", "config.json"


def subtract_bias(activation: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An encoder that sees x - b_dec as one that sees x: biases take up the product."""
    shift = (tensors["b_dec"].double() @ tensors["W_enc"].double()).to(tensors["W_enc"].dtype)
    if activation == "gated":
        mag = tensors["b_mag"] - tensors["r_mag"].exp() * shift
        return {**tensors, "b_gate": tensors["b_gate"] - shift, "b_mag": mag}
    return {**tensors, "b_enc": tensors["b_enc"] - shift}


def scale_by_decoder_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pre-activations times decoder norm, decoder rows of norm 1: the same reconstruction."""
    norm = tensors["W_dec"].norm(dim=1)
    return {**tensors, "W_enc": tensors["W_enc"] * norm, "b_enc": tensors["b_enc"] * norm, "W_dec": tensors["W_dec"] / norm[:, None]}


def from_saelens(config: dict[str, Any], tensors: dict[str, Tensor], place: str) -> SAE:
    """`cfg.json` and the weights beside it, as sae-lens (and this package) writes them.

    Raises:
        ArtifactError: an architecture or an input transformation that inference here does not have.
    """
    activation = config.get("architecture")
    if activation not in TENSORS:
        raise ArtifactError(f"{place}: architecture {activation!r} cannot be loaded; there is {', '.join(TENSORS)} (sae-lens: save_inference_model)")
    normalization = config.get("normalize_activations", "none")
    if normalization not in ("none", "expected_average_only_in") or config.get("reshape_activations", "none") != "none":
        raise ArtifactError(
            f"{place}: inputs normalised by {normalization!r} or reshaped cannot be loaded; fold the normalisation into the weights first"
        )
    missing = [name for name in TENSORS[activation] if name not in tensors]
    if missing:
        raise ArtifactError(f"{place}: SAE weights lack {', '.join(missing)}, which {activation} needs")
    kept = {name: tensors[name].float() for name in TENSORS[activation]}
    if config.get("apply_b_dec_to_input", False):
        kept = subtract_bias(activation, kept)
    if config.get("rescale_acts_by_decoder_norm", False):
        kept = scale_by_decoder_norm(kept)
    return SAE(activation, kept, config.get("k"), config.get("metadata") or {})


def from_dictionary_learning(run: RunDir, folder: str) -> SAE:
    """`ae.pt` and `config.json` of a trainer's folder, with the outputs that dictionary-learning's own `load_dictionary` gives.

    Raises:
        ArtifactError: a damaged file or an unknown class of dictionary.
    """
    place = run.path(folder)
    try:
        state = torch.load(io.BytesIO(run.read_bytes(posixpath.join(folder, DL_WEIGHTS))), map_location="cpu", weights_only=True)
        config = json.loads(run.read_bytes(posixpath.join(folder, DL_CONFIG)))["trainer"]
        kind = config["dict_class"]
    except (json.JSONDecodeError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ArtifactError(f"{place}: {DL_WEIGHTS} or {DL_CONFIG} is damaged or not of dictionary-learning") from error
    try:
        return _from_dictionary_learning(kind, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, place)
    except KeyError as error:
        raise ArtifactError(f"{place}: {DL_WEIGHTS} lacks {error}, which {kind} needs") from error


def _from_dictionary_learning(kind: str, state: dict[str, Tensor], place: str) -> SAE:
    about = {"source": "dictionary-learning", "dict_class": kind}
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        tensors = {name: state[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        tensors["threshold"] = state["threshold"].expand(len(tensors["b_enc"])).clone()
        return SAE("jumprelu", subtract_bias("jumprelu", tensors) if kind.startswith("Matryoshka") else tensors, None, about)
    bias = {
        "AutoEncoder": "bias",
        "AutoEncoderNew": "decoder.bias",
        "GatedAutoEncoder": "decoder_bias",
        "AutoEncoderTopK": "b_dec",
        "BatchTopKSAE": "b_dec",
    }
    if kind not in bias:
        raise ArtifactError(f"{place}: dictionary class {kind!r} cannot be loaded; there is {', '.join(sorted([*bias, 'JumpReluAutoEncoder']))}")
    tensors = {"W_enc": state["encoder.weight"].T.contiguous(), "W_dec": state["decoder.weight"].T.contiguous(), "b_dec": state[bias[kind]]}
    if kind == "GatedAutoEncoder":
        tensors |= {"b_gate": state["gate_bias"], "r_mag": state["r_mag"], "b_mag": state["mag_bias"]}
        return SAE("gated", subtract_bias("gated", tensors), None, about)
    tensors["b_enc"] = state["encoder.bias"]
    if kind == "AutoEncoderNew":
        return SAE("standard", tensors, None, about)
    if kind == "AutoEncoder":
        # Its loader scales decoder columns to norm 1 before anything is encoded; the encoder's input bias is not scaled.
        return SAE("standard", subtract_bias("standard", scale_by_decoder_norm(tensors)), None, about)
    if kind == "BatchTopKSAE":
        tensors["threshold"] = state["threshold"].expand(len(tensors["b_enc"])).clone()
        return SAE("jumprelu", subtract_bias("jumprelu", tensors), None, about)
    return SAE("topk", subtract_bias("topk", tensors), int(state["k"]), about)
