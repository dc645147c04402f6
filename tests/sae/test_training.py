"""Schedules, logs, exact resume, divergence, and equality of one worker and two."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from medsae.errors import MedSAEError
from medsae.sae import sparse_ops
from medsae.sae.config import OPTIONS, SAEConfig
from medsae.sae.registry import ARCHITECTURES
from medsae.sae.training import DivergenceError, Trainer, checkpoint_due, learning_rate, sparsity_factor, train

ALL = sorted(ARCHITECTURES)
N, D, M = 300, 12, 40


def inputs(n: int = N) -> torch.Tensor:
    rng = np.random.default_rng(7)
    x = (rng.random((n, 20)) < 0.15) * rng.uniform(1, 2, (n, 20)) @ rng.normal(size=(20, D))
    x = x - x.mean(0)
    return torch.from_numpy((x * math.sqrt(D / (x**2).sum(1).mean())).astype(np.float32))


def config(name: str, /, **options: Any) -> SAEConfig:
    extra: dict[str, Any] = {"k": 4, "k_aux": 4, "dead_epochs": 0.5} if "k" in OPTIONS[name] else {}
    if name == "standard":
        extra = {"resample_epochs": 5, "dead_epochs": 2, "l1": 2.0}
    return SAEConfig(architecture=name, dict_size=M, **{"batch_size": 64, "epochs": 40, **extra, **options})  # type: ignore[arg-type]


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything that decides the future of a run, flat."""
    whole = trainer.state_dict()
    state = {f"sae.{k}": v for k, v in whole["sae"].items()}
    for index, moments in whole["optimizer"]["state"].items():
        state |= {f"adam.{index}.{k}": v for k, v in moments.items()}
    return {**state, "silent": trainer.silent, "step": torch.tensor(trainer.step_count), "resampled": torch.tensor(trainer.resampled)}


def timeless(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in log]


# --- schedules -------------------------------------------------------------------------------------------------------------------------------------


def test_learning_rate_rises_stays_and_falls() -> None:
    c = config("topk", lr=1.0, warmup=0.1, decay=0.2)
    rates = [learning_rate(c, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[79:]))
    assert rates[-1] == pytest.approx(1 / 21)
    assert [learning_rate(config("topk", lr=1.0, warmup=0, decay=0), s, 10) for s in range(10)] == [1.0] * 10


def test_sparsity_rises_from_zero() -> None:
    c = config("standard", sparsity_warmup=0.5)
    assert [sparsity_factor(c, s, 10) for s in (0, 1, 4, 5, 9)] == pytest.approx([0, 0.2, 0.8, 1, 1])
    assert sparsity_factor(config("topk"), 0, 10) == 1.0


@pytest.mark.parametrize(("epochs", "count"), [(40, 10), (3, 10), (7, 2), (1, 1)])
def test_checkpoints_are_spread_and_the_last_epoch_has_one(epochs: int, count: int) -> None:
    trainer = Trainer(config("topk", epochs=epochs, checkpoints=count), D, N)
    due = []
    for epoch in range(1, epochs + 1):
        trainer.step_count = epoch * trainer.steps_per_epoch
        due.append(checkpoint_due(trainer))
    assert due[-1]
    assert sum(due) == min(epochs, count)


# --- log -------------------------------------------------------------------------------------------------------------------------------------------


