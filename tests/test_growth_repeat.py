"""`grow verify` without any training: which steps are trained again, and how the rows that come out are held against the run's journal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from mainrun.checks import repeat as module
from mainrun.checks.repeat import Finding, journal, repeat
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


DEEPER = row("SUCCESS", "stack_layers", 4, check("function"), check("groups"), params=99, seconds=1.5)
RATE = row("SUCCESS", "set_lr", 4, place=1, seconds=1.5)
WIDER = row("SUCCESS", "widen_mlp", 8, check("function"), place=2, params=120, seconds=2.5)
LOOK = row("LOOKBACK", "stack_layers", 14, check("symmetry"), check("router"), since=4)
WHOLE = [row("START", "stack_layers", 4), DEEPER, RATE, WIDER, LOOK]


class Again:
    """In the place of `train`: it leaves a journal of its own, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.asked: list[tuple[Any, int]] = []
        self.outs: set[Path] = set()
        self.ends = False

    def __call__(self, cfg: TrainConfig, out: Path, *, store: Any, until: int) -> None:
        self.asked.append((store, until))
        self.outs.add(out)
        folder = out / cfg.run_id
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, self.rows)
        if not self.ends:
            raise Interrupted("as it was asked to")


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Again:
    made = Again()
    monkeypatch.setattr(module, "train", made)
    return made


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "growth.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def run_of(folder: Path, rows: list[dict[str, Any]], ops: list[dict[str, Any]] = OPS) -> RunDir:
    cfg = from_dict(TINY | {"growth": {"ops": ops}})
    (folder / "config.json").write_text(json.dumps({"config": cfg.model_dump(), "digest": cfg.digest}))
    write(folder, rows)
    return RunDir(folder)


def test_the_way_to_each_op_comes_from_the_store_and_the_steps_behind_it_do_not(
    tmp_path: Path, again: Again
) -> None:
    again.rows = WHOLE
    list(repeat(run_of(tmp_path, WHOLE), STORE))
    assert again.asked == [(STORE, 4), (None, 14), (STORE, 8), (None, 18)]
    (out,) = again.outs
    assert not out.exists(), "it was a folder for the time being"


def test_each_step_is_trained_once_and_in_order(tmp_path: Path, again: Again) -> None:
    again.rows = [
        WIDER | {"step": 3},
        row("SUCCESS", "add_heads", 3, check("function")),
        DEEPER,
        RATE | {"step": 1},
    ]
    again.ends = True  # a run that is shorter than what was asked for
    list(repeat(run_of(tmp_path, again.rows), STORE))
    assert [until for _, until in again.asked] == [3, 13, 4, 14], "a step of a training op needs no proof"


def test_every_check_of_a_proven_row_is_a_finding(tmp_path: Path, again: Again) -> None:
    again.rows = WHOLE
    assert list(repeat(run_of(tmp_path, WHOLE), STORE)) == [
        Finding("0-stack_layers", "stack_layers", 4, "function", True, True, "well"),
        Finding("0-stack_layers", "stack_layers", 4, "groups", True, True, "well"),
        Finding("2-widen_mlp", "widen_mlp", 8, "function", True, True, "well"),
        Finding("0-stack_layers", "stack_layers", 14, "symmetry", True, True, "well"),
        Finding("0-stack_layers", "stack_layers", 14, "router", True, True, "well"),
    ]


def test_clocks_and_the_mark_of_what_was_taken_may_differ(tmp_path: Path, again: Again) -> None:
    again.rows = [entry | {"seconds": 9.0} for entry in WHOLE]
    assert all(
        found.same for found in repeat(run_of(tmp_path, [entry | {"reused": True} for entry in WHOLE]), STORE)
    )


