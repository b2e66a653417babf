"""A run makes the same hardware choices every time and records them in its machine class."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_sets
from doors import Driver

from mainrun import train as trainer
from mainrun.config import TrainConfig, from_dict
from mainrun.core import device as machine
from mainrun.core.device import Device, best_attention
from mainrun.core.hardware import tune_allocator
from mainrun.core.kernels import cross_entropy
from mainrun.core.machine_class import compile_balance
from mainrun.errors import ConfigError, Diverged, Interrupted
from mainrun.plan.plan import Plan
from mainrun.plan.recipes import load
from mainrun.run.progress import Progress
from mainrun.run.session import train
from mainrun.store.rundir import RunDir

COMPILER = pytest.mark.skipif(
    not machine.compiler("cpu"), reason="torch.compile needs a C++ compiler on the CPU, and there is none"
)
Tiny = Callable[..., TrainConfig]


def results(run: RunDir) -> tuple[Any, list[dict[str, Any]]]:
    summary = run.summary()
    assert summary is not None
    return summary["weights"], [{k: v for k, v in row.items() if k != "seconds"} for row in run.metrics()]


# -- the allocator


def python(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Allocate a 64 MB tensor twenty times. Each time, the default allocator maps new memory.
FAULTS = """
import resource
import torch
from mainrun.core.hardware import tune_allocator

torch.set_num_threads(1)


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


