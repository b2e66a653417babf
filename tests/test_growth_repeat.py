"""Test with a fake `train` which steps `grow verify` trains and how it compares the journals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from mainrun.checks import repeat as module
from mainrun.checks.repeat import RepeatedCheck, read_journal, repeat_ops
from mainrun.config import TrainConfig, from_dict
from mainrun.errors import Interrupted, RunError, UsageError
from mainrun.store.rundir import RunDir

OPS = [
    {"name": "stack_layers", "value": [0, 1, 1], "trigger": {"step": 4}, "init": "identity"},
    {"name": "set_lr", "value": 0.01, "trigger": {"step": 4}},
    {"name": "widen_mlp", "value": 160, "trigger": {"step": 8}},
]
STORE: Any = object()


def check(name: str, ok: bool = True, detail: str = "well") -> dict[str, Any]:
    return {"name": name, "ok": ok, "detail": detail}


def row(
    event: str, name: str, step: int, *checks: dict[str, Any], place: int = 0, **more: Any
) -> dict[str, Any]:
    return {
        "event": f"OPERATION_{event}",
        "op": f"{place}-{name}",
        "name": name,
        "step": step,
        "checks": list(checks),
        **more,
    }


STACK = row("SUCCESS", "stack_layers", 4, check("function"), check("groups"), params=99, seconds=1.5)
SET_LR = row("SUCCESS", "set_lr", 4, place=1, seconds=1.5)
WIDEN = row("SUCCESS", "widen_mlp", 8, check("function"), place=2, params=120, seconds=2.5)
LOOKBACK = row("LOOKBACK", "stack_layers", 14, check("symmetry"), check("router"), since=4)
JOURNAL = [row("START", "stack_layers", 4), STACK, SET_LR, WIDEN, LOOKBACK]


class FakeTrain:
    """A replacement for `train` that writes `rows` as the journal and records its calls."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.calls: list[tuple[Any, int]] = []  # (store, until)
        self.outs: set[Path] = set()
        self.finishes = False  # whether the run ends before step `until`

    def __call__(self, cfg: TrainConfig, out: Path, *, store: Any, until: int) -> None:
        self.calls.append((store, until))
        self.outs.add(out)
        folder = out / cfg.run_id
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, self.rows)
        if not self.finishes:
            raise Interrupted("at `until`")


@pytest.fixture
def fake_train(monkeypatch: pytest.MonkeyPatch) -> FakeTrain:
    fake = FakeTrain()
    monkeypatch.setattr(module, "train", fake)
    return fake


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "growth.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def make_run(folder: Path, rows: list[dict[str, Any]], ops: list[dict[str, Any]] = OPS) -> RunDir:
    cfg = from_dict(TINY | {"growth": {"ops": ops}})
    (folder / "config.json").write_text(json.dumps({"config": cfg.model_dump(), "digest": cfg.digest}))
    write(folder, rows)
    return RunDir(folder)


def test_only_the_steps_before_an_op_come_from_the_store(tmp_path: Path, fake_train: FakeTrain) -> None:
    fake_train.rows = JOURNAL
    list(repeat_ops(make_run(tmp_path, JOURNAL), STORE))
    assert fake_train.calls == [(STORE, 4), (None, 14), (STORE, 8), (None, 18)]
    (out,) = fake_train.outs
    assert not out.exists(), "the folder is temporary"


def test_each_op_is_repeated_once_and_in_order(tmp_path: Path, fake_train: FakeTrain) -> None:
    fake_train.rows = [
        WIDEN | {"step": 3},
        row("SUCCESS", "add_heads", 3, check("function")),
        STACK,
        SET_LR | {"step": 1},
    ]
    fake_train.finishes = True
    list(repeat_ops(make_run(tmp_path, fake_train.rows), STORE))
    assert [until for _, until in fake_train.calls] == [3, 13, 4, 14], "training ops are not repeated"


def test_every_check_is_returned(tmp_path: Path, fake_train: FakeTrain) -> None:
    fake_train.rows = JOURNAL
    assert list(repeat_ops(make_run(tmp_path, JOURNAL), STORE)) == [
        RepeatedCheck("0-stack_layers", "stack_layers", 4, "function", True, True, "well"),
        RepeatedCheck("0-stack_layers", "stack_layers", 4, "groups", True, True, "well"),
        RepeatedCheck("2-widen_mlp", "widen_mlp", 8, "function", True, True, "well"),
        RepeatedCheck("0-stack_layers", "stack_layers", 14, "symmetry", True, True, "well"),
        RepeatedCheck("0-stack_layers", "stack_layers", 14, "router", True, True, "well"),
    ]


