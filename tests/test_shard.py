"""The field `shard`: several processes divide the model (FSDP2), and train the same run as one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_sets

from mainrun.config import TrainConfig, from_dict
from mainrun.core.device import Device
from mainrun.core.hardware import tune_allocator
from mainrun.core.machine_class import versions
from mainrun.data.corpus import load_corpus
from mainrun.data.token_cache import prepare
from mainrun.errors import ConfigError, UsageError
from mainrun.plan.plan import Plan
from mainrun.plan.recipes import load
from mainrun.run.session import train, warn_about_memory
from mainrun.store import checkpoint, lineage, token_scores
from mainrun.store.nodes import Store
from mainrun.store.rundir import RunDir
from mainrun.train import set_up
from mainrun.ui import estimate, train_cli

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "num_titles": 200,
    "dropout": 0.0,
    "optimizer": "adamw",
    "lr": 1e-3,
    "clip": 0.5,  # below the norm of most gradients
    "batch_size": 12,
    "max_steps": 12,
}
QWEN = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "qkv_bias": True, "n_layer": 4}
CASES: dict[str, dict[str, Any]] = {
    "adamw and ema": {"ema": 0.9, "weight_decay": 0.1, "token_scores": True},
    "sgd, accumulation and swa": {
        "optimizer": "sgd",
        "lr": 0.05,
        "momentum": 0.9,
        "grad_accum": 3,
        "swa": 0.5,
    },
    "single numbers and odd shapes": {
        "tie_head": False,
        "value_residual": True,
        "layer_scale": 0.1,
        "qk_norm": True,
        "attn_gate": True,
        "d_ff": 33,
    },
    "routed M, S and T": QWEN | {"block_pattern": "DSTM"},
    "routed by the student": QWEN | {"block_pattern": "DM", "route": "student", "gate": "straight"},
    "low-rank terms": QWEN | {"attn_lora_rank": 4, "embed_lora_rank": 4},
    "a frozen layer": {"frozen": [0], "grad_norm_steps": 2},
    "shortcuts": {"value_shortcut": True, "x0_shortcut": True, "unet": True},
}


def config(**changes: Any) -> TrainConfig:
    """Return the config that the command line builds from the same changes."""
    fields = load("baseline")[0].model_dump() | TINY | SMALL | changes
    return from_dict(fields | {"preset": "baseline"})


def torchrun(folder: Path, processes: int, jobs: list[list[Any]]) -> None:
    """Run jobs in several processes, see tests/shard_worker.py."""
    listed = []
    for cfg, out, until in jobs:
        listed.append([cfg.model_dump(mode="json"), str(out), until])
    file = folder / f"jobs-{processes}.json"
    file.write_text(json.dumps(listed))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *start, str(ROOT / "tests" / "shard_worker.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=600)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_of(out: Path, cfg: TrainConfig) -> RunDir:
    return RunDir(out / cfg.run_id)


def steps(run: RunDir, field: str = "loss") -> list[float]:
    return [row[field] for row in run.metrics() if row["event"] == "step"]


def tensors(run: RunDir) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    loaded = checkpoint.load_newest(run.checkpoints, lambda meta: None, lambda text: None)
    assert loaded is not None
    return loaded


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def compare(one: RunDir, two: RunDir) -> None:
    """Check that two runs have nearly equal losses, gradient norms, scores and states."""
    for row_a, row_b in zip(one.metrics(), two.metrics(), strict=True):
        assert (row_a["event"], row_a["step"]) == (row_b["event"], row_b["step"])
        for field in {"loss", "grad_norm", "full", "official"} & row_a.keys():
            assert row_b[field] == pytest.approx(row_a[field], abs=1e-5), (row_a["step"], field)
        for field in ("aux", "grad_norms"):
            assert row_b.get(field, {}) == pytest.approx(row_a.get(field, {}), abs=1e-5), field
    state_a = tensors(one)[0]
    state_b = tensors(two)[0]
    assert state_a.keys() == state_b.keys()
    for name, tensor in state_a.items():
        assert (tensor.shape, tensor.dtype) == (state_b[name].shape, state_b[name].dtype), name
        assert (tensor - state_b[name]).abs().max() < 1e-4, name


# -- in one process


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "muon"}, "shard=true and optimizer=muon cannot be combined"),
        ({"experts": 4}, "shard=true and experts=4 cannot be combined; set experts=0 or shard=false"),
        ({"compile": "on"}, "shard=true and compile=on cannot be combined; set compile=off or shard=false"),
        (
            {
                "max_steps": 0,
                "growth": {"ops": [{"name": "set_lr", "value": 0.1, "trigger": {"step": 3}}]},
            },
            "remove the growth schedule, or set shard=false",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes: dict[str, Any], message: str) -> None:
    config(**changes)
    with pytest.raises(ConfigError) as error:
        config(shard=True, **changes)
    assert message in str(error.value)


def test_one_process_trains_the_same_bits_and_shares_its_steps(tmp_path: Path) -> None:
    whole = config()
    sharded = config(shard=True)
    store = Store(str(tmp_path / "store"))
    summary = train(whole, tmp_path / "whole", store=store)
    alone = train(sharded, tmp_path / "alone")
    assert alone["weights"] == summary["weights"]
    assert steps(run_of(tmp_path / "alone", sharded)) == steps(run_of(tmp_path / "whole", whole))
    assert alone["machine_class"] == summary["machine_class"]
    reused = train(sharded, tmp_path / "reused", store=store)
    assert reused["ledger"]["trained"] == 0 and reused["weights"] == summary["weights"]


def test_the_machine_class_of_a_sharded_run_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of two processes depend on whether they divide the model."""
    roots = []
    for shard in (False, True):
        cfg = config(shard=shard)
        device = pair(cfg, monkeypatch)
        corpus = load_corpus(cfg)
        data = prepare(cfg, corpus)
        origin = lineage.origin(cfg, corpus.fingerprints, data.digest, versions(), device.machine_class)
        roots.append(lineage.root(origin))
    assert roots[0] != roots[1]