def test_log_lines_hold_the_figures_of_the_epoch() -> None:
    x = inputs()
    trainer = Trainer(config("topk", epochs=3, lr=1e-9, aux=0), D, N)
    train([trainer], x, seed=0)
    assert [(line["step"], line["epoch"]) for line in trainer.log] == [(5, 1), (10, 2), (15, 3)]
    line = trainer.log[-1]
    assert set(line) == {"step", "epoch", "fvu", "l0", "loss", "dead_share", "lr", "samples_per_second"}
    # A rate of nearly 0 leaves the network as it was: the figures can be computed anew over the training split (N is divisible by the batch).
    sae = trainer.sae
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    kept = pre.topk(4, dim=1)
    code = torch.zeros(N, M).scatter(1, kept.indices, kept.values.relu())
    fvu = float((x - code.detach() @ sae.W_dec.detach() - sae.b_dec.detach()).double().square().sum() / (x - x.mean(0)).double().square().sum())
    assert line["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert line["loss"]["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert line["l0"] == pytest.approx(float((code > 0).sum()) / N)
    json.dumps(trainer.log, allow_nan=False)


def test_autoencoders_of_a_list_do_not_touch_each_other() -> None:
    x = inputs()
    configs = [config("topk", epochs=4), config("standard", epochs=6, name="b"), config("gated", epochs=4, batch_size=100, name="c")]
    together = [Trainer(c, D, N) for c in configs]
    train(together, x, seed=1)
    for c, mine in zip(configs, together, strict=True):
        alone = Trainer(c, D, N)
        train([alone], x, seed=1)
        assert mine.step_count == mine.steps
        assert all(torch.equal(a, b) for a, b in zip(state_of(alone).values(), state_of(mine).values(), strict=True))


# --- resume ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", ALL)
def test_resumed_is_uninterrupted_bit_for_bit(name: str, tmp_path: Path) -> None:
    x, c = inputs(), config(name, epochs=12)
    whole = Trainer(c, D, N, seed=3)
    train([whole], x, seed=3)

    class Stop(Exception):
        pass

    def stop(trainers: list[Trainer], due: bool) -> None:
        if trainers[0].epoch == 7:
            torch.save(trainers[0].state_dict(), tmp_path / "state.pt")
            raise Stop

    with pytest.raises(Stop):
        train([Trainer(c, D, N, seed=3)], x, seed=3, on_epoch=stop)
    resumed = Trainer(c, D, N, seed=3)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train([resumed], x, seed=3)
    mine, theirs = state_of(resumed), state_of(whole)
    assert mine.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []
    assert timeless(resumed.log) == timeless(whole.log)


KILLED = """
import os, sys, torch
sys.path.insert(0, sys.argv[3])
torch.set_num_threads(1)
import importlib.util
spec = importlib.util.spec_from_file_location("t", sys.argv[1])
t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)
trainers = [t.Trainer(t.config(n, epochs=12), t.D, t.N, seed=3) for n in ("batch_topk", "standard")]
state = sys.argv[2]
if os.path.exists(state):
    for trainer, kept in zip(trainers, torch.load(state, weights_only=True)):
        trainer.load_state_dict(kept)
def save(current, due):
    if due:
        torch.save([x.state_dict() for x in trainers], state + ".tmp"); os.replace(state + ".tmp", state)
    print("epoch", current[0].epoch, flush=True)
t.train(trainers, t.inputs(), 3, on_epoch=save)
torch.save([t.state_of(x) for x in trainers], state + ".final")
"""


def test_a_killed_process_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])

    def start(state: Path) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", KILLED, __file__, str(state), root], stdout=subprocess.PIPE, text=True)

    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    assert start(whole).wait(120) == 0
    process = start(killed)
    assert process.stdout is not None
    while "epoch 5" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    assert not (tmp_path / "killed.pt.final").exists()
    assert start(killed).wait(120) == 0
    for mine, theirs in zip(torch.load(f"{killed}.final"), torch.load(f"{whole}.final"), strict=True):
        assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []


def test_a_state_of_another_run_is_refused() -> None:
    state = Trainer(config("topk"), D, N, seed=1).state_dict()
    with pytest.raises(MedSAEError, match=r"another run \(seed differ"):
        Trainer(config("topk"), D, N, seed=2).load_state_dict(state)
    with pytest.raises(MedSAEError, match=r"config, samples differ"):
        Trainer(config("topk", lr=0.1), D, N + 1, seed=1).load_state_dict(state)


# --- divergence ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", ALL)
def test_nan_stops_with_one_line(name: str) -> None:
    trainer = Trainer(config(name, epochs=2), D, N)
    x = inputs()
    trainer.step(x[:60])
    with torch.no_grad():
        trainer.sae.W_dec[0, 0] = float("nan")
        trainer.sae.b_dec[0] = float("nan")
    with pytest.raises(DivergenceError) as caught:
        trainer.step(x[:60])
    line = str(caught.value)
    assert "\n" not in line
    assert all(part in line for part in ("step 1", "learning rate", "lower lr", name))


def test_blowing_up_stops_at_the_end_of_the_epoch() -> None:
    trainer = Trainer(config("standard", epochs=4, lr=1.0, warmup=0, decay=0), D, N)
    with torch.no_grad():
        trainer.sae.b_dec.fill_(1e4)
    with pytest.raises(DivergenceError):
        train([trainer], inputs(), seed=0)
    assert trainer.log == []


# --- one worker, two workers -----------------------------------------------------------------------------------------------------------------------


RUNS = [("sparse", torch.float32), ("dense", torch.float32), ("sparse", torch.float64), ("apart", torch.float64)]
"""How products are taken, and in what; `apart`: by workers that have no memory in common."""
RESUMED = [ALL.index("batch_topk"), ALL.index("jumprelu"), ALL.index("topk")]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _refused(name: str) -> int:
    raise OSError(name)


