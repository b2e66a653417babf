"""What a run would cost: the memory is what a step really holds, the time is what its parts take."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from mainrun.bench import step
from mainrun.config import TrainConfig
from mainrun.core.cuda_graph import WARM, CudaGraph
from mainrun.core.device import Device
from mainrun.data.corpus import load_corpus
from mainrun.data.token_cache import prepare
from mainrun.plan.plan import Plan
from mainrun.train import State, build
from mainrun.ui import estimate
from mainrun.ui.estimate import PROBED, Live, memory

# -- memory


def test_the_count_follows_what_is_alive() -> None:
    with Live() as live:
        a = torch.empty(100)  # 400 bytes
        assert (live.now, live.most) == (400, 400)
        view = a[:50].view(5, 10)
        assert live.now == 400, "a view holds what it shows, once"
        del a
        assert live.now == 400, "and keeps it alive"
        b = torch.empty(50)
        del view
        assert (live.now, live.most) == (200, 600)
        del b
    assert (live.now, live.most) == (0, 600)


def tensors(cfg: TrainConfig) -> float:
    """The bytes of the tensors alone, without what the process takes in any case."""
    machine = Device(cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "FRAGMENTS", 1.0)
        return memory(Plan(cfg, 10**9), machine, cfg.vocab_size) - estimate.PROCESS


def test_the_memory_has_its_terms(tiny: Any) -> None:
    size = {
        "batch_size": 64,
        "block_size": 64,
        "d_model": 64,
        "n_layer": 3,
        "vocab_size": 2000,
        "compile": "off",
        "attention": "plain",
    }
    base = tiny(**size, optimizer="sgd")
    weights = 4 * sum(p.numel() for p in build(base, 2000).parameters())
    plain = tensors(base)
    assert tensors(tiny(**size, optimizer="adamw")) - plain == pytest.approx(2 * weights, rel=0.02)
    assert tensors(tiny(**size, optimizer="sgd", momentum=0.9)) - plain == pytest.approx(weights, rel=0.02)
    assert tensors(tiny(**size, optimizer="sgd", ema=0.9)) - plain == pytest.approx(weights, rel=0.02)
    tokens = 64 * 64
    logits = 2 * 4 * tokens * 2000  # and their gradient
    assert weights + logits < plain < weights + logits + 3 * 4 * tokens * (30 * 64 + 4 * 2 * 64)
    more = tensors(tiny(**size | {"vocab_size": 4000}, optimizer="sgd"))
    assert more - plain == pytest.approx(logits + 4 * 2000 * 64, rel=0.05)
    layer = (tensors(tiny(**size | {"n_layer": 6}, optimizer="sgd")) - plain) / 3
    assert layer > 4 * tokens * (8 * 64 + 2 * 4 * 64 + 2 * 64), (
        "what is kept of a layer: inputs, q k v, scores, the MLP's two"
    )
    dropped = tensors(tiny(**size, optimizer="sgd", dropout=0.1))
    assert dropped - plain > tokens * 64 * (1 + 2 * 3), "a byte for each number that may be dropped, and more"
    assert tensors(tiny(**size, optimizer="sgd", grad_accum=4)) < 0.6 * plain
    assert tensors(tiny(**size, optimizer="sgd", dtype="bfloat16")) < 0.8 * plain


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_counting_takes_no_memory_and_is_no_random_draw(tiny: Any, optimizer: str) -> None:
    huge = tiny(
        d_model=8192,
        n_layer=20,
        batch_size=512,
        block_size=1024,
        vocab_size=100_000,
        compile="off",
        optimizer=optimizer,
    )
    before, held = torch.get_rng_state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert memory(Plan(huge, 10**12), Device(huge), 100_000) > 5e11
    assert torch.equal(before, torch.get_rng_state())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < held + 300_000  # kB


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float32", "dropout": 0.1, "optimizer": "adamw"}, {"dtype": "bfloat16", "optimizer": "muon"}],
)
def test_the_peak_is_the_one_that_was_foretold(tiny: Any, changes: dict[str, Any]) -> None:
    cfg = tiny(
        batch_size=64,
        block_size=128,
        d_model=128,
        vocab_size=8000,
        n_layer=4,
        compile="off",
        attention="plain",
        **changes,
    )
    with step.start("x", "ours", True, cfg) as worker:
        said = worker.listen()["memory_estimate"]
        for _ in range(3):
            worker.ask("step")
        peak = worker.ask("end")["peak"]
    assert said > 1.5 * estimate.PROCESS, "large enough that the tensors matter"
    assert 1 / 1.3 < peak / said < 1.3


# -- time


def planned(cfg: TrainConfig) -> tuple[Device, Plan, Any]:
    data = prepare(cfg, load_corpus(cfg))
    return Device(cfg), Plan(cfg, len(data.splits["train"])), data


def test_a_probe_adds_up_its_parts(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny(dev_frac=0.2, compile="off")
    machine, plan, data = planned(cfg)
    steps: list[int] = []
    times = iter([0.5, 9.0, 0.4, 2.0, 2.0])  # three steps, then the start of val and that of dev

    def timed(work: Any) -> float:
        work()
        return next(times)

    monkeypatch.setattr(estimate, "timed", timed)
    real = estimate.Trial.step
    monkeypatch.setattr(
        estimate.Trial, "step", lambda self, x, y: steps.append(self.state.step) or real(self, x, y)
    )
    found = estimate.probed(cfg, machine, plan, data, 1.0)
    assert steps == list(range(1 + PROBED))
    part = 2 * 8 * 16
    span = 8 * 16 + 1

    def work(n: int) -> int:
        return n // span * 8 * 16 + n

    evaluation = sum(2.0 * work(len(data.splits[split])) / work(part) for split in ("val", "dev"))
    assert found["probe"]["step_seconds"] == 0.5 and not found["probe"]["compiles"]
    assert found["probe"]["evaluation_seconds"] == pytest.approx(evaluation)
    held = 4 * sum(p.numel() for p in build(cfg, 400).parameters())
    expected = 0.5 * plan.steps + (len(plan.eval_steps) + 1) * evaluation + held / estimate.DISK
    assert found["eta_seconds"] == pytest.approx(expected, rel=0.01)


def test_a_probe_on_a_gpu_times_steps_that_are_recorded(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny(compile="off")
    machine, plan, data = planned(cfg)
    launched: list[str] = []

    def call(self: CudaGraph, key: Any, work: Any, *given: Any) -> Any:
        launched.append("a step" if given else "its update")
        return work(*given)

    monkeypatch.setattr(CudaGraph, "__call__", call)
    machine.cuda_graph = lambda cfg: CudaGraph([], on=True)  # type: ignore[method-assign]
    timed: list[int] = []
    monkeypatch.setattr(
        estimate, "timed", lambda work: (timed.append(launched.count("a step")), work(), 1.0)[-1]
    )
    estimate.probed(cfg, machine, plan, data, 1.0)
    assert timed[:PROBED] == [WARM + 1, WARM + 2, WARM + 3], (
        "what is recorded at the call after the warm ones is replayed from the next on"
    )


def test_a_probe_does_not_compile(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny()
    machine, plan, data = planned(cfg)
    machine.compile = True
    monkeypatch.setattr(torch, "compile", lambda model: pytest.fail("compiled"))
    monkeypatch.setattr(estimate, "compile_balance", lambda *_: (100.0, 1.0))
    found = estimate.probed(cfg, machine, plan, data, 1.0)
    assert found["probe"]["compiles"] and found["eta_seconds"] + 1 > 100 and machine.compile


def test_a_trial_steps_as_a_run_does(tiny: Any, tmp_path: Path) -> None:
    """The same losses as the first steps of the run itself: what is timed is the real thing."""
    from mainrun.data.batches import Batches
    from mainrun.run.session import train
    from mainrun.store.rundir import RunDir

    cfg = tiny(dropout=0.1, optimizer="muon", lr=0.01, ema=0.9, compile="off")
    train(cfg, tmp_path)
    rows = [row for row in RunDir(tmp_path / cfg.run_id).metrics() if row["event"] == "step"]
    machine, plan, data = planned(cfg)
    trial, batches = (
        estimate.Trial(cfg, machine, plan, data.tokenizer.vocab_size),
        Batches(cfg, data.splits["train"]),
    )
    losses = [trial.step(*(machine.put(a) for a in batches.at(i))) for i in range(4)]
    assert losses == [row["loss"] for row in rows[:4]]
    assert isinstance(trial.state, State) and trial.state.average.on


def test_the_dry_run_says_whether_it_was_probed(tiny: Any) -> None:
    cfg = tiny(compile="off")
    rough, measured = estimate.estimate(cfg), estimate.estimate(cfg, probe=True)
    assert "probe" not in rough and 0 < measured["eta_seconds"] < 600
    assert rough["memory"] == measured["memory"] and rough["flops"] == measured["flops"]