def pair(cfg: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Return the device of one of two processes, without starting the other process."""
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "1")
        patch.setattr(Device, "join", lambda self: None)
        return Device(cfg)


def test_a_sharded_run_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mainrun.core.device.compile_balance", lambda *_: (0.0, 1.0))
    monkeypatch.setattr("mainrun.core.device.compiler", lambda _: "a compiler")
    compiled = []
    for shard in (False, True):
        cfg = config(shard=shard)
        device = pair(cfg, monkeypatch)
        device.settle(cfg, Plan(cfg, 10**6))
        compiled.append(device.compile)
    assert compiled == [True, False]


def test_a_store_for_a_sharded_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = ["shard=true", "num_titles=200"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="a sharded run does not use a store, so leave --store out"):
        train_cli.train("baseline", settings, out=tmp_path / "runs", place=str(tmp_path / "store"))
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_divides_the_state_among_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "FRAGMENTATION", 1.0)
    changes = {"d_model": 128, "n_layer": 8, "vocab_size": 500}
    memory = {}
    for shard in (False, True):
        cfg = config(shard=shard, **changes)
        device = pair(cfg, monkeypatch)
        memory[shard] = estimate.estimate_memory(Plan(cfg, 10**6), device, 500) - estimate.PROCESS
    model = set_up(config(**changes)).start().model
    weights = 4 * sum(p.numel() for p in model.parameters())
    block = 4 * sum(p.numel() for p in model.blocks[0].parameters())
    outside = weights - 8 * block
    # Weights, gradients and two moments are divided by two, but some of the weights are gathered. DDP has a
    # buffer for the gradients.
    gathered = 2 * outside + 4 * block
    assert memory[False] - memory[True] == pytest.approx(weights + 4 * weights / 2 - gathered, abs=4)


def test_a_model_that_does_not_fit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = set_up(config())
    params = sum(p.numel() for p in setup.start().model.parameters())
    notes: list[str] = []
    monkeypatch.setattr(Device, "memory", 16 * params - 1)
    warn_about_memory(setup, notes.append)
    assert len(notes) == 1 and "grad_accum" in notes[0]
    assert "base_frozen=true" in notes[0] and "shard=true" in notes[0]
    shared = setup._replace(device=pair(config(shard=True), monkeypatch))
    for memory in (16 * params, 0):  # 0: unknown
        monkeypatch.setattr(Device, "memory", memory)
        warn_about_memory(setup, notes.append)
    monkeypatch.setattr(Device, "memory", 8 * params)
    warn_about_memory(shared, notes.append)
    assert len(notes) == 1


def test_the_dry_run_compares_the_estimate_with_the_memory() -> None:
    def text_of(needed: int, available: int, processes: int) -> str:
        cost = {"memory": needed, "device_memory": available, "process_memory": 5 * 10**8}
        return train_cli._memory_text(cost | {"machine_class": {"processes": processes}})

    fact = "about 1.0GB, 500.0MB of it for the process itself"
    assert text_of(10**9, 2 * 10**9, 1) == fact
    assert text_of(10**9, 0, 2) == f"{fact}, per process"
    text = text_of(3 * 10**9, 2 * 10**9, 1)
    assert text.startswith(
        "about 3.0GB, 500.0MB of it for the process itself, but a process has only 2.0GB; "
    )
    assert "raise grad_accum" in text
    assert "base_frozen=true" in text and "shard=true" in text


# Free one of two tensors of 64 MB, which is not at the end of the heap.
FREED = """
from mainrun.core.hardware import tune_allocator
import sys
tune_allocator()
said = tune_allocator(keep_freed=sys.argv[1] == "keep")
import torch
torch.set_num_threads(1)
freed, kept = torch.ones(16_000_000), torch.ones(16_000_000)
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
del freed
print(said, before - resident(), sep="|")
"""


@pytest.mark.slow
@pytest.mark.skipif("tuned" not in tune_allocator(), reason="the C library here is not glibc")
def test_a_sharded_run_returns_freed_memory() -> None:
    returned = {}
    for mode in ("keep", "return"):
        command = [sys.executable, "-c", FREED, mode]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
        assert done.returncode == 0, done.stderr
        said, freed = done.stdout.split("|")
        returned[mode] = int(freed)
        assert said.endswith("tuned" if mode == "keep" else "tuned to return freed memory")
    assert returned["keep"] < 1_000_000 and returned["return"] > 60_000_000


def test_processes_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(config())
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = device.memory
    assert alone > 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device.memory == alone // 2


# -- in several processes

UNTIL = 5  # the step after which runs are interrupted
DROPOUT = {"dropout": 0.2, "rdrop": 0.3}  # the masks of two processes are those of two micro-batches


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train all runs of two processes with one torchrun, because each start takes seconds."""
    folder = tmp_path_factory.mktemp("shard")
    jobs: list[list[Any]] = []
    for name, changes in CASES.items():
        jobs.append([config(shard=True, **changes), folder / name, 0])
    jobs.append([config(shard=True, **DROPOUT), folder / "dropout", 0])
    routed = config(shard=True, **CASES["routed M, S and T"], ema=0.9)
    jobs.append([routed, folder / "straight", 0])
    jobs.append([routed, folder / "interrupted", UNTIL])
    jobs.append([routed, folder / "interrupted", 0])
    jobs.append([config(shard=True, ema=0.9), folder / "two, one, three", 4])
    # in S, rounding may change which tokens are selected
    jobs.append([config(shard=True, **QWEN, block_pattern="DTM"), folder / "measured", -1])
    torchrun(folder, 2, jobs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_the_same_run_as_one(two: Path, tmp_path: Path, name: str) -> None:
    whole = config(**CASES[name])
    alone = train(whole, tmp_path)
    run = run_of(two / name, config(shard=True, **CASES[name]))
    compare(run_of(tmp_path, whole), run)
    summary = run.summary()
    assert summary is not None
    assert [guard for guard in summary["guards"] if guard["status"] == "fail"] == []
    for field in ("params", "presentations", "ledger", "fingerprints"):
        assert summary[field] == alone[field], field
    assert summary["weights"] == checkpoint.sha256_tensors(scored_weights(run)), "the hash of whole tensors"
    assert summary["machine_class"]["shard"] is True and summary["machine_class"]["processes"] == 2
    if whole.routed_layers:
        assert summary["routing"]["topk_loss"] == pytest.approx(alone["routing"]["topk_loss"], abs=1e-5)
    if whole.token_scores:
        scores = token_scores.read(run)["val"]
        full = -scores.full.sum(dtype=np.float64) / scores.chars
        assert full == pytest.approx(summary["last"]["full"], rel=1e-9)
    assert max(steps(run, "grad_norm")) > whole.clip, "some gradients must be clipped"


def scored_weights(run: RunDir) -> Iterator[tuple[str, torch.Tensor]]:
    state = tensors(run)[0]
    prefix = "model/"
    if any(name.startswith("average/") for name in state):
        prefix = "average/"
    for name, tensor in state.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), tensor


@pytest.mark.slow
def test_dropout_masks_differ_between_the_processes(two: Path, tmp_path: Path) -> None:
    pieces = config(**DROPOUT, grad_accum=2)
    train(pieces, tmp_path)
    compare(run_of(tmp_path, pieces), run_of(two / "dropout", config(shard=True, **DROPOUT)))


@pytest.mark.slow
def test_each_process_holds_half_of_the_state(two: Path) -> None:
    whole = 0
    held = {"weights": 0, "gradients": 0, "moments": 0}
    for rank in range(2):
        measured = json.loads((two / "measured" / f"{rank}.json").read_text())
        whole = measured["whole"]
        assert measured["gathered"] == [], "the weights of other processes are freed after a step"
        assert measured["gap"] < 1e-4, "guards of routed runs compare with a copy in float64"
        for what in held:
            held[what] += measured[what]
        assert measured["weights"] == pytest.approx(whole / 2, rel=0.01)
        assert measured["gradients"] == measured["weights"]
        assert measured["moments"] == 2 * measured["weights"]
    assert held == {"weights": whole, "gradients": whole, "moments": 2 * whole}


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_bit(two: Path) -> None:
    cfg = config(shard=True, **CASES["routed M, S and T"], ema=0.9)
    straight = run_of(two / "straight", cfg)
    interrupted = run_of(two / "interrupted", cfg)
    assert without_times(interrupted.metrics()) == without_times(straight.metrics())
    summary = interrupted.summary()
    assert summary is not None and summary["resumed"] == 1
    assert summary["weights"] == (straight.summary() or {})["weights"]
    state = tensors(straight)[0]
    for name, tensor in tensors(interrupted)[0].items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.slow
def test_other_numbers_of_processes_resume_a_checkpoint(two: Path, tmp_path: Path) -> None:
    cfg = config(shard=True, ema=0.9)
    out = two / "two, one, three"
    run = run_of(out, cfg)
    assert tensors(run)[1]["step"] == 4
    assert "machine_class" in tensors(run)[1]
    saved = tensors(run)[0]
    state = set_up(cfg).start()
    state.load(saved, 4, 0)
    loaded = state.tensors()
    assert loaded.keys() == saved.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, saved[name]), name
    with pytest.raises(Exception, match="step 8"):
        train(cfg, out, until=8)
    torchrun(tmp_path, 3, [[cfg, out, 0]])
    whole = config(ema=0.9)
    train(whole, tmp_path / "one")
    compare(run_of(tmp_path / "one", whole), run)
    summary = run.summary()
    assert summary is not None and summary["resumed"] == 2
    assert [machine["processes"] for machine in summary["machine_classes"]] == [2, 1, 3]