def test_seconds_and_reused_are_not_compared(tmp_path: Path, fake_train: FakeTrain) -> None:
    fake_train.rows = [entry | {"seconds": 9.0} for entry in JOURNAL]
    run = make_run(tmp_path, [entry | {"reused": True} for entry in JOURNAL])
    assert all(result.same for result in repeat_ops(run, STORE))


@pytest.mark.parametrize(
    "change", [{"params": 100}, {"step": 5}, {"delta_logits": 0.5}, {"checks": [check("function")]}]
)
def test_a_changed_row_is_not_the_same(tmp_path: Path, fake_train: FakeTrain, change: dict[str, Any]) -> None:
    fake_train.rows = [STACK | change, WIDEN]
    results = list(repeat_ops(make_run(tmp_path, [STACK, WIDEN]), STORE))
    assert {result.name: result.same for result in results} == {"stack_layers": False, "widen_mlp": True}
    assert all(result.ok for result in results)
    assert not any(result.check == "journal" for result in results), "the op was repeated"


def test_a_failed_check(tmp_path: Path, fake_train: FakeTrain) -> None:
    fake_train.rows = [STACK | {"checks": [check("function", False, "off by 3")]}]
    (result,) = repeat_ops(make_run(tmp_path, [STACK]), STORE)
    assert (result.check, result.ok, result.same, result.detail) == ("function", False, False, "off by 3")


def test_a_row_that_is_not_repeated(tmp_path: Path, fake_train: FakeTrain) -> None:
    fake_train.rows = [STACK, row("ERROR", "widen_mlp", 8, check("function", False), place=2)]
    *others, missing = repeat_ops(make_run(tmp_path, [STACK, WIDEN, LOOKBACK]), STORE)
    assert [other.check for other in others] == ["function", "groups", "journal"]
    assert others[-1][:3] == ("2-widen_mlp", "widen_mlp", 8)
    assert missing[:4] == ("0-stack_layers", "stack_layers", 14, "journal")
    assert (missing.ok, missing.same) == (True, False)
    assert missing.detail == "growth.jsonl of the run has this row, but the repeated op did not write it"


def test_training_ops_and_other_events_need_not_be_repeated(tmp_path: Path, fake_train: FakeTrain) -> None:
    fake_train.rows = [STACK]
    reevaluation = row("REEVALUATION", "stack_layers", 4)
    results = list(repeat_ops(make_run(tmp_path, [STACK, SET_LR, reevaluation]), STORE))
    assert all(result.same for result in results) and len(results) == 2
    fake_train.rows = [STACK, SET_LR, reevaluation, row("LOOKBACK", "set_lr", 4, check("x"))]
    assert len(list(repeat_ops(make_run(tmp_path, [STACK]), STORE))) == 2


@pytest.mark.parametrize(
    ("rows", "ops"),
    [
        ([], OPS),
        ([SET_LR], OPS),
        ([row("START", "stack_layers", 4), row("ERROR", "stack_layers", 4)], OPS),
        ([STACK], []),
    ],
    ids=["an empty journal", "only training ops", "no completed op", "a config without growth"],
)
def test_a_run_without_a_completed_op_is_refused(
    tmp_path: Path, fake_train: FakeTrain, rows: list[dict[str, Any]], ops: list[dict[str, Any]]
) -> None:
    problem = "has no completed op that changes the architecture; give a run in which such an op was applied"
    with pytest.raises(UsageError, match=problem):
        list(repeat_ops(make_run(tmp_path, rows, ops), STORE))
    assert not fake_train.calls


def test_a_run_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no growth.jsonl; give a run with a growth schedule"):
        read_journal(RunDir(tmp_path))


@pytest.mark.parametrize("event", ["SUCCESS", "LOOKBACK"])
def test_a_row_without_its_checks_is_damaged(tmp_path: Path, event: str) -> None:
    torn = {key: value for key, value in row(event, "widen_mlp", 8).items() if key != "checks"}
    with pytest.raises(
        RunError,
        match=rf"growth.jsonl is damaged: its OPERATION_{event} row of step 8 lacks 'checks'; restore it",
    ):
        read_journal(make_run(tmp_path, [STACK, torn]))
    start = {key: value for key, value in row("START", "widen_mlp", 8).items() if key != "checks"}
    assert read_journal(make_run(tmp_path, [STACK, start])) == [STACK, start]


def test_a_broken_link_is_damaged_not_missing(tmp_path: Path) -> None:
    (tmp_path / "growth.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(RunError) as e:
        read_journal(RunDir(tmp_path))
    assert "growth.jsonl" in str(e.value) and "give a run with a growth schedule" not in str(e.value)
