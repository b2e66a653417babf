"""Tests that the soak test detects every planted difference and a trainer that loses its state."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soak
import torch
from soak_sessions import Disturbance, Ending, Session

from mainrun.core.optimizers import Optimizers
from mainrun.plan.plan import Plan
from mainrun.run.accounts import Accounts
from mainrun.run.summary import finish
from mainrun.store.files import Folder
from mainrun.store.nodes import Store
from mainrun.store.rundir import RunDir, write_json
from mainrun.train import build

ROOT = Path(__file__).parents[1]
ROWS = [
    {"event": "step", "step": 1, "loss": 5.5, "lr": 0.1, "seconds": 0.5},
    {"event": "eval", "step": 1, "split": "val", "full": 1.5, "seconds": 0.25},
    {"event": "step", "step": 2, "loss": 5.25, "lr": 0.1, "seconds": 0.5},
]
SUMMARY = {
    "run": "r",
    "weights": "ab" * 32,
    "scores": {"val": {"last": {"full": 1.5}}},
    "steps": 2,
    "seconds": 3.0,
    "resumed": 0,
}
EVENTS = [
    {"event": "OPERATION_START", "step": 1, "seconds": 0.5},
    {"event": "OPERATION_SUCCESS", "step": 1, "params": 10},
]
EXPORT = {
    "trials": [
        {
            "trial": 0,
            "state": "done",
            "scores": {"0": 1.5},
            "rung": 1,
            "seconds": 3.0,
            "wasted": 0,
            "sets": [],
        }
    ],
    "evidence": {
        "claim": "not better",
        "rows": [{"trial": 1, "p_holm": float("nan")}],
        "noise": {"sigma": 0.5},
    },
    "ledger": {"trained": 10},
}


def write_run(
    folder: Path,
    rows: list[Any] = ROWS,
    summary: dict[str, Any] = SUMMARY,
    events: list[Any] = EVENTS,
    state: str = "done",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "growth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "status.json").write_text(json.dumps({"state": state}))
    return folder


def changed(rows: list[Any], number: int, **fields: Any) -> list[Any]:
    return [row | fields if i == number else row for i, row in enumerate(rows)]


PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "a changed loss": (
        {"rows": changed(ROWS, 2, loss=5.250000000000001)},
        "metrics.jsonl, row 3: loss is 5.250000000000001",
    ),
    "a changed rate": ({"rows": changed(ROWS, 0, lr=0.2)}, "metrics.jsonl, row 1: lr is 0.2"),
    "a changed score": ({"rows": changed(ROWS, 1, full=1.25)}, "metrics.jsonl, row 2: full is 1.25"),
    "a field more": ({"rows": changed(ROWS, 1, new=1)}, "metrics.jsonl, row 2: new is 1"),
    "a missing row": ({"rows": ROWS[:-1]}, "metrics.jsonl: 2 rows, undisturbed 3"),
    "a missing row in the middle": ({"rows": [ROWS[0], ROWS[2]]}, "metrics.jsonl, row 2: event is"),
    "a doubled row": ({"rows": [*ROWS, ROWS[-1]]}, "metrics.jsonl: 4 rows, undisturbed 3"),
    "a changed weight": ({"summary": SUMMARY | {"weights": "ac" * 32}}, "summary.json: weights is"),
    "a changed last score": (
        {"summary": SUMMARY | {"scores": {"val": {"last": {"full": 1.25}}}}},
        "summary.json: scores is",
    ),
    "a missing key": (
        {"summary": {k: v for k, v in SUMMARY.items() if k != "weights"}},
        "summary.json: weights is null",
    ),
    "a missing event": ({"events": EVENTS[:1]}, "growth.jsonl: 1 rows, undisturbed 2"),
    "a changed event": ({"events": changed(EVENTS, 1, params=11)}, "growth.jsonl, row 2: params is 11"),
    "not done": ({"state": "running"}, "status.json: state is 'running'"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_difference_is_noticed(case: str, tmp_path: Path) -> None:
    plant, message = PLANTED[case]
    differences = soak.compare_runs(write_run(tmp_path / "a"), write_run(tmp_path / "b", **plant))
    assert any(text.startswith(message) for text in differences), differences


def test_fields_that_depend_on_the_clock_are_ignored(tmp_path: Path) -> None:
    summary = SUMMARY | {
        "seconds": 9.0,
        "resumed": 7,
        "ledger": {"wasted": 3},
        "spent": {"steps": 1.0},
        "peak_memory": 5,
    }
    rows = [row | {"seconds": 9.0, "reused": True} for row in ROWS]
    actual = write_run(tmp_path / "b", rows, summary, changed(EVENTS, 0, seconds=9.0))
    assert soak.compare_runs(write_run(tmp_path / "a"), actual) == []


def test_a_file_that_is_left_behind_or_missing_is_noticed(tmp_path: Path) -> None:
    expected, actual = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (actual / "checkpoints" / ".tmp-step-00000001").mkdir(parents=True)
    assert soak.compare_runs(expected, actual) == ["left behind: checkpoints/.tmp-step-00000001"]
    (actual / "summary.json").unlink()
    assert "missing or damaged" in soak.compare_runs(expected, actual)[0]


STUDY_PLANTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a score": (
        lambda e: e["trials"][0]["scores"].update({"0": 1.25}),
        "export.json.trials[0].scores.0 is 1.25",
    ),
    "a promotion": (lambda e: e["trials"][0].update(rung=0), "export.json.trials[0].rung is 0"),
    "a claim": (lambda e: e["evidence"].update(claim="better"), 'export.json.evidence.claim is "better"'),
    "a missing trial": (lambda e: e["trials"].clear(), "export.json.trials is []"),
}


@pytest.mark.parametrize("case", [*STUDY_PLANTS, "costs"])
def test_a_planted_difference_of_a_study_is_noticed(case: str, tmp_path: Path) -> None:
    export = json.loads(json.dumps(EXPORT))
    act, message = STUDY_PLANTS.get(case, (lambda e: e["trials"][0].update(seconds=9.0, wasted=4), ""))
    act(export)
    for name, value in (("a", EXPORT), ("b", export)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "export.json").write_text(json.dumps(value))
    differences = soak.compare_studies(tmp_path / "a", tmp_path / "b")
    assert [text.startswith(message) for text in differences] == [True] * bool(message), differences


@pytest.mark.parametrize(
    ("code", "applied", "full", "text", "problem"),
    [
        (0, (), False, "", ""),
        (0, ("TERM",), False, "", ""),
        (75, ("TERM",), False, "interrupted: SIGTERM at step 3", ""),
        (75, ("INT",), False, "", ""),
        (130, ("INT",), False, "", ""),
        (-9, ("KILL",), False, "", ""),
        (75, (), True, "no space left", ""),
        (75, (), False, "", "exit code 75"),
        (75, ("KILL",), False, "", "exit code 75"),
        (-9, ("TERM",), False, "", "exit code -9"),
        (130, ("TERM",), False, "", "exit code 130"),
        (2, ("KILL",), False, "", "exit code 2"),
        (1, ("TERM",), True, "", "exit code 1"),
        (0, (), False, "Traceback (most recent call last)", "a crash with exit code 0"),
        (75, ("TERM",), False, "crash: KeyError", "a crash with exit code 75"),
        (None, ("STOP",), False, "", "hangs: no end after 2 s"),
    ],
)
def test_a_wrong_ending_is_a_problem(
    code: int | None, applied: tuple[str, ...], full: bool, text: str, problem: str
) -> None:
    session = Session(("train",), Path("base"), Path("cache"), Path("log"), disk_is_full=full)
    assert (
        Ending(session, code, text, 2.0, 9, tuple((kind, "start") for kind in applied)).problem() == problem
    )


def test_the_seed_decides_what_is_run_and_how_it_is_disturbed(tmp_path: Path) -> None:
    session = Session(("train",), tmp_path, tmp_path, tmp_path / "log")
    expected = Ending(session, 0, "", 2.0, 100, ())

    def drawn(seed: int) -> tuple[object, ...]:
        chance = random.Random(seed)
        return soak.draw_run(chance, 5, tmp_path), *(
            soak.draw_disturbances(chance, expected, study=False) for _ in range(20)
        )

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_every_optimizer_feature_and_signal_is_drawn(tmp_path: Path) -> None:
    session = Session(("train",), tmp_path, tmp_path, tmp_path / "log")
    expected = Ending(session, 0, "", 2.0, 100, ())
    special = {
        name for index in range(48) for name in soak.draw_run(random.Random(index), index, tmp_path)[1]
    }
    assert {*soak.optimizers(), *soak.FEATURES} <= special
    disturbances = [
        disturbance
        for i in range(200)
        for disturbance in soak.draw_disturbances(random.Random(i), expected, study=True)
    ]
    assert {disturbance.kind for disturbance in disturbances} == {"KILL", "TERM", "INT", "STOP", "WORKER"}
    assert any(disturbance.operation for disturbance in disturbances)
    assert all(
        1 <= disturbance.operation <= 101 or 0 <= disturbance.after <= 2.0 for disturbance in disturbances
    )
    assert str(Disturbance("STOP", operation=7, pause=0.2)) == "STOP at operation 7 for 0.20 s"


def test_new_parameters_join_the_momentum_of_the_others(tiny) -> None:
    """Fused SGD needs momentum for all parameters or none, but growth ops add parameters without momentum."""
    cfg = tiny(optimizer="sgd", momentum=0.9, weight_decay=0.0)
    model = build(cfg, 50)
    optimizers = Optimizers(cfg, model)
    inputs = Plan(cfg, 10_000).at(0)

    def step() -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizers.step(inputs)

    step()
    state = optimizers.state()
    new = "blocks.0.attn.q.weight"
    optimizers = Optimizers(cfg, model)
    optimizers.load({name: value for name, value in state.items() if new not in name})
    step()
    momentum = {name: float(value.mean()) for name, value in optimizers.state().items()}
    assert momentum.pop(f"optimizer/{new}/momentum_buffer") == 1.0, "as at a first step"
    assert list(momentum.values()) == pytest.approx([1.9] * len(momentum))


def test_a_store_that_another_process_begins_meanwhile_is_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Folder.read

    def read_late(self: Folder, name: str) -> bytes:
        try:
            return read(self, name)
        except FileNotFoundError:  # meanwhile another process creates the store
            (tmp_path / "nodes").mkdir()
            (tmp_path / "store.json").write_text('{"format": 1}')
            raise

    monkeypatch.setattr(Folder, "read", read_late)
    assert Store(tmp_path).node_keys() == set()


def test_a_run_with_a_summary_is_done(tiny, tmp_path: Path) -> None:
    """Even after a kill between two writes, a run that has a summary must not be in the state `running`."""
    seen = []
    run = RunDir(tmp_path)

    def write(name: str, value: Any) -> None:
        seen.append((name, run.status().get("state")))
        write_json(tmp_path / name, value)

    run.write = write
    accounts = Accounts()
    accounts.add("steps", 1.0)
    finish(run, SimpleNamespace(step=3), Plan(tiny(), 10_000), accounts, {})
    assert seen == [("status.json", None), ("summary.json", "done")]


def run_soak(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the soak test in a new interpreter, which has run no computation before it forks."""
    paths = [str(ROOT), str(ROOT / "tests")]
    start = f"import sys; sys.path[:0] = {paths!r}; import soak"
    program = f"{start}\n{program}\nsys.exit(soak.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=600
    )


