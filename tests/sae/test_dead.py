"""AuxK, property by property, and resampling."""

from __future__ import annotations

import pytest
import torch

from medsae.sae.base import Architecture, StepInput
from medsae.sae.collective import Collective
from medsae.sae.config import SAEConfig
from medsae.sae.dead import auxk_loss, resample
from medsae.sae.registry import build
from medsae.sae.sparse_ops import preactivations
from medsae.sae.training import Trainer

B, D, M = 16, 6, 20


def make(b_dec: float = 0.7) -> tuple[Architecture, torch.Tensor, torch.Tensor, torch.Tensor]:
    sae = build(SAEConfig(architecture="topk", dict_size=M, k=3), D, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        sae.b_dec.fill_(b_dec)
        sae.b_enc.add_(0.3 * torch.randn(M, generator=generator))
        sae.W_dec.add_(0.2 * torch.randn(M, D, generator=generator))
    x = torch.randn(B, D, generator=generator)
    error = torch.randn(B, D, generator=generator)
    dead = torch.zeros(M, dtype=torch.bool)
    dead[[2, 5, 6, 11, 19]] = True
    return sae, x, error, dead


def auxk(sae: Architecture, x: torch.Tensor, error: torch.Tensor, dead: torch.Tensor, k_aux: int = 3) -> torch.Tensor:
    step = StepInput(x, B, 1.0, dead, Collective())
    return auxk_loss(sae, step, preactivations(x, sae.W_enc, sae.b_enc, sae.b_dec), error, k_aux)


def by_hand(sae: Architecture, x: torch.Tensor, error: torch.Tensor, dead: torch.Tensor, k_aux: int = 3) -> torch.Tensor:
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).masked_fill(~dead, -torch.inf)
    kept = pre.topk(k_aux, dim=1)
    code = torch.zeros(B, M).scatter(1, kept.indices, kept.values.relu())
    return (error - code @ sae.W_dec).square().sum() / (error - error.mean(0)).square().sum()


def test_value_and_gradients_are_those_of_the_formula() -> None:
    sae, x, error, dead = make()
    parameters = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    mine, theirs = auxk(sae, x, error, dead), by_hand(sae, x, error, dead)
    torch.testing.assert_close(mine, theirs)
    for a, b in zip(torch.autograd.grad(mine, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_1_decodes_without_the_bias() -> None:
    sae, x, error, dead = make()
    before = auxk(sae, x, error, dead)
    with torch.no_grad():  # the same encoder, another decoder bias
        sae.b_enc += sae.W_enc @ torch.full((D,), 5.0)
        sae.b_dec += 5.0
    torch.testing.assert_close(auxk(sae, x, error, dead), before, rtol=1e-4, atol=1e-5)


def test_2_residual_is_detached() -> None:
    sae, x, error, dead = make()
    error.requires_grad_()
    loss = auxk(sae, x, error, dead)
    assert torch.autograd.grad(loss, error, allow_unused=True)[0] is None


def test_3_normalised_by_the_variance_of_the_residual() -> None:
    sae, x, error, dead = make()
    with torch.no_grad():
        sae.W_dec.zero_()
    centred = error - error.mean(0)
    torch.testing.assert_close(auxk(sae, x, centred, dead).detach(), torch.tensor(1.0))
    torch.testing.assert_close(auxk(sae, x, 100 * centred, dead).detach(), torch.tensor(1.0))
    assert float(auxk(sae, x, torch.full((B, D), 0.3), dead)) == 0


def test_4_only_dead_neurons_take_part() -> None:
    sae, x, error, dead = make()
    auxk(sae, x, error, dead).backward()
    for grad in (sae.W_enc.grad, sae.W_dec.grad, sae.b_enc.grad):
        assert grad is not None
        moved = grad.reshape(M, -1).abs().amax(dim=1) > 0
        assert bool((~moved[~dead]).all())
        assert bool(moved[dead].any())
    assert float(auxk(sae, x, error, torch.zeros(M, dtype=torch.bool))) == 0


def test_5_reaches_the_encoder() -> None:
    sae, x, error, dead = make()
    (gradient,) = torch.autograd.grad(auxk(sae, x, error, dead), sae.W_enc)
    step = 1e-2
    moved = gradient.flatten().abs().argmax()
    with torch.no_grad():
        sae.W_enc.view(-1)[moved] += step
        up = auxk(sae, x, error, dead)
        sae.W_enc.view(-1)[moved] -= 2 * step
        down = auxk(sae, x, error, dead)
    assert (up - down).item() / (2 * step) == pytest.approx(gradient.flatten()[moved].item(), rel=0.02)


def test_k_aux_is_bounded_by_the_dead() -> None:
    sae, x, error, dead = make()
    torch.testing.assert_close(auxk(sae, x, error, dead, 1000), by_hand(sae, x, error, dead, int(dead.sum())))


def test_auxk_revives_dead_neurons() -> None:
    generator = torch.Generator().manual_seed(0)
    width = 24
    directions = torch.randn(60, width, generator=generator)
    x = torch.rand(512, 60, generator=generator) * (torch.rand(512, 60, generator=generator) < 0.05) @ directions
    x = x - x.mean(0)
    x = x * (width / x.square().sum(1).mean()).sqrt()
    shares = {}
    for aux in (0.0, 1 / 32):
        trainer = Trainer(SAEConfig(architecture="topk", dict_size=64, k=3, aux=aux, epochs=40, batch_size=64, lr=5e-3), width, len(x))
        with torch.no_grad():
            trainer.sae.W_enc[:48] *= 0.01  # never among the k
        for _ in range(trainer.steps):
            trainer.step(x[torch.randperm(512, generator=generator)[:64]])
        shares[aux] = float(trainer.dead.double().mean())
    assert shares[0.0] > 0.7
    assert shares[1 / 32] < 0.5 * shares[0.0]


def test_dead_counts_samples_of_the_global_batch() -> None:
    trainer = Trainer(SAEConfig(architecture="topk", dict_size=8, k=1, epochs=50, batch_size=10, dead_epochs=3, aux=0), D, 30)
    with torch.no_grad():
        trainer.sae.b_enc[:] = torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 0]) * 100
    x = torch.randn(10, D, generator=torch.Generator().manual_seed(0)) * 0.01
    for _ in range(8):
        trainer.step(x)
    assert trainer.silent.tolist() == [0] + [80] * 7
    assert not trainer.dead.any()
    trainer.step(x)
    assert trainer.dead.tolist() == [False] + [True] * 7


