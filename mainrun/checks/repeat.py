"""`mainrun grow verify`: repeat the growth operations (ops) of a run, together with all their checks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from mainrun.config import TrainConfig
from mainrun.errors import Interrupted, RunError, UsageError
from mainrun.growth.controller import PREFIX, SETTLES
from mainrun.plan.ops import ARCHITECTURE
from mainrun.run.session import train
from mainrun.store.nodes import Store
from mainrun.store.rundir import RunDir

NOT_COMPARED = ("seconds", "reused")  # the values that may differ when a run is trained again
SUCCESS = f"{PREFIX}SUCCESS"
EVENTS_WITH_CHECKS = (SUCCESS, f"{PREFIX}LOOKBACK")

Row = dict[str, Any]  # a row of growth.jsonl


class RepeatedCheck(NamedTuple):
    """One check of a repeated op. `same` is True if the run's growth.jsonl has an identical row."""

    op: str
    name: str
    step: int
    check: str
    ok: bool
    same: bool
    detail: str


def repeat_ops(run: RunDir, store: Store | None) -> Iterator[RepeatedCheck]:
    """Repeat every op that changes the architecture, and compare its checks with the run's growth.jsonl.

    If the store contains the state before an op, this state is loaded instead of trained again. The op and
    the steps after the op are always computed again.
    """
    cfg = run.config()
    journal = read_journal(run)
    step_of_op = {}
    for row in journal:
        if row["event"] == SUCCESS and row["name"] in ARCHITECTURE:
            step_of_op[row["op"]] = row["step"]
    if not step_of_op or not cfg.growth.ops:
        problem = f"{run.path} has no completed op that changes the architecture"
        raise UsageError(f"{problem}; give a run in which such an op was applied")
    with TemporaryDirectory() as folder:
        for step in sorted(set(step_of_op.values())):
            _train(cfg, Path(folder), store, step)
            _train(cfg, Path(folder), None, step + SETTLES)
        repeated = read_journal(RunDir(Path(folder) / cfg.run_id))
    yield from _compare(journal, repeated)


def _compare(journal: list[Row], repeated: list[Row]) -> Iterator[RepeatedCheck]:
    """Yield all checks of the repeated ops. Then yield a check for each row that was not repeated."""
    expected = _comparable(journal)
    for row in _comparable(repeated):
        same = row in expected
        for check in row["checks"]:
            yield RepeatedCheck(
                row["op"], row["name"], row["step"], check["name"], check["ok"], same, check["detail"]
            )
    repeated_events = {(row["event"], row["op"]) for row in repeated}
    for row in expected:
        if (row["event"], row["op"]) not in repeated_events:
            detail = "growth.jsonl of the run has this row, but the repeated op did not write it"
            yield RepeatedCheck(row["op"], row["name"], row["step"], "journal", True, False, detail)


def _comparable(rows: list[Row]) -> list[Row]:
    """Return the rows that contain checks of architecture ops, without the keys in NOT_COMPARED."""
    comparable = []
    for row in rows:
        if row["event"] in EVENTS_WITH_CHECKS and row["name"] in ARCHITECTURE:
            comparable.append({key: value for key, value in row.items() if key not in NOT_COMPARED})
    return comparable


def _train(cfg: TrainConfig, out: Path, store: Store | None, until: int) -> None:
    with suppress(Interrupted):  # training stops at the step `until` by raising Interrupted
        train(cfg, out, store=store, until=until)


def read_journal(run: RunDir) -> list[Row]:
    """Read a run's growth.jsonl. Only runs with a growth schedule have a growth.jsonl."""
    file = run.path / "growth.jsonl"
    if not os.path.lexists(file):
        raise UsageError(f"{run.path} has no growth.jsonl; give a run with a growth schedule")
    rows = run.journal()
    for row in rows:
        if row["event"] in EVENTS_WITH_CHECKS and "checks" not in row:
            problem = f"{file} is damaged: its {row['event']} row of step {row['step']} lacks 'checks'"
            raise RunError(f"{problem}; {run.fix}")
    return rows