@pytest.mark.parametrize(
    "change", [{"params": 100}, {"step": 5}, {"delta_logits": 0.5}, {"checks": [check("function")]}]
)
def test_another_row_is_not_the_same(tmp_path: Path, again: Again, change: dict[str, Any]) -> None:
    again.rows = [DEEPER | change, WIDER]
    found = list(repeat(run_of(tmp_path, [DEEPER, WIDER]), STORE))
    assert {f.name: f.same for f in found} == {"stack_layers": False, "widen_mlp": True} and all(
        f.ok for f in found
    )
    assert not [f for f in found if f.check == "journal"], "it did act again, so its check says so already"


def test_a_check_that_fails_is_a_finding_that_fails(tmp_path: Path, again: Again) -> None:
    again.rows = [DEEPER | {"checks": [check("function", False, "off by 3")]}]
    (found,) = repeat(run_of(tmp_path, [DEEPER]), STORE)
    assert (found.check, found.ok, found.same, found.detail) == ("function", False, False, "off by 3")


def test_a_row_of_the_journal_that_does_not_come_again_is_a_finding(tmp_path: Path, again: Again) -> None:
    again.rows = [DEEPER, row("ERROR", "widen_mlp", 8, check("function", False), place=2)]
    *others, missing = repeat(run_of(tmp_path, [DEEPER, WIDER, LOOK]), STORE)
    assert [f.check for f in others] == ["function", "groups", "journal"]
    assert others[-1][:3] == ("2-widen_mlp", "widen_mlp", 8) and missing[:4] == (
        "0-stack_layers",
        "stack_layers",
        14,
        "journal",
    )
    assert (missing.ok, missing.same) == (True, False)
    assert missing.detail == "the run's journal says so, and it did not come again"


def test_training_ops_and_other_events_need_not_come_again(tmp_path: Path, again: Again) -> None:
    again.rows = [DEEPER]
    found = list(repeat(run_of(tmp_path, [DEEPER, RATE, row("REEVALUATION", "stack_layers", 4)]), STORE))
    assert all(f.same for f in found) and len(found) == 2
    again.rows = [
        DEEPER,
        RATE,
        row("REEVALUATION", "stack_layers", 4),
        row("LOOKBACK", "set_lr", 4, check("x")),
    ]
    assert len(list(repeat(run_of(tmp_path, [DEEPER]), STORE))) == 2


@pytest.mark.parametrize(
    ("rows", "ops"),
    [
        ([], OPS), ([RATE], OPS), ([row("START", "stack_layers", 4), row("ERROR", "stack_layers", 4)], OPS), ([DEEPER], []),
    ],
    ids=["an empty journal", "only training ops", "none that acted", "a config without growth"],
)  # fmt: skip
def test_a_run_that_nothing_grew_is_refused(
    tmp_path: Path, again: Again, rows: list[dict[str, Any]], ops: list[dict[str, Any]]
) -> None:
    with pytest.raises(
        UsageError, match="has no op of the architecture that acted; give a run whose schedule grew it"
    ):
        list(repeat(run_of(tmp_path, rows, ops), STORE))
    assert not again.asked


def test_a_run_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no growth.jsonl; give a run with a growth schedule"):
        journal(RunDir(tmp_path))


@pytest.mark.parametrize("event", ["SUCCESS", "LOOKBACK"])
def test_a_proven_row_without_its_checks_is_damage(tmp_path: Path, event: str) -> None:
    torn = {key: value for key, value in row(event, "widen_mlp", 8).items() if key != "checks"}
    with pytest.raises(
        RunError,
        match=rf"growth.jsonl is damaged: its row OPERATION_{event} of step 8 lacks 'checks'; restore it",
    ):
        journal(run_of(tmp_path, [DEEPER, torn]))
    start = {key: value for key, value in row("START", "widen_mlp", 8).items() if key != "checks"}
    assert journal(run_of(tmp_path, [DEEPER, start])) == [DEEPER, start]


def test_a_link_that_leads_nowhere_is_damage_and_not_absence(tmp_path: Path) -> None:
    (tmp_path / "growth.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(RunError) as e:
        journal(RunDir(tmp_path))
    assert "growth.jsonl" in str(e.value) and "give a run with a growth schedule" not in str(e.value)
