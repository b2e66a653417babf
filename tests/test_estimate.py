"""Test the memory and the time that --dry-run estimates for a run."""

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
from mainrun.plan.cost import size
from mainrun.plan.plan import Plan
from mainrun.train import State, build
from mainrun.ui import estimate
from mainrun.ui.estimate import PROBE_STEPS, LiveBytes, StepProbe, estimate_memory

# -- memory


def test_live_bytes_counts_each_storage_while_it_is_alive() -> None:
    with LiveBytes() as live:
        a = torch.empty(100)  # 400 bytes
        assert (live.current, live.peak) == (400, 400)
        view = a[:50].view(5, 10)
        assert live.current == 400, "a view has no storage of its own"
        del a
        assert live.current == 400, "the view keeps the storage alive"
        b = torch.empty(50)
        del view
        assert (live.current, live.peak) == (200, 600)
        del b
    assert (live.current, live.peak) == (0, 600)


def tensor_bytes(cfg: TrainConfig) -> float:
    """Return the estimated memory without the constant part and without the allowance for fragmentation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "FRAGMENTATION", 1.0)
        return estimate_memory(Plan(cfg, 10**9), Device(cfg), cfg.vocab_size) - estimate.PROCESS


def test_the_memory_contains_its_parts(tiny: Any) -> None:
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
    plain = tensor_bytes(base)
    assert tensor_bytes(tiny(**size, optimizer="adamw")) - plain == pytest.approx(2 * weights, rel=0.02)
    assert tensor_bytes(tiny(**size, optimizer="sgd", momentum=0.9)) - plain == pytest.approx(
        weights, rel=0.02
    )
    assert tensor_bytes(tiny(**size, optimizer="sgd", ema=0.9)) - plain == pytest.approx(weights, rel=0.02)
    tokens = 64 * 64
    logits = 2 * 4 * tokens * 2000  # the logits and their gradient
    assert weights + logits < plain < weights + logits + 3 * 4 * tokens * (30 * 64 + 4 * 2 * 64)
    more = tensor_bytes(tiny(**size | {"vocab_size": 4000}, optimizer="sgd"))
    assert more - plain == pytest.approx(logits + 4 * 2000 * 64, rel=0.05)
    layer = (tensor_bytes(tiny(**size | {"n_layer": 6}, optimizer="sgd")) - plain) / 3
    assert layer > 4 * tokens * (8 * 64 + 2 * 4 * 64 + 2 * 64), (
        "autograd keeps the inputs, q, k, v, the scores and two activations of the MLP"
    )
    dropped = tensor_bytes(tiny(**size, optimizer="sgd", dropout=0.1))
    assert dropped - plain > tokens * 64 * (1 + 2 * 3), "one byte per element that can be dropped, and more"
    skipped = tensor_bytes(tiny(**size, optimizer="sgd", stochastic_depth=0.1))
    assert 0 <= skipped - plain < dropped - plain, "autograd keeps one number per row and branch"
    cautious = tensor_bytes(tiny(**size, optimizer="adamw", cautious_decay=True))
    assert cautious - plain == pytest.approx(2 * weights, rel=0.02), "its temporary tensors are small"
    assert tensor_bytes(tiny(**size, optimizer="sgd", grad_accum=4)) < 0.6 * plain
    assert tensor_bytes(tiny(**size, optimizer="sgd", dtype="bfloat16")) < 0.8 * plain


@pytest.mark.slow
def test_a_routed_block_takes_memory_for_its_selected_tokens(tiny: Any) -> None:
    size = {"batch_size": 512, "block_size": 64, "d_model": 64, "n_layer": 4, "vocab_size": 500}
    size |= {"compile": "off", "attention": "plain", "optimizer": "sgd"}
    dense = tensor_bytes(tiny(**size))
    layer = (tensor_bytes(tiny(**size | {"n_layer": 8})) - dense) / 4
    eighth = tensor_bytes(tiny(**size, block_pattern="DM", capacity=0.125))
    half = tensor_bytes(tiny(**size, block_pattern="DM", capacity=0.5))
    assert dense - 2 * layer < eighth < half < dense
    assert half - eighth > 0.3 * layer, "two layers with fewer tokens"
    everywhere = tensor_bytes(tiny(**size, block_pattern="DT", capacity=0.5))
    assert everywhere > half + 2 * layer, "T passes all tokens through its block as well"


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_the_estimate_takes_no_memory_and_draws_no_random_numbers(tiny: Any, optimizer: str) -> None:
    huge = tiny(
        d_model=8192,
        n_layer=20,
        batch_size=512,
        block_size=1024,
        vocab_size=100_000,
        compile="off",
        optimizer=optimizer,
    )
    rng_state = torch.get_rng_state()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    assert estimate_memory(Plan(huge, 10**12), Device(huge), 100_000) > 5e11
    assert torch.equal(rng_state, torch.get_rng_state())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 300_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32", "dropout": 0.1, "optimizer": "adamw"},
        {"stochastic_depth": 0.1, "cautious_decay": True, "weight_decay": 0.1, "optimizer": "adamw"},
        {"dtype": "bfloat16", "optimizer": "muon"},
        {"members": 4, "dropout": 0.1, "optimizer": "adamw"},
        {"block_pattern": "DSMT", "dropout": 0.1, "optimizer": "adamw"},
        {"block_pattern": "DM", "capacity": 0.125, "dtype": "bfloat16", "optimizer": "muon"},
        {"attn_lora_rank": 8, "mlp_lora_rank": 8, "base_frozen": True, "dtype": "bfloat16"},
    ],
)
def test_the_estimate_is_close_to_the_measured_peak(tiny: Any, changes: dict[str, Any]) -> None:
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
        estimated = worker.listen()["memory_estimate"]
        for _ in range(3):
            worker.ask("step")
        peak = worker.ask("end")["peak"]
    assert estimated > 1.5 * estimate.PROCESS, "the tensors must matter"
    assert 1 / 1.3 < peak / estimated < 1.3


# -- time


def planned(cfg: TrainConfig) -> tuple[Device, Plan, Any]:
    data = prepare(cfg, load_corpus(cfg))
    return Device(cfg), Plan(cfg, len(data.splits["train"])), data


def test_the_time_is_the_sum_of_its_parts(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny(dev_frac=0.2, compile="off")
    device, plan, data = planned(cfg)
    steps: list[int] = []
    times = iter([0.5, 9.0, 0.4, 2.0, 2.0])  # three steps and two short evaluations take these seconds

    def seconds_of(work: Any) -> float:
        work()
        return next(times)

    monkeypatch.setattr(estimate, "seconds_of", seconds_of)
    real_step = StepProbe.step

    def recorded_step(self: StepProbe, x: torch.Tensor, y: torch.Tensor) -> float:
        steps.append(self.state.step)
        return real_step(self, x, y)

    monkeypatch.setattr(StepProbe, "step", recorded_step)
    cost = estimate.probe_time(cfg, device, plan, data, 1.0)
    assert steps == list(range(1 + PROBE_STEPS))
    sample = 2 * 8 * 16
    span = 8 * 16 + 1

    def targets(n: int) -> int:
        return n // span * 8 * 16 + n

    evaluation = sum(2.0 * targets(len(data.splits[split])) / targets(sample) for split in ("val", "dev"))
    assert cost["probe"]["step_seconds"] == 0.5 and not cost["probe"]["compiles"]
    assert cost["probe"]["evaluation_seconds"] == pytest.approx(evaluation)
    checkpoint = 4 * sum(p.numel() for p in build(cfg, 400).parameters())
    expected = 0.5 * plan.steps + (len(plan.eval_steps) + 1) * evaluation + checkpoint / estimate.DISK_SPEED
    assert cost["eta_seconds"] == pytest.approx(expected, rel=0.01)


def test_a_probe_on_a_gpu_measures_replayed_steps(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny(compile="off")
    device, plan, data = planned(cfg)
    calls: list[str] = []

    def call(self: CudaGraph, key: Any, work: Any, *given: Any) -> Any:
        calls.append("forward_backward" if given else "optimizer_step")
        return work(*given)

    monkeypatch.setattr(CudaGraph, "__call__", call)
    device.cuda_graph = lambda cfg: CudaGraph([], on=True)  # type: ignore[method-assign]
    steps_before: list[int] = []  # number of forward passes before each measurement

    def seconds_of(work: Any) -> float:
        steps_before.append(calls.count("forward_backward"))
        work()
        return 1.0

    monkeypatch.setattr(estimate, "seconds_of", seconds_of)
    estimate.probe_time(cfg, device, plan, data, 1.0)
    assert steps_before[:PROBE_STEPS] == [WARM + 1, WARM + 2, WARM + 3], (
        "after the warm-up, one step is recorded, and the next ones are replayed"
    )


def test_a_probe_does_not_compile(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny()
    device, plan, data = planned(cfg)
    device.compile = True
    monkeypatch.setattr(torch, "compile", lambda model: pytest.fail("compiled"))
    monkeypatch.setattr(estimate, "compile_balance", lambda *_: (100.0, 1.0))
    cost = estimate.probe_time(cfg, device, plan, data, 1.0)
    assert cost["probe"]["compiles"] and cost["eta_seconds"] + 1 > 100 and device.compile


def test_a_probe_has_the_losses_of_the_first_steps_of_a_run(tiny: Any, tmp_path: Path) -> None:
    from mainrun.data.batches import Batches
    from mainrun.run.session import train
    from mainrun.store.rundir import RunDir

    cfg = tiny(dropout=0.1, optimizer="muon", lr=0.01, ema=0.9, compile="off")
    train(cfg, tmp_path)
    rows = [row for row in RunDir(tmp_path / cfg.run_id).metrics() if row["event"] == "step"]
    device, plan, data = planned(cfg)
    probe = StepProbe(cfg, device, plan, data.tokenizer.vocab_size)
    batches = Batches(cfg, data.splits["train"])
    losses = []
    for i in range(4):
        x, y = batches.at(i)
        losses.append(probe.step(device.put(x), device.put(y)))
    assert losses == [row["loss"] for row in rows[:4]]
    assert isinstance(probe.state, State) and probe.state.average.on


def test_the_estimate_contains_a_probe_only_if_requested(tiny: Any) -> None:
    cfg = tiny(compile="off")
    rough = estimate.estimate(cfg)
    measured = estimate.estimate(cfg, probe=True)
    assert "probe" not in rough and 0 < measured["eta_seconds"] < 600
    assert rough["memory"] == measured["memory"] and rough["flops"] == measured["flops"]


def test_the_estimate_of_a_frozen_base_includes_the_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen base has no gradients and no moments, so the copy that the guards make is the peak."""
    cfg = TrainConfig(
        vocab_size=100_000, n_layer=1, n_head=2, d_model=1024, block_size=16, batch_size=2, threads=1,
        attn_lora_rank=2, base_frozen=True, optimizer="adamw", device="cpu", compile="off",
    )  # fmt: skip
    memory = tensor_bytes(cfg)
    monkeypatch.setattr(estimate, "_guards_bytes", lambda *args: 0)
    assert memory - tensor_bytes(cfg) > 2 * size(cfg).params, "at least half of the weights"