default = faults()
said = tune_allocator()
faults()
print(said, default, faults(), sep="|")
"""


@pytest.mark.slow
@pytest.mark.skipif("tuned" not in tune_allocator(), reason="the C library here is not glibc")
def test_the_tuned_allocator_keeps_a_steps_memory() -> None:
    tuned, default_faults, faults = python(FAULTS).split("|")
    assert tuned.startswith("glibc") and tuned.endswith("tuned")
    assert int(faults) < 100 and int(default_faults) > 20 * int(faults)


@pytest.mark.skipif("tuned" not in tune_allocator(), reason="the C library here is not glibc")
def test_the_default_allocator_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINRUN_ALLOCATOR", "default")
    monkeypatch.delattr("ctypes.CDLL")
    assert tune_allocator() == "default (MAINRUN_ALLOCATOR)"


def test_the_peak_is_this_processes_and_not_its_parents() -> None:
    child = "from mainrun.core.hardware import peak_memory; print(peak_memory())"
    run_child = f"subprocess.run([sys.executable, '-c', {child!r}])"
    held = f"import subprocess, sys; much = b'x' * 500_000_000; {run_child}"
    assert 5_000_000 < int(python(held)) < 100_000_000


def test_the_allocator_changes_no_bit_and_stands_in_env_json(driver: Driver, tmp_path: Path) -> None:
    command = ["train", "--preset", "baseline", *tiny_sets(), "--quiet", "--out"]
    found = []
    for name in ("tuned", "default"):
        env = {"MAINRUN_ALLOCATOR": "default" if name == "default" else None}
        outcome = driver.run([*command, name], cwd=tmp_path, env=env)
        assert outcome.code == 0, outcome.err
        (run,) = map(RunDir, (tmp_path / name).glob("[!.]*"))
        found.append((results(run), run.env()["allocator"]))
    assert found[0][0] == found[1][0] and found[1][1].startswith("default") and found[0][1] != found[1][1]


# -- defaults of a run


def test_attention_is_chosen_by_device_dtype_length_and_dropout(tiny: Tiny) -> None:
    def best(device: str, **changes: Any) -> str:
        return best_attention(tiny(**changes), device)

    assert best("cuda") == best("cuda", dropout=0.1) == "sdpa"
    assert best("cpu", block_size=64) == best("cpu", block_size=512, dtype="bfloat16") == "plain"
    assert best("cpu", block_size=128) == best("cpu", block_size=1024, dtype="bfloat16") == "sdpa"
    assert best("cpu", block_size=128, dropout=0.1) == "plain", "the fused kernel takes no byte masks"
    assert best("cpu", block_size=128, dropout=0.1, attn_dropout=0.0) == "sdpa"
    assert (
        Device(tiny(attention="sdpa")).machine_class["attention"] == "sdpa"
        and Device(tiny()).machine_class["attention"] == "plain"
    )


@COMPILER
def test_a_run_is_compiled_when_it_is_long_enough_and_says_so(tiny: Tiny) -> None:
    cfg = load("optimized", ["device=cpu", "threads=2"])[0]
    for tokens, compiled in ((400_000, False), (4_000_000, True)):
        found = Device(cfg)
        assert not found.machine_class["compile"] and "compiler" not in found.machine_class
        plan = Plan(cfg, tokens)
        found.settle(cfg, plan)
        costs, saves = compile_balance(cfg, plan, found.torch_device.type, found.threads)
        assert found.compile == found.machine_class["compile"] == compiled == (saves > costs)
        assert (f"about {costs:.0f} s and saves about {saves:.0f} s" in found.note) == compiled
        assert ("compiler" in found.machine_class) == compiled
    for asked in ("on", "off"):
        fixed = cfg.model_copy(update={"compile": asked})
        found = Device(fixed)
        found.settle(fixed, Plan(fixed, 4_000_000 if asked == "off" else 400_000))
        assert found.machine_class["compile"] == ("compiling" in found.note) == (asked == "on")


def test_the_choice_is_the_configs_and_no_stopwatchs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load("optimized", ["device=cpu", "threads=2"])[0]
    plan = Plan(cfg, 3_000_000)
    once = compile_balance(cfg, plan, "cpu", Device(cfg).threads)
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)
    assert compile_balance(cfg, plan, "cpu", Device(cfg).threads) == once
    assert compile_balance(cfg, Plan(cfg, 6_000_000), "cpu", Device(cfg).threads)[1] == pytest.approx(
        2 * once[1], rel=1e-3
    )


def test_without_a_compiler_auto_leaves_it_and_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compiler", lambda device: "")
    cfg = load("optimized", ["device=cpu"])[0]
    found = Device(cfg)
    found.settle(cfg, Plan(cfg, 10**9))
    assert not found.compile and not found.machine_class["compile"]
    with pytest.raises(
        ConfigError, match=r"compile=on needs a C\+\+ compiler.*install the missing part, or set compile=off"
    ):
        Device(cfg.model_copy(update={"compile": "on"}))


@pytest.mark.parametrize(("asked", "used"), [(0.1, 26), (0.0, 0), (0.0001, 1), (0.9999, 255), (0.5, 128)])
def test_the_rate_that_is_used_is_a_whole_256th_and_recorded(asked: float, used: int) -> None:
    cfg = from_dict({"dropout": asked, "attn_dropout": 0.0})
    table = Plan(cfg, 100_000).table()
    for step in ("first_step", "last_step"):
        assert (
            table[step]["dropout"] == table[step]["resid_dropout"] == used / 256
            and table[step]["attn_dropout"] == 0.0
        )


# -- losses that are read late


class Late(Device):
    """A device that fetches the losses of several steps together, as a GPU does."""

    def __init__(self, cfg: TrainConfig) -> None:
        super().__init__(cfg)
        self.read_every = 7


def test_reading_the_numbers_late_changes_none(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(checkpoint_every=10)
    train(cfg, tmp_path / "at once")
    monkeypatch.setattr(trainer, "Device", Late)
    reads = []
    fetch = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (reads.append(self.shape), fetch(self))[1])
    train(cfg, tmp_path / "late")
    assert results(RunDir(tmp_path / "late" / cfg.run_id)) == results(
        RunDir(tmp_path / "at once" / cfg.run_id)
    )
    assert (7 * 2,) in reads  # one read returns the loss and the gradient norm of seven steps


def test_a_stop_between_two_readings_loses_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(eval_per_epoch=0)
    train(cfg, tmp_path / "whole")
    monkeypatch.setattr(trainer, "Device", Late)
    loss, calls = trainer.compute_loss, 0

    def then_stop(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 11:
            os.kill(os.getpid(), 15)
        return loss(*args)

    monkeypatch.setattr(trainer, "compute_loss", then_stop)
    with pytest.raises(Interrupted, match="at step 11 of"):
        train(cfg, tmp_path / "late")
    run = RunDir(tmp_path / "late" / cfg.run_id)
    assert [r["step"] for r in run.metrics() if r["event"] == "step"] == list(range(1, 12))
    train(cfg, tmp_path / "late")
    weights, rows = results(run)
    assert (weights, rows) == results(RunDir(tmp_path / "whole" / cfg.run_id))


def test_a_loss_that_is_read_late_still_ends_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "Device", Late)
    loss, calls = trainer.compute_loss, 0

    def planted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = loss(*args)
        if calls != 12:
            return result
        return result._replace(minimized=result.minimized * float("nan"))

    monkeypatch.setattr(trainer, "compute_loss", planted)
    cfg = tiny(checkpoint_every=10, eval_per_epoch=0)
    with pytest.raises(Diverged, match=r"at step 12 of .*the last checkpoint before this step is kept"):
        train(cfg, tmp_path)
    run = RunDir(tmp_path / cfg.run_id)
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-00000010"]
    assert [r["step"] for r in run.metrics() if r["event"] == "step"] == list(range(1, 12)), (
        "what led there can be seen"
    )


def test_a_bad_loss_at_the_end_of_a_reading_keeps_the_rows_before_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed step does not change the weights, so the checkpoint must cover all rows before this step."""
    cfg = tiny(eval_per_epoch=0, checkpoint_every=10**6)
    train(cfg, tmp_path / "whole")
    loss, calls = trainer.compute_loss, 0

    def planted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = loss(*args)
        if calls != last:
            return result
        return result._replace(minimized=result.minimized * float("nan"))

    last = 8  # step 1 is read alone, because it has a score; steps 2 to 8 are read together
    with monkeypatch.context() as late:
        late.setattr(trainer, "Device", Late)
        late.setattr(trainer, "compute_loss", planted)
        with pytest.raises(Diverged, match=r"at step 8 of .*the checkpoint before this step is kept"):
            train(cfg, tmp_path / "late")
    train(cfg, tmp_path / "late")
    assert results(RunDir(tmp_path / "late" / cfg.run_id)) == results(RunDir(tmp_path / "whole" / cfg.run_id))