def test_resampling_restarts_dead_neurons_on_bad_samples() -> None:
    trainer = Trainer(SAEConfig(dict_size=M, epochs=10, batch_size=B), D, B, seed=0)
    sae = trainer.sae
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(3))
    trainer.step(x)
    dead = torch.zeros(M, dtype=torch.bool)
    dead[[1, 4]] = True
    error = torch.zeros(B, D)
    error[[3, 9]] = 1.0  # only these can be drawn
    kept = sae.W_enc.detach()[~dead].clone()
    assert resample(sae, trainer.update, StepInput(x, B, 1.0, dead, Collective()), error, (0, 1)) == 2
    direction = (x - sae.b_dec.detach())[[3, 9]]
    direction = direction / direction.norm(dim=1, keepdim=True)
    match = sae.W_dec.detach()[dead] @ direction.T
    assert sorted(match.argmax(dim=1).tolist()) == [0, 1]
    torch.testing.assert_close(match.amax(dim=1), torch.ones(2))
    torch.testing.assert_close(sae.W_enc.detach()[dead].norm(dim=1), 0.2 * kept.norm(dim=1).mean().expand(2))
    torch.testing.assert_close(sae.W_enc.detach()[~dead], kept)
    assert sae.b_enc.detach()[dead].tolist() == [0, 0]
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc):
        for moment in ("exp_avg", "exp_avg_sq"):
            values = trainer.update.optimizer.state[parameter][moment]
            assert float(values[dead].abs().max()) == 0
            assert float(values[~dead].abs().max()) > 0


def test_resampling_runs_on_schedule_and_lowers_the_dead_share() -> None:
    x = torch.randn(256, D, generator=torch.Generator().manual_seed(0))
    dead = {}
    for every in (None, 5.0):
        config = SAEConfig(dict_size=64, l1=0.5, epochs=40, batch_size=64, dead_epochs=2, resample_epochs=every)
        trainer = Trainer(config, D, len(x))
        with torch.no_grad():
            trainer.sae.b_enc[:40] = -50.0
        for step in range(trainer.steps):
            trainer.step(x[64 * (step % 4) : 64 * (step % 4) + 64])
        dead[every] = float(trainer.dead.double().mean())
        assert (trainer.resampled >= 40) == (every is not None)
    assert dead[5.0] < 0.2 < dead[None]
