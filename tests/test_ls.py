"""Tests `mainrun ls`, and that tables in a pipe have one line per row."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import odd_cases
import pytest
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.config import TrainConfig
from mainrun.store.rundir import write_json
from mainrun.ui import ls_cli
from mainrun.ui.console import show_table

STEP = {"tokens": 8, "lr": 0.1, "loss": 2.0, "grad_norm": 1.0}
SCORE = {
    "split": "val", "full": 1.5, "official": 1.4, "loss": 4.0, "bits_per_byte": 2.0, "coverage": 0.9,
    "tokens": 90, "step": 4,
}  # fmt: skip


def make_run(out: Path, full: float | None = 1.5, **fields: Any) -> Path:
    """Make a run directory. A run without a score has not begun to train."""
    cfg = TrainConfig(**fields)
    path = out / cfg.run_id
    path.mkdir(parents=True)
    write_json(path / "config.json", {"config": cfg.model_dump(mode="json"), "digest": cfg.digest})
    if full is not None:
        scores = {"last": SCORE | {"full": full}, "best": SCORE | {"full": full - 0.1}}
        write_json(path / "summary.json", {"steps": 4, "params": 1200, "seconds": 65.0, **scores})
    return path


def listed(*args: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["ls", *args, "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def seeds(*args: str) -> list[int]:
    return [row["config"]["seed"] for row in listed(*args)]


@pytest.fixture
def runs(tmp_path: Path) -> str:
    make_run(tmp_path, 1.5, preset="a", seed=1, lr=0.01, weight_decay_aux=0.5)
    make_run(tmp_path, 1.3, preset="b", seed=2, lr=0.02)
    make_run(tmp_path, 1.4, preset="c", seed=3, lr=0.1, title_mask=True)
    make_run(tmp_path, None, preset="d", seed=4, lr=0.01)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([], [1, 2, 3, 4]),
        (["lr<0.02"], [1, 4]),
        (["lr <= 2e-2"], [1, 2, 4]),
        (["lr>0.02"], [3]),
        (["lr>=0.02"], [2, 3]),
        (["lr=1e-2"], [1, 4]),
        (["lr==0.01"], [1, 4]),
        (["lr!=0.01"], [2, 3]),
        (["lr=0.01", "state=done"], [1]),
        (["state!=done"], [4]),
        (["preset=b"], [2]),
        (["title_mask=true"], [3]),
        (["title_mask=1"], []),
        (["weight_decay_aux=none"], [2, 3, 4]),
        (["weight_decay_aux<1"], [1]),
        (["full<1.45"], [2, 3]),
        (["best<1.25"], [2]),
        (["corpus=synthetic", "seed>1"], [2, 3, 4]),
    ],
)
def test_conditions_select_runs(runs: str, conditions: list[str], expected: list[int]) -> None:
    assert seeds(runs, *(word for text in conditions for word in ("--where", text))) == expected


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("run", [1, 2, 3, 4]),
        ("-run", [4, 3, 2, 1]),
        ("full", [2, 3, 1, 4]),
        ("-full", [1, 3, 2, 4]),
        ("lr", [1, 4, 2, 3]),
        ("weight_decay_aux", [1, 2, 3, 4]),
    ],
)
def test_runs_are_sorted_and_those_without_a_value_come_last(
    runs: str, sort: str, expected: list[int]
) -> None:
    assert seeds(runs, "--sort", sort) == expected


def test_the_table_shows_the_fields_that_the_command_names(runs: str) -> None:
    result = CliRunner().invoke(app, ["ls", runs, "--where", "lr<0.05", "--sort", "-seed"])
    head, _, *lines = result.stdout.split("\n")[1:-2]
    assert head.split() == [
        "run",
        "state",
        "step",
        "full",
        "best",
        "params",
        "seconds",
        "seed",
        "lr",
        "modified",
    ]
    assert [line.split()[0][0] for line in lines] == ["d", "b", "a"]
    assert lines[2].split()[1:9] == ["done", "4", "1.5000", "1.4000", "1.2k", "1:05", "1", "0.01"]


def test_an_unfinished_run_shows_its_last_score(tmp_path: Path) -> None:
    path = make_run(tmp_path, None)
    rows: list[dict[str, Any]] = [
        {"event": "step", **STEP, "step": 1, "seconds": 8.0, "reused": True},
        {"event": "step", **STEP, "step": 2, "seconds": 1.5},
        {"event": "eval", **SCORE, "full": 1.9, "step": 2, "params": 50},
        {"event": "step", **STEP, "step": 3, "seconds": 2.0},
        {"event": "eval", **SCORE, "full": 1.2, "step": 4, "params": 60},
        {"event": "eval", **SCORE, "full": 1.7, "step": 6, "params": 70},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "st')
    write_json(path / "status.json", {"state": "interrupted", "step": 4, "steps": 9})
    (row,) = listed(str(tmp_path))
    assert row | {"modified": "", "config": {}} == {
        "run": path.name, "state": "interrupted", "step": 6, "steps": 9, "full": 1.7, "best": 1.2,
        "official": 1.4, "params": 70, "tokens": 90, "flops": None, "seconds": 3.5,
        "modified": "", "config": {},
    }  # fmt: skip


def test_a_killed_run_is_not_shown_as_running(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = make_run(tmp_path, None)
    for pid, node, state in (
        (os.getpid(), platform.node(), "running"),
        (ended.pid, platform.node(), "killed"),
        (ended.pid, "another machine", "running"),
    ):
        write_json(path / "status.json", {"state": "running", "step": 1, "pid": pid})
        (path / ".lock").write_text(f"{pid} on {node}\nx\n")
        assert [row["state"] for row in listed(str(tmp_path))] == [state]


def test_a_damaged_run_is_listed_and_explained(runs: str) -> None:
    (damaged,) = Path(runs).glob("b-*")
    (damaged / "summary.json").write_text("{")
    result = CliRunner().invoke(app, ["ls", runs, "--where", "lr=0.02", "--json"])
    assert result.exit_code == 0
    assert [row["state"] for row in json.loads(result.stdout)] == ["damaged"]
    assert "summary.json is damaged" in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--where", "lr"], "write NAME, a sign"),
        (["--where", "learning_rate<1"], "'learning_rate' is neither a column nor a config field"),
        (["--where", "stat=done"], "did you mean 'state'?"),
        (["--where", "state<done"], "the sign < needs a number"),
        (["--where", "lr=" + "[" * 300 + "]" * 300], "nested too deep"),
        (["--sort", "ful"], "did you mean 'full'?"),
        (["no/such/folder"], "does not exist; give a folder that contains runs"),
        ([__file__], "is not a folder"),
    ],
)
def test_wrong_arguments_are_refused(runs: str, args: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["ls", runs, *args] if args[0].startswith("--") else ["ls", *args])
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


def test_a_thousand_runs_are_listed_within_3_seconds(tmp_path: Path) -> None:
    first = make_run(tmp_path, 1.5)
    config = (first / "config.json").read_text()
    scores = (first / "summary.json").read_text()
    for number in range(999):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        (folder / "config.json").write_text(config)
        (folder / "summary.json").write_text(scores)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    assert len(list(ls_cli.read_rows(tmp_path))) == 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 3


# -- tables and --json


@pytest.mark.parametrize("columns", ["20", "80", "500"])
def test_a_table_in_a_pipe_has_one_line_per_row_and_no_blanks_at_the_end(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    show_table(["name", "text"], [["a", "word " * 60], ["b", "short"]])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:1] for line in lines] == [[], ["name"], ["─" * 307], ["a"], ["b"], []]
    assert all(line == line.rstrip() for line in lines)


def test_every_command_that_prints_a_table_has_json() -> None:
    """The other commands print one path, one URL, generated text, or nothing."""
    without = [
        name for name, params in odd_cases.commands().items() if not any("--json" in p.opts for p in params)
    ]
    assert without == [
        "demo", "sample", "download", "board", "store pin", "store unpin", "sweep export", "sweep dashboard",
        "hub import", "hub export", "hub push",
    ]  # fmt: skip