@pytest.mark.parametrize(
    "option",
    ["--kills=0", "--kills=-1", "--jobs=0", "--minutes=nan", "--minutes=-1", "--minutes=0", "--only=-5"],
)
def test_a_wrong_number_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        soak.main([option])
    assert refused.value.code == 2
    assert f"./task soak: error: argument {option.split('=')[0]}: got " in capsys.readouterr().err


@pytest.mark.parametrize("out", ["/etc/passwd", "/proc/x"])
def test_a_wrong_folder_is_refused(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--out", out]) == 2
    assert f"soak: --out {out}: cannot be used as a folder" in capsys.readouterr().err


def test_exit_codes_have_their_counts() -> None:
    assert soak.show_codes(Counter({"0": 10, "75": 7, "-9": 3})) == "0 (10 times), 75 (7), -9 (3)"
    assert soak.show_codes(Counter()) == "none"


def test_a_soak_that_compares_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "run", lambda args, folder: [soak.Result(0, skipped="cannot be trained")])
    monkeypatch.setattr(soak.signal, "signal", lambda *_: None)
    assert soak.main(["--out", str(tmp_path)]) == 1
    assert "nothing was compared" in capsys.readouterr().err


@pytest.mark.slow
def test_a_terminated_soak_removes_its_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "soak.py"), "--only", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert "only subject 0" in first and "disturbances" not in first
    time.sleep(1)
    process.terminate()
    stderr = process.communicate(timeout=120)[1]
    assert (process.returncode, stderr) == (143, "")
    assert list(tmp_path.glob("soak-*")) == []


@pytest.mark.slow
def test_a_short_soak_passes(tmp_path: Path) -> None:
    done = run_soak("", "--kills", "15", "--seed", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failures: 0" in done.stdout
    assert list(tmp_path.iterdir()) == [], "subjects without a difference are removed"


@pytest.mark.slow
def test_a_trainer_that_loses_the_optimizer_state_fails(tmp_path: Path) -> None:
    loses = "import mainrun.train\nmainrun.train.Optimizers.load = lambda *_, **__: None"
    done = run_soak(loses, "--seed", "1", "--kills", "10", "--out", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout and "undisturbed" in done.stdout
    assert "./task soak -- --seed 1 --only " in done.stdout, "the command that repeats it"
