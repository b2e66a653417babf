"""Tests the whole `mainrun demo` in its own repository, at a reduced scale."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from submitting import git, repository

SMALL = ["--set", "num_titles=400", "--set", "epochs=1", "--set", "d_model=32"]
ZIP = "runs/demo/submission.zip"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository(tmp_path_factory.mktemp("demo") / "mainrun")


def start(house: Path, *args: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(house), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "mainrun", "demo", *SMALL, *args]
    return subprocess.Popen(
        command, cwd=house, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def demo(house: Path, *args: str, code: int = 0) -> str:
    """Run the demo to its end and return its output."""
    process = start(house, *args)
    stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == code, stdout + stderr
    assert stderr == "" or code
    return stdout + stderr


@pytest.fixture(scope="module")
def output(house: Path) -> str:
    """Return the output of the whole demo."""
    return demo(house)


@pytest.mark.slow
def test_the_demo_can_be_interrupted(house: Path) -> None:
    stopped = start(house)
    end = time.monotonic() + 300
    while not list(house.glob("runs/demo/demo-*/metrics.jsonl")):  # wait until the first run has started
        assert time.monotonic() < end and stopped.poll() is None
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    stdout, stderr = stopped.communicate(timeout=300)
    assert stopped.returncode == 75, stdout + stderr
    message = "interrupted: the demo was stopped; run the same command again to resume"
    assert stderr.splitlines()[-1] == message
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_the_same_command_resumes_the_demo(house: Path, output: str) -> None:
    steps = [line.split(":")[0] for line in output.splitlines() if line.startswith("[")]
    names = ("train", "train", "grow", "sweep", "report", "submit", "verify")
    assert steps == [f"[{i}/7] {name}" for i, name in enumerate(names, 1)]
    assert "      verified: demo-optimized-" in output and "compared: every bit" in output
    for path in ("studies/demo/export.json", "report.pdf", "submission.zip"):
        assert (house / "runs/demo" / path).is_file()
    assert len(list((house / "runs/demo").glob("demo-*/summary.json"))) == 5
    assert git(house, "status", "--porcelain") == "", "git ignores the results, so the code stays committed"
    assert len(output.splitlines()) < 60
    suggestions = output.split("The whole demo took")[1].splitlines()
    commands = [line.split()[1] for line in suggestions if line.startswith("      mainrun ")]
    assert commands == ["compare", "sample", "sweep", "report", "verify"]


@pytest.mark.slow
def test_a_second_demo_trains_nothing_and_skips_the_submission_of_changes(house: Path, output: str) -> None:
    """Each row of metrics.jsonl contains a time, so training a step again would change its row."""
    before = {path: path.read_bytes() for path in house.glob("runs/demo/**/metrics.jsonl")}
    (house / ZIP).unlink()
    (house / "note.txt").touch()
    second = demo(house)
    assert {path: path.read_bytes() for path in house.glob("runs/demo/**/metrics.jsonl")} == before
    assert (
        "skipped: the working tree has uncommitted changes: note.txt; commit them with `./task checkpoint`"
        in second
    )
    assert "no submission (see the reason above)" in second and not (house / ZIP).exists()


@pytest.mark.slow
def test_a_step_that_fails_ends_the_demo(house: Path, tmp_path: Path) -> None:
    assert demo(house, "--set", "lr=nonsense", code=2).startswith("error: lr='nonsense'")
    failed = demo(house, "--out", str(tmp_path), "--set", "num_titles=3", code=2)
    assert "the demo's train step failed with exit code 2 (see the error above)" in failed
    assert failed.count("error: ") == 2 and "Traceback" not in failed
