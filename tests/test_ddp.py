"""Two processes (gloo, started by torchrun) train the same run as one process, and only the leader writes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, tiny_sets

from mainrun.config import TrainConfig, from_dict
from mainrun.run.session import train
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "num_titles": 200,
    "preset": "baseline",
    "dropout": 0.0,
    "lr": 0.3,
    "optimizer": "sgd",
}

# The first op fires at a fixed step, and the second at an evaluation. All processes must choose alike.
GROWS = (
    '{"version":2,"ops":[{"name":"stack_layers","value":[0,0,1],"init":"identity","trigger":{"step":9}},'
    '{"name":"widen_mlp","value":160,"trigger":{"any":[{"loss_below":0.1},{"wait_iters":5}]}}]}'
)


def config(**changes: Any) -> TrainConfig:
    """Return the config that the command line builds from the same changes."""
    from mainrun.plan.recipes import load

    fields = load("baseline")[0].model_dump() | TINY | SMALL | changes
    return from_dict(fields | {"preset": "baseline"})


def command(out: Path, *arguments: str, processes: int = 2, **changes: Any) -> list[str]:
    sets = {k: v for k, v in (SMALL | changes).items() if k != "preset"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    train = ["-m", "mainrun", "train", "--preset", "baseline", *tiny_sets(**sets), "--out", str(out)]
    return [sys.executable, *torchrun, *train, *arguments]


def torchrun(out: Path, *arguments: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(out, *arguments, **changes), capture_output=True, text=True, cwd=ROOT, timeout=600
    )


def losses(run: RunDir) -> list[float]:
    return [r["loss"] for r in run.metrics() if r["event"] == "step"]


def compare(one: RunDir, two: RunDir, tolerance: float = 1e-5) -> None:
    """Check that two runs have nearly equal losses, scores and weights."""
    losses_one = losses(one)
    losses_two = losses(two)
    assert len(losses_one) == len(losses_two) >= 20 and losses_one[0] - losses_one[-1] > 0.05
    assert losses_two == pytest.approx(losses_one, abs=tolerance)
    for row_a, row_b in zip(one.metrics(), two.metrics(), strict=True):
        assert row_a["event"] == row_b["event"] and row_a["step"] == row_b["step"]
        if row_a["event"] == "eval":
            assert row_b["full"] == pytest.approx(row_a["full"], abs=tolerance)
    first = checkpoint.load_newest(one.checkpoints, lambda meta: None, lambda text: None)
    second = checkpoint.load_newest(two.checkpoints, lambda meta: None, lambda text: None)
    assert first is not None and second is not None and first[0].keys() == second[0].keys()
    for name, tensor in first[0].items():
        # The loss does not depend on the bias of k, so AdamW amplifies the rounding error of its gradient.
        if name.startswith("model/") and not name.endswith("attn.k.bias"):
            assert (tensor - second[0][name]).abs().max() < 10 * tolerance, name


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"optimizer": "adamw", "lr": 1e-3, "grad_accum": 2, "ema": 0.9, "weight_decay": 0.1},
        {
            "optimizer": "muon",
            "momentum": 0.9,
            "lr": 0.01,
            "lr_aux": 1e-3,
            "order": "shuffle_titles",
            "value_residual": True,
            "value_shortcut": True,
            "x0_shortcut": True,
            "unet": True,
        },
        {"growth": GROWS},
        {"members": 2, "optimizer": "adamw", "lr": 1e-3, "grad_accum": 2},
    ],
    ids=["sgd", "adamw, accumulation, ema", "muon", "growth", "members"],
)
def test_two_processes_train_the_same_run_as_one(tmp_path: Path, recipe: dict[str, Any]) -> None:
    cfg = config(**recipe)
    done = torchrun(tmp_path / "two", **recipe)
    assert done.returncode == 0, done.stderr
    two = RunDir(tmp_path / "two" / cfg.run_id)
    # Muon orthogonalises in bfloat16, so differently rounded gradients change the loss by up to 1e-4.
    train(cfg, tmp_path / "one")
    compare(RunDir(tmp_path / "one" / cfg.run_id), two, 5e-4 if cfg.optimizer == "muon" else 1e-5)
    # With grad_accum=2, one process sums the gradients in the same order as two, so the losses agree more
    # closely.
    if cfg.optimizer == "muon":
        pieces = config(**recipe, grad_accum=2)
        train(pieces, tmp_path / "one")
        compare(RunDir(tmp_path / "one" / pieces.run_id), two)
    summary = two.summary()
    assert summary is not None and summary["machine_class"]["processes"] == 2
    assert [g for g in summary["guards"] if g["status"] == "fail"] == [], (
        "the ledger contains the tokens of both processes"
    )
    assert done.stdout.count("guards:") == 1, "only the leader prints"


def test_dropout_masks_differ_between_the_processes(tmp_path: Path) -> None:
    """If both processes used the same seed, their losses would differ from those of a single process."""
    changes = {"dropout": 0.5, "lr": 1e-9, "eval_per_epoch": 0}
    done = torchrun(tmp_path / "two", **changes)
    assert done.returncode == 0, done.stderr
    cfg = config(**changes, grad_accum=2)
    train(cfg, tmp_path / "one")
    two = RunDir(tmp_path / "two" / config(**changes).run_id)
    assert losses(two) == pytest.approx(losses(RunDir(tmp_path / "one" / cfg.run_id)), abs=1e-5)


def test_an_interrupted_run_of_two_processes_resumes(tmp_path: Path) -> None:
    changes = {"optimizer": "adamw", "lr": 1e-3, "epochs": 8, "checkpoint_every": 50}
    cfg = config(**changes)
    run = RunDir(tmp_path / "two" / cfg.run_id)
    process = subprocess.Popen(
        command(tmp_path / "two", **changes), stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 300
        while len(losses(run)) < 20:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.01)
        os.kill(run.status()["pid"], signal.SIGTERM)  # a signal to one process stops both of them
        error = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    assert process.returncode != 0
    assert set(re.findall(r"exitcode *: (\d+)", error)) == {"75"}, error
    assert "SIGTERM at step" in error
    status = run.status()
    assert status["state"] == "interrupted" and 20 <= status["step"] < status["steps"]
    done = torchrun(tmp_path / "two", **changes)
    assert done.returncode == 0, done.stderr
    assert f"resumes after step {status['step']}" in done.stderr
    train(cfg, tmp_path / "one")
    compare(RunDir(tmp_path / "one" / cfg.run_id), run)
    assert [r["step"] for r in run.metrics() if r["event"] == "step"] == list(range(1, status["steps"] + 1))

    # Running the command again shows the finished run. With --fresh, all processes ignore the old summary.
    weights = (run.summary() or {})["weights"]
    assert torchrun(tmp_path / "two", **changes).returncode == 0 and (run.summary() or {})["resumed"] == 1
    done = torchrun(tmp_path / "two", "--fresh", **changes)
    assert done.returncode == 0, done.stderr
    summary = run.summary()
    assert summary is not None and summary["resumed"] == 0 and len(weights) == 64


def test_a_batch_that_does_not_split_is_refused(tmp_path: Path) -> None:
    done = torchrun(tmp_path, grad_accum=8)
    message = "batch_size=8 is not divisible by 2 processes x grad_accum=8"
    assert done.returncode != 0 and message in done.stderr
    assert re.findall(r"exitcode *: (\d+)", done.stderr)[:1] == ["2"], done.stderr
    assert list(tmp_path.iterdir()) == []
    # Start one of the two processes without torchrun.
    alone = [sys.executable, *command(tmp_path, grad_accum=8)[6:]]
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    one = subprocess.run(alone, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert (
        one.returncode == 2 and one.stderr.startswith(f"error: {message}") and "Traceback" not in one.stderr
    )