def _check_resume(trained: list[Trainer], x: torch.Tensor, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Training anew, put down and taken up in between, gives the same bits, with as many workers; returns the states in between."""

    class Stop(Exception):
        pass

    def stop(current: list[Trainer], due: bool) -> None:
        if current[0].epoch == 23:
            raise Stop

    again = [Trainer(t.config, D, N, seed=5, dtype=dtype) for t in trained]
    with pytest.raises(Stop):
        train(again, x, seed=5, on_epoch=stop)
    states = [t.state_dict() for t in again]
    again = [Trainer(t.config, D, N, seed=5, dtype=dtype) for t in trained]
    for trainer, state in zip(again, states, strict=True):
        trainer.load_state_dict(state)
    train(again, x, seed=5)
    for one, other in zip(again, trained, strict=True):
        mine, theirs = state_of(one), state_of(other)
        assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []
    return states


def _worker(rank: int, world: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    found = []
    for kind, dtype in RUNS if world < 3 else RUNS[2:3]:
        sparse_ops.SMALL, sparse_ops.DENSE_SHARE = (2**60, 0.0) if kind == "dense" else (0, 1.0)
        if kind == "apart":
            os.memfd_create = _refused  # type: ignore[assignment]
        # The L1 weight of `april` in float32 leaves no neuron almost dead: Adam divides such a neuron's rounding errors by as small a second moment.
        weaker = {"l1": 1.0} if dtype == torch.float32 else {}
        trainers = [Trainer(config(name, name=name, **(weaker if name == "april" else {})), D, N, seed=5, dtype=dtype) for name in ALL]
        # Some neurons are dead from the start, so that there is something to resample.
        trainers[ALL.index("standard")].sae.b_enc.data[::7] = -9.0
        # On one node, workers have the matrices in common memory, and each updates its own half.
        mine = slice(0, M) if kind == "apart" else slice(rank * M // world, (rank + 1) * M // world)
        assert all(t.update.rows == mine for t in trainers)
        train(trainers, inputs().to(dtype), seed=5)
        halfway = _check_resume([trainers[i] for i in RESUMED], inputs().to(dtype), dtype)
        found.append(([(state_of(t), timeless(t.log)) for t in trainers], halfway))
    if rank == 0:
        torch.save(found, out)
    if world > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """All architectures after 200 steps on the same global batches, by one process, by two and (float64) by three, whose shares are not equal."""
    folder = tmp_path_factory.mktemp("worlds")
    found = {}
    for world in (1, 2, 3):
        port, out = _free_port(), str(folder / f"{world}.pt")
        code = f"import importlib.util as u; s = u.spec_from_file_location('t', {__file__!r}); t = u.module_from_spec(s); s.loader.exec_module(t); "
        runs = [subprocess.Popen([sys.executable, "-c", code + f"t._worker({r}, {world}, {port}, {out!r})"]) for r in range(world)]
        assert [run.wait(200) for run in runs] == [0] * world
        found[world] = torch.load(out)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0]}-{str(run[1]).removeprefix('torch.')}")
@pytest.mark.parametrize("name", ALL)
def test_two_workers_equal_one(name: str, run: tuple[str, torch.dtype], worlds: dict[int, Any]) -> None:
    dtype = run[1]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    (one, log_one), (two, log_two) = (worlds[w][RUNS.index(run)][0][ALL.index(name)] for w in (1, 2))
    assert int(one["step"]) == 200
    assert int(one["resampled"]) > 0 or name != "standard"
    assert one["sae.W_enc"].dtype == dtype
    for key, value in one.items():
        if key.startswith("sae."):
            torch.testing.assert_close(two[key], value, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")
        elif not key.startswith("adam"):
            assert torch.equal(two[key], value), key
    for a, b in zip(log_one, log_two, strict=True):
        assert a["fvu"] == pytest.approx(b["fvu"], rel=1e-5)
        assert a["l0"] == pytest.approx(b["l0"], rel=1e-3)
        assert a["dead_share"] == b["dead_share"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_three_workers_equal_one_down_to_adams_moments(name: str, worlds: dict[int, Any]) -> None:
    (one, _), (three, _) = worlds[1][2][0][ALL.index(name)], worlds[3][0][0][ALL.index(name)]
    for key, value in one.items():
        torch.testing.assert_close(three[key], value, rtol=1e-6, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(RESUMED)))
def test_one_worker_takes_up_what_two_put_down(index: int, worlds: dict[int, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_ops, "SMALL", 0)
    monkeypatch.setattr(sparse_ops, "DENSE_SHARE", 1.0)
    name = ALL[RESUMED[index]]
    trainer = Trainer(config(name, name=name), D, N, seed=5, dtype=torch.float64)
    trainer.load_state_dict(worlds[2][2][1][index])
    train([trainer], inputs().double(), seed=5)
    whole = worlds[1][2][0][RESUMED[index]][0]
    for key, value in state_of(trainer).items():
        if key.startswith("sae."):
            torch.testing.assert_close(value, whole[key], rtol=0, atol=1e-10)


def test_buffers_stay_in_float64() -> None:
    sae = Trainer(config("batch_topk"), D, N).sae
    assert {name: buffer.dtype for name, buffer in sae.named_buffers()} == {"threshold_sum": torch.float64, "threshold_weight": torch.float64}