def test_a_checkpoint_between_two_readings_has_every_row(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(eval_per_epoch=0, checkpoint_every=10)
    train(cfg, tmp_path / "whole")
    loss, calls = trainer.compute_loss, 0

    def then_crash(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 13:
            raise RuntimeError("the power went")
        return loss(*args)

    with monkeypatch.context() as late:
        late.setattr(trainer, "Device", Late)
        late.setattr(trainer, "compute_loss", then_crash)
        with pytest.raises(RuntimeError):
            train(cfg, tmp_path / "late")
    train(cfg, tmp_path / "late")
    assert results(RunDir(tmp_path / "late" / cfg.run_id)) == results(RunDir(tmp_path / "whole" / cfg.run_id))


# -- dropout


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@pytest.mark.parametrize("place", ["dropout", "attn_dropout", "resid_dropout"])
def test_each_dropout_alone_changes_the_training_and_is_the_same_twice(
    tiny: Tiny, tmp_path: Path, attention: str, place: str
) -> None:
    rates = {"dropout": 0.0, "attn_dropout": 0.0, "resid_dropout": 0.0}
    short = {
        "num_titles": 200,
        "vocab_size": 300,
        "n_layer": 1,
        "attention": attention,
        "official_geometry": "1x16",
    }
    runs = [("off", rates), ("on", rates | {place: 0.5}), ("again", rates | {place: 0.5})]
    off, on, again = (train(tiny(**short, **given), tmp_path / name)["weights"] for name, given in runs)
    assert off != on == again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_dropout_keeps_is_scaled_to_keep_the_mean(tiny: Tiny, dtype: torch.dtype) -> None:
    """The scale of dropout is not rounded to bfloat16.

    Rounding would turn 256/230 into 1.109, and the output of dropout would be about 0.3% too small.
    """
    for drop in (26, 13, 51, 128):
        p = drop / 256
        machine = Device(tiny())
        machine.seed([3])
        pool = machine.masks([(4_000_000, p)], 0)
        assert pool is not None
        x = torch.linspace(0.5, 2, 4_000_000).to(dtype)
        kept = trainer.Masks(pool).drop(x, p).double()
        assert kept.sum() / (x.double() * pool).sum() * (1 - p) == pytest.approx(1, abs=2e-4)


def test_the_loss_lets_go_of_its_gradient() -> None:
    logits = torch.randn(10, 5, requires_grad=True)
    loss, _ = cross_entropy(logits, torch.arange(10) % 5, 0.0)
    loss.backward(retain_graph=True)
    assert loss.grad_fn.grad is None
    with pytest.raises((RuntimeError, AttributeError)):
        loss.backward()


# -- compiling that fails


@pytest.mark.slow
@COMPILER
def test_a_compiler_that_fails_is_an_error_with_a_way_out(tiny: Tiny, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text(
        "#!/bin/sh\ncase $1 in --version) echo g++ 99; exit 0;; esac\necho no such header >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    env = os.environ | {"CXX": str(broken), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    env |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # without the processes that compile in parallel
    sets = tiny_sets(compile="on", n_layer=1)
    command = [
        sys.executable,
        "-m",
        "mainrun",
        "train",
        "--preset",
        "baseline",
        *sets,
        "--out",
        str(tmp_path / "runs"),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "torch.compile failed" in done.stderr
        and "use --set compile=off to train without it" in done.stderr
    )


def test_a_compiler_that_is_missing_is_named(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ConfigError, match="CXX=/no/such/compiler does not exist"):
        train(tiny(compile="on", n_layer=1), tmp_path)


def test_what_makes_libraries_compute_otherwise_is_in_the_machine_class(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Device(tiny()).machine_class
    assert "limits" not in plain
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert Device(tiny()).machine_class["limits"] == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    monkeypatch.setattr(machine, "cpu_flags", lambda: ["AMX bf16"])
    assert Device(tiny()).machine_class["instructions"] != plain["instructions"]


# -- the time by purpose


def test_the_seconds_of_a_run_add_up(tiny: Tiny, tmp_path: Path) -> None:
    class Stop(Progress):
        def step(self, row: dict[str, Any]) -> None:
            if row["step"] == 20 and not stopped:
                stopped.append(1)
                os.kill(os.getpid(), 15)

    stopped: list[int] = []
    cfg = tiny(checkpoint_every=10)
    with pytest.raises(Interrupted):
        train(cfg, tmp_path, progress=Stop())
    half = json.loads(
        next(
            iter(sorted(RunDir(tmp_path / cfg.run_id).checkpoints.glob("*/meta.json"), reverse=True))
        ).read_text()
    )["spent"]
    summary = train(cfg, tmp_path)
    assert set(summary["spent"]) == {"data", "steps", "evaluation", "checkpoints", "guards", "overhead"}
    assert (
        sum(summary["spent"].values()) == pytest.approx(summary["seconds"])
        and min(summary["spent"].values()) > 0
    )
    assert summary["spent"]["steps"] > half["steps"] > 0, "both sittings are in it"
    steps = sum(r["seconds"] for r in RunDir(tmp_path / cfg.run_id).metrics() if r["event"] == "step")
    assert summary["spent"]["steps"] == pytest.approx(steps, rel=0.2)


# -- compiled runs


@COMPILER
@pytest.mark.slow
def test_a_compiled_run_that_was_stopped_ends_with_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    class Stop(Progress):
        def step(self, row: dict[str, Any]) -> None:
            if row["step"] == 13:
                os.kill(os.getpid(), 15)

    cfg = tiny(compile="on", n_layer=1, dropout=0.1, title_mask=True, norm="rmsnorm", dtype="bfloat16")
    train(cfg, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(cfg, tmp_path / "cut", progress=Stop())
    torch._dynamo.reset()
    train(cfg, tmp_path / "cut")
    whole, cut = (RunDir(tmp_path / name / cfg.run_id) for name in ("whole", "cut"))
    assert results(whole) == results(cut)
    summary = whole.summary()
    assert (
        summary is not None and summary["machine_class"]["compile"] and summary["machine_class"]["compiler"]
    )
    assert summary["spent"]["compile"] > 0.1, "its seconds are told apart"


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_the_gpu_path(tiny: Tiny, tmp_path: Path, compiled: str) -> None:
    """Two runs on a GPU have the same bits, and nearly the same scores as a run on a CPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch sees none here")
    cfg = tiny(device="cuda", dropout=0.1, grad_accum=2, dtype="bfloat16", compile=compiled)
    assert Device(cfg).machine_class["native"], "the loss in Triton"
    for name in "ab":
        train(cfg, tmp_path / name)
    a, b = (RunDir(tmp_path / name / cfg.run_id) for name in "ab")
    assert results(a) == results(b)
    with pytest.raises(Interrupted):  # the resumed run records its CUDA graph at another step
        train(cfg, tmp_path / "cut", until=7)
    train(cfg, tmp_path / "cut")
    assert results(RunDir(tmp_path / "cut" / cfg.run_id)) == results(a)
    still = {"dropout": 0.0, "compile": "off"}
    full = [
        train(tiny(device=device, **still), tmp_path / device)["last"]["full"] for device in ("cpu", "cuda")
    ]
    assert full[0] == pytest.approx(full[1], abs=1e-3)


# -- processes


@pytest.mark.parametrize(
    ("rank", "world"),
    [
        ("0", "abc"),
        ("x", "1"),
        ("", "1"),
        ("0", ""),
        ("1", "1"),
        ("-1", "1"),
        ("2", "2"),
        ("0", "0"),
        ("0", "2"),
        ("0", "9" * 5000),
    ],
)
def test_what_a_batch_system_left_in_the_environment_is_refused(
    rank: str, world: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    fix = "start mainrun with torchrun, or unset both variables"
    with pytest.raises(ConfigError, match=f"got RANK='{rank}' and WORLD_SIZE='{world}'.*{fix}"):
        Device(tiny())


def test_one_process_needs_no_port(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert (Device(tiny()).rank, Device(tiny()).world) == (0, 1)