@pytest.mark.slow
def test_a_killed_run_continues_to_the_bit(two: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 80, "checkpoint_every": 10, "epochs": 20, "eval_interval": 40, "shard": True}
    cfg = config(**changes)
    run = run_of(tmp_path / "killed", cfg)
    process = subprocess.Popen(
        command(tmp_path / "killed", **changes),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    try:
        deadline = time.monotonic() + 300
        while not run.path.is_dir() or len(steps(run)) < 25:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.01)
        os.kill(run.status()["pid"], signal.SIGKILL)
        note = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    assert note.count("a sharded run neither reads from the store nor writes to it") == 1
    assert not (tmp_path / "killed" / ".store" / "nodes").exists()
    done = subprocess.run(
        command(tmp_path / "killed", **changes),
        capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=600,
    )  # fmt: skip
    assert done.returncode == 0 and "resumes after step" in done.stderr, done.stderr
    assert done.stdout.count("guards:") == 1, "only the leader prints"
    torchrun(tmp_path, 2, [[cfg, tmp_path / "straight", 0]])
    straight = run_of(tmp_path / "straight", cfg)
    assert without_times(run.metrics()) == without_times(straight.metrics())
    assert (run.summary() or {})["weights"] == (straight.summary() or {})["weights"]


def command(out: Path, **changes: Any) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "mainrun", "train", "--preset", "baseline", *tiny_sets(**SMALL | changes)]
    return [sys.executable, *start, *arguments, "--out", str(out)]
