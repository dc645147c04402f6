"""Dead neurons: the AuxK loss (Gao et al. 2024, "Scaling and evaluating sparse autoencoders")."""

from __future__ import annotations

import torch
from torch import Tensor

from medsae.sae.base import Architecture, StepInput
from medsae.sae.sparse_ops import Dense, columns
from medsae.sae.update import Update


def auxk_loss(sae: Architecture, step: StepInput, pre: Tensor, error: Tensor, k_aux: int) -> Tensor:
    """The share of the residual's variance that dead neurons leave unexplained when they reconstruct it; this worker's part.

    e = x - x_hat is data (no gradient); of the dead neurons the k_aux largest pre-activations a sample pass a ReLU and are decoded without b_dec to e_hat;
    loss = mean ||e - e_hat||^2 / mean ||e - mean(e)||^2 over the global batch; 0 where nothing is dead or the residual has no variance.
    The gradient reaches the encoder and decoder of dead neurons (and b_dec through the encoder's input).

    Args:
        pre: pre-activations [b, m] without gradient.
        error: x - x_hat [b, d] of the main reconstruction.
        k_aux: dead neurons a sample, at most as many as are dead.
    """
    dead = step.dead.nonzero().squeeze(1)
    if len(dead) == 0:
        return error.new_zeros(())
    target = error.detach()
    moments = torch.cat([target.sum(dim=0).double(), target.double().square().sum().reshape(1)])
    step.collective.sum(moments)
    variance = moments[-1] - moments[:-1].square().sum() / step.total
    # No branch on a number of the device: it would wait.
    scale = torch.where(variance > 0, 1 / variance.clamp_min(torch.finfo(variance.dtype).tiny), 0.0).to(target.dtype)
    active = Dense(columns(pre, dead))
    shift = sae.b_dec if sae.subtract_bias else None
    values = active.linear(step.x, sae.W_enc.index_select(0, dead), sae.b_enc.index_select(0, dead), shift)
    top = values.detach().topk(min(k_aux, len(dead)), dim=1, sorted=False).indices
    code = torch.zeros_like(values).scatter(1, top, values.gather(1, top).relu())
    return (target - code @ sae.W_dec.index_select(0, dead)).square().sum() * scale


@torch.no_grad()
def resample(sae: Architecture, update: Update, step: StepInput, error: Tensor, seed: tuple[int, int]) -> int:
    """Gives dead neurons a new start on badly reconstructed samples (Bricken et al. 2023); returns how many.

    For each dead neuron a sample of the global batch is drawn without replacement with probability proportional to ||x - x_hat||^2. Its direction
    v = (x - b_dec) / ||x - b_dec|| becomes the decoder row; the encoder row is 0.2 v times the mean norm of live encoder rows; the bias is 0; Adam's moments
    of these rows are cleared. Every worker draws the same, from `seed`.

    Args:
        error: x - x_hat [b, d] of this worker's samples.
    """
    dead = step.dead.nonzero().squeeze(1)
    weights = step.collective.interleave(error.double().square().sum(dim=1)).cpu()
    count = min(len(dead), int((weights > 0).sum()))
    if count == 0:
        return 0
    generator = torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1])
    chosen = torch.multinomial(weights, count, replacement=False, generator=generator)
    dead = dead[:count]
    directions = torch.zeros(count, sae.dim, device=error.device, dtype=error.dtype)
    world, rank = step.collective.world, step.collective.rank
    mine = (chosen % world == rank).nonzero().squeeze(1)
    directions[mine.to(error.device)] = (step.x - sae.b_dec)[(chosen[mine] // world).to(error.device)]
    step.collective.sum(directions)
    directions /= directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    live = sae.W_enc[~step.dead]
    scale = live.norm(dim=1).mean() if len(live) else torch.ones((), device=error.device)
    sae.W_enc[dead] = 0.2 * scale * directions
    sae.W_dec[dead] = directions
    sae.b_enc[dead] = 0.0
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc):
        update.forget(parameter, dead)
    return count
