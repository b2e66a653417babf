"""`mainrun demo`, all of it, in a repository of its own: at a scale of seconds, with the commands and processes of the real one."""

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
    process = start(house, *args)
    said, wrong = process.communicate(timeout=900)
    assert process.returncode == code, said + wrong
    assert wrong == "" or code
    return said if code == 0 else said + wrong


@pytest.fixture(scope="module")
def gone(house: Path) -> str:
    """The whole way, and what it said."""
    return demo(house)


@pytest.mark.slow
def test_it_is_stopped(house: Path) -> None:
    stopped = start(house)
    end = time.monotonic() + 300
    while not list(house.glob("runs/demo/demo-*/metrics.jsonl")):  # the first run has begun
        assert time.monotonic() < end and stopped.poll() is None
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    said, wrong = stopped.communicate(timeout=300)
    assert stopped.returncode == 75, said + wrong
    assert wrong.splitlines()[-1] == "interrupted: the demo was stopped; the same command goes on from there"
    assert "Traceback" not in wrong


@pytest.mark.slow
def test_it_goes_on_the_whole_way(house: Path, gone: str) -> None:
    assert [line.split(":")[0] for line in gone.splitlines() if line.startswith("[")] == [
        f"[{i}/7] {name}"
        for i, name in enumerate(("train", "train", "grow", "sweep", "report", "submit", "verify"), 1)
    ]
    assert "      verified: demo-optimized-" in gone and "compared: every bit" in gone
    for place in ("studies/demo/export.json", "report.pdf", "submission.zip"):
        assert (house / "runs/demo" / place).is_file()
    assert len(list((house / "runs/demo").glob("demo-*/summary.json"))) == 5
    assert (
        git(house, "status", "--porcelain") == ""
    )  # what it leaves is ignored, so that its own code stays committed
    assert len(gone.splitlines()) < 60  # calm
    following = [
        line.split()
        for line in gone.split("the whole way")[1].splitlines()
        if line.startswith("      mainrun ")
    ]
    assert [words[1] for words in following] == ["compare", "sample", "sweep", "report", "verify"]


@pytest.mark.slow
def test_again_nothing_is_trained_and_changes_are_no_failure(house: Path, gone: str) -> None:
    """A row of metrics.jsonl holds the time that its step took: trained again it would be another."""
    before = {path: path.read_bytes() for path in house.glob("runs/demo/**/metrics.jsonl")}
    (house / ZIP).unlink()
    (house / "note.txt").touch()
    said = demo(house)
    assert {path: path.read_bytes() for path in house.glob("runs/demo/**/metrics.jsonl")} == before
    assert "left out: the working tree is not committed: note.txt; `./task checkpoint` commits it" in said
    assert "no submission, for the reason above" in said and not (house / ZIP).exists()


@pytest.mark.slow
def test_a_step_that_fails_ends_it_and_says_why(house: Path, tmp_path: Path) -> None:
    assert demo(house, "--set", "lr=nonsense", code=2).startswith("error: lr='nonsense'")
    said = demo(house, "--out", str(tmp_path), "--set", "num_titles=3", code=2)
    assert "step train of the demo ended with 2, above is why; the same command goes on from there" in said
    assert said.count("error: ") == 2 and "Traceback" not in said
