"""Tests that a run that is killed at any moment and resumed gives the result of an undisturbed run."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_sets

from mainrun.store.rundir import RunDir

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KILLS = 20
CONFIG: dict[str, Any] = {
    "num_titles": 300, "epochs": 8, "dropout": 0.1, "optimizer": "muon", "momentum": 0.9, "lr": 0.01,
    "lr_aux": 1e-3, "ema": 0.9, "order": "shuffle_titles", "checkpoint_every": 3, "eval_per_epoch": 8,
}  # fmt: skip


def start(out: Path, **changes: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mainrun", "train", "--preset", "baseline"]
    command += [*tiny_sets(**CONFIG | changes), "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def finish(out: Path, **changes: Any) -> RunDir:
    process = start(out, **changes)
    _, error = process.communicate()
    assert process.returncode == 0, error
    return the_run(out)


def the_run(out: Path) -> RunDir:
    (path,) = (p for p in out.iterdir() if p.name != ".store")
    return RunDir(path)


def rows_without_seconds(run: RunDir) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in run.metrics()]


def wait_for_rows(process: subprocess.Popen[str], out: Path, rows: int, seconds: float = 600) -> None:
    """Wait until the process has written the given number of rows.

    A run may shorten metrics.jsonl at its start, so the function counts how often the file grows.
    """
    size = -1
    written = 0
    deadline = time.monotonic() + seconds
    while process.poll() is None and written < rows and time.monotonic() < deadline:
        new_size = sum(p.stat().st_size for p in out.glob("*/metrics.jsonl"))
        if 0 <= size < new_size:
            written += 1
        size = new_size
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return finish(tmp_path_factory.mktemp("undisturbed"))


def test_twenty_kills_change_nothing(tmp_path: Path, undisturbed: RunDir) -> None:
    """Some kills hit the start of the run, and others hit training, evaluation or saving."""
    chance = random.Random(1)
    starting = set(chance.sample(range(1, KILLS), 5))
    total = (undisturbed.summary() or {})["steps"]
    reached = []
    moments = Counter[str]()
    startup = 1.0
    for kill in range(KILLS):
        begin = time.monotonic()
        process = start(tmp_path)
        if kill in starting:
            wait_for_rows(process, tmp_path, 3, seconds=startup * chance.uniform(0.1, 1.1))
        else:
            wait_for_rows(process, tmp_path, 1)
            startup = time.monotonic() - begin
            # wait for a number of rows instead of a time, because some machines are faster than others
            wait_for_rows(process, tmp_path, chance.randint(0, 24))
            time.sleep(chance.uniform(0, 0.03))
        assert process.poll() is None, f"the run ended before kill {kill}: {process.communicate()[1]}"
        process.kill()
        process.communicate()
        for run in map(RunDir, tmp_path.glob("[!.]*")):
            # Reading these files never fails, because they are always complete.
            run.config(), run.status(), run.env()
            steps = [r["step"] for r in run.metrics() if r["event"] == "step"]
            assert steps == list(range(1, len(steps) + 1)), "no row is lost or doubled"
            reached.append(len(steps))
            moments["saving"] += bool(list(run.checkpoints.glob(".tmp-*")))
            moments["writing a row"] += not (run.path / "metrics.jsonl").read_bytes().endswith(b"\n")
        moments["starting" if kill in starting else "training"] += 1
    print(f"steps reached: {reached} of {total}; kills while {dict(moments)}")
    saved = [int(p.name.split("-")[1]) for p in the_run(tmp_path).checkpoints.glob("step-*")]
    assert 0 < max(saved) < total, "the kills must hit the middle of the run"
    assert len(set(reached)) >= 8, "the run must make progress between the kills"

    run = finish(tmp_path)
    assert rows_without_seconds(run) == rows_without_seconds(undisturbed)
    summary, expected = run.summary(), undisturbed.summary()
    assert summary is not None and expected is not None
    assert summary["weights"] == expected["weights"] and summary["scores"] == expected["scores"]
    assert [r["step"] for r in run.metrics() if r["event"] == "step"] == list(range(1, total + 1))
    assert summary["resumed"] >= 5 and not list(run.path.rglob("*.tmp*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_the_same_command_resumes_the_run(
    tmp_path: Path, undisturbed: RunDir, number: signal.Signals
) -> None:
    process = start(tmp_path)
    wait_for_rows(process, tmp_path, 10)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 75, error
    assert f"{number.name} at step" in error and "run the same command again to resume" in error
    assert "Traceback" not in error
    status = the_run(tmp_path).status()
    assert status["state"] == "interrupted" and 0 < status["step"] < status["steps"]
    run = finish(tmp_path)
    assert rows_without_seconds(run) == rows_without_seconds(undisturbed)
    assert (run.summary() or {})["weights"] == (undisturbed.summary() or {})["weights"]
    assert (run.summary() or {})["resumed"] == 1
