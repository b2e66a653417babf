"""`mainrun grow verify`: the ops of a run done once more, from the states before them, with all their checks."""

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

CLOCKS = ("seconds", "reused")  # what differs from one time to the next
PROVEN = (f"{PREFIX}SUCCESS", f"{PREFIX}LOOKBACK")


class Finding(NamedTuple):
    """A check of an op as it came out now; `same`: the op left the same row in the run's own journal, to the bit."""

    op: str
    name: str
    step: int
    check: str
    ok: bool
    same: bool
    detail: str


def repeat(run: RunDir, store: Store | None) -> Iterator[Finding]:
    """The way to an op is taken from the store where it is there, and trained where not; the op and the steps behind it are done here."""
    cfg, told = run.config(), journal(run)
    done = {
        row["op"]: row["step"]
        for row in told
        if row["event"] == f"{PREFIX}SUCCESS" and row["name"] in ARCHITECTURE
    }
    if not done or not cfg.growth.ops:
        raise UsageError(
            f"{run.path} has no op of the architecture that acted; give a run whose schedule grew it"
        )
    with TemporaryDirectory() as folder:
        for step in sorted(set(done.values())):
            _train(cfg, Path(folder), store, step)
            _train(cfg, Path(folder), None, step + SETTLES)
        again = journal(RunDir(Path(folder) / cfg.run_id))
    own = [_bare(row) for row in told if row["event"] in PROVEN and row["name"] in ARCHITECTURE]
    for row in again:
        if row["event"] not in PROVEN or row["name"] not in ARCHITECTURE:
            continue
        same = _bare(row) in own
        for check in row["checks"]:
            yield Finding(
                row["op"], row["name"], row["step"], check["name"], check["ok"], same, check["detail"]
            )
    found = [_bare(row) for row in again]
    for row in own:  # a row that nothing here left; that of an op that does not act again is one
        if row not in found and not any(
            (row["event"], row["op"]) == (other["event"], other["op"]) for other in found
        ):
            yield Finding(
                row["op"],
                row["name"],
                row["step"],
                "journal",
                True,
                False,
                "the run's journal says so, and it did not come again",
            )


def _train(cfg: TrainConfig, out: Path, store: Store | None, until: int) -> None:
    with suppress(Interrupted):  # as it was asked to
        train(cfg, out, store=store, until=until)


def journal(run: RunDir) -> list[dict[str, Any]]:
    file = run.path / "growth.jsonl"
    if not os.path.lexists(file):
        raise UsageError(f"{run.path} has no growth.jsonl; give a run with a growth schedule")
    rows = run.journal()
    if fault := next((row for row in rows if row["event"] in PROVEN and "checks" not in row), None):
        raise RunError(
            f"{file} is damaged: its row {fault['event']} of step {fault['step']} lacks 'checks'; {run.fix}"
        )
    return rows


def _bare(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in CLOCKS}
