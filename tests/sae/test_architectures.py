"""Each architecture's loss and gradients against its formula, written out densely."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from medsae.sae.base import Architecture, StepInput
from medsae.sae.collective import Collective
from medsae.sae.config import OPTIONS, SAEConfig
from medsae.sae.data import Scaling
from medsae.sae.jumprelu import JumpReLU, jump
from medsae.sae.model import fold
from medsae.sae.registry import ARCHITECTURES, build
from medsae.sae.training import Trainer

ALL = sorted(ARCHITECTURES)
B, D, M, K = 24, 10, 32, 4
EXTRA: dict[str, dict[str, Any]] = {name: {"k": K} if "k" in OPTIONS[name] else {} for name in ALL}


def make(name: str, **options: Any) -> Architecture:
    config = SAEConfig(architecture=name, dict_size=M, **{**EXTRA[name], **options})  # type: ignore[arg-type]
    sae = build(config, D, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        sae.constrain()
    return sae


def batch(dead: torch.Tensor | None = None, sparsity: float = 0.7) -> StepInput:
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(5)) + 0.3
    return StepInput(x, B, sparsity, torch.zeros(M, dtype=torch.bool) if dead is None else dead, Collective())


def formula(name: str, sae: Architecture, step: StepInput) -> torch.Tensor:
    """The loss as documented, on dense matrices."""
    x, config, s = step.x, sae.config, step.sparsity
    if name == "gated":
        p = (x - sae.b_dec) @ sae.W_enc.T
        gate = p + sae.b_gate
        f = (gate > 0) * (sae.r_mag.exp() * p + sae.b_mag).relu()
        main = (x - f @ sae.W_dec - sae.b_dec).square().sum(1).mean()
        side = (x - gate.relu() @ sae.W_dec.detach() - sae.b_dec.detach()).square().sum(1).mean()
        return main + config.l1 * s * gate.relu().sum(1).mean() + side
    pre = (x - sae.b_dec if name != "april" else x) @ sae.W_enc.T + sae.b_enc
    if name in ("standard", "april"):
        f = pre.relu()
        weight = sae.W_dec.norm(dim=1) if name == "april" else torch.ones(M)
        return (x - f @ sae.W_dec - sae.b_dec).square().sum(1).mean() + config.l1 * s * (f * weight).sum(1).mean()
    if name == "topk":
        f = torch.where(pre >= pre.topk(K, dim=1).values[:, -1:], pre, 0).relu()
    else:
        f = torch.where(pre >= pre.flatten().topk(K * B).values.min(), pre, 0).relu()
    ends = [M] if name != "matryoshka_batch_topk" else [2, 4, 8, 16, 32]
    return torch.stack([(x - f[:, :e] @ sae.W_dec[:e] - sae.b_dec).square().mean() for e in ends]).mean()


pytestmark = pytest.mark.usefixtures("products")


@pytest.mark.parametrize("name", [n for n in ALL if n != "jumprelu"])
def test_loss_and_gradients_are_those_of_the_formula(name: str) -> None:
    sae, step = make(name), batch()
    out = sae.loss(step)
    expected = formula(name, sae, step)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
    parameters = list(sae.parameters())
    for mine, theirs in zip(torch.autograd.grad(out.loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_jumprelu_gradients_follow_the_pseudo_derivatives() -> None:
    sae, step = make("jumprelu", bandwidth=0.8, threshold=0.5, l0=0.9), batch()
    assert isinstance(sae, JumpReLU)
    out = sae.loss(step)
    z = (step.x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    on = (z > sae.threshold).float()
    error = step.x - (z * on) @ sae.W_dec - sae.b_dec
    torch.testing.assert_close(out.loss, error.square().sum(1).mean() + 0.9 * 0.7 * on.sum(1).mean())
    by_f = -2 * error @ sae.W_dec.T / B
    kernel = ((z - sae.threshold).abs() < 0.4).float()
    by_threshold = (-(sae.threshold / 0.8) * kernel * by_f - 0.9 * 0.7 / B * kernel / 0.8).sum(0)
    grads = dict(zip(dict(sae.named_parameters()), torch.autograd.grad(out.loss, list(sae.parameters())), strict=True))
    torch.testing.assert_close(grads["threshold"], by_threshold, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads["W_enc"], (by_f * on).T @ (step.x - sae.b_dec), rtol=1e-4, atol=1e-5)
    assert float(kernel.sum()) > 0
    assert float(by_threshold.detach().abs().max()) > 0


def test_jump_passes_no_gradient_from_the_indicator_to_z() -> None:
    z = torch.tensor([0.1, 0.6, 2.0], requires_grad=True)
    t = torch.full((3,), 0.5, requires_grad=True)
    _, on = jump(z, t, 0.4)
    on.sum().backward()
    assert z.grad is not None
    assert float(z.grad.abs().sum()) == 0
    assert t.grad is not None
    torch.testing.assert_close(t.grad, torch.tensor([0.0, -1 / 0.4, 0.0]))


@pytest.mark.parametrize("name", ALL)
def test_unit_decoders_stay_unit_and_their_gradients_are_orthogonal(name: str) -> None:
    sae = make(name)
    out = sae.loss(batch())
    out.loss.backward()
    sae.constrain_gradient(sae.W_dec)
    parallel = (sae.W_dec.grad * sae.W_dec).sum(dim=1).detach()
    if sae.unit_decoder:
        assert float(parallel.abs().max()) < 1e-5
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))
    else:
        assert name == "april"
        assert float(parallel.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_counts_are_those_of_the_code(name: str) -> None:
    sae, step = make(name), batch()
    out = sae.loss(step)
    activation, tensors, options = sae.export()
    if name.endswith("batch_topk"):
        assert int(out.active) == K * B
        assert int(out.fired.sum()) <= K * B
        return
    code = fold(activation, tensors, options, Scaling(np.zeros(D), 1.0, 1.0), {}).encode(step.x)
    assert int(out.active) == int((code > 0).sum())
    assert torch.equal(out.fired, (code > 0).any(dim=0))
    torch.testing.assert_close(out.error, step.x - code @ tensors["W_dec"].float() - tensors["b_dec"].float(), rtol=1e-4, atol=1e-5)


def test_batch_topk_does_not_depend_on_the_guess() -> None:
    sae, step = make("batch_topk"), batch()
    outs = []
    for guess in (0.0, 0.5, 1e6):
        sae._last = guess  # type: ignore[assignment]
        outs.append(sae.loss(step))
    assert all(torch.equal(o.error, outs[0].error) and int(o.active) == K * B for o in outs)


def test_batch_topk_keeps_what_is_positive_when_that_is_less_than_k() -> None:
    sae, step = make("batch_topk", k=30), batch()
    pre = (step.x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    assert int(sae.loss(step).active) == int((pre > 0).sum()) < 30 * B


def test_batch_topk_threshold_is_the_mean_smallest_kept_value() -> None:
    sae, step = make("batch_topk", threshold_decay=0.5), batch()
    smallest = []
    for _ in range(4):
        sae.loss(step)
        smallest.append(sae._last)
        with torch.no_grad():
            sae.W_enc.mul_(1.1)
    weights = 0.5 ** np.arange(4)[::-1]
    assert sae.threshold == pytest.approx(float((weights * smallest).sum() / weights.sum()), rel=1e-6)


def test_bfloat16_selection_keeps_float32_values() -> None:
    exact, rough = make("topk"), make("topk", selection="bfloat16")
    step = batch()
    a, b = exact.loss(step), rough.loss(step)
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=0.05)
    # Where both pick the same neurons for a sample, its error is the float32 one.
    same = (a.error - b.error).abs().amax(dim=1) < 1e-5
    assert int(same.sum()) >= B // 2


@pytest.mark.parametrize("name", ALL)
def test_training_explains_planted_features(name: str) -> None:
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(16, D))
    code = rng.uniform(0.5, 1.5, size=(512, 16)) * (rng.random((512, 16)) < 0.1)
    x = torch.from_numpy((code @ directions).astype(np.float32))
    x = x - x.mean(0)
    x = x * math.sqrt(D / float(x.square().sum(1).mean()))
    options: dict[str, Any] = {"l1": 0.1} if "l1" in OPTIONS[name] else {"l0": 0.05} if name == "jumprelu" else {}
    config = SAEConfig(architecture=name, dict_size=M, epochs=40, batch_size=64, lr=5e-3, **{**EXTRA[name], **options})  # type: ignore[arg-type]
    trainer = Trainer(config, D, len(x))
    from medsae.sae.training import train

    train([trainer], x, seed=0)
    # The prefixes of a Matryoshka dictionary take some of the reconstruction of the whole.
    assert trainer.log[-1]["fvu"] < 0.25
    assert trainer.log[-1]["fvu"] < 0.5 * trainer.log[0]["fvu"]
