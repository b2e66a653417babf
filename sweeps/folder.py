"""A study's folder: whose it is, what it began with, what came out.

study.json   the study, its digest, and the command that goes on with it
runs/        a run directory each, with a store that they share
study.db     Optuna's database of it (record.py), unless it is elsewhere
export.json  what came out, once it is finished (export.py)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mainrun.errors import RunError, UsageError, nearest
from mainrun.files.locks import FileLock, Locked
from mainrun.store import records
from mainrun.store.rundir import check_regular_file, disk_errors, write_text
from sweeps.study import Study


@contextmanager
def owned(folder: Path, study: Study) -> Iterator[None]:
    """One driver at a time, and always the same study in a folder."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    check_regular_file(folder / ".lock", "remove it, and start the same command again")
    try:
        with disk_errors(folder):
            lock = FileLock(folder / ".lock", str(os.getpid()))
    except Locked as holder:
        raise UsageError(
            f"{folder} is searched by process {holder}; wait for it, or give another --out"
        ) from None
    try:
        before = begun(folder)
        if before and before["digest"] != study.digest:
            changes = "; ".join(
                differences(decisive(before["study"]), decisive(study.model_dump(mode="json")))
            )
            changes = changes or "its study.json was changed; restore it"
            raise UsageError(
                f"{folder} holds another study of that name: {changes}. Go on with the old file, or start this one anew with --as NAME"
            )
        yield
    finally:
        lock.release()


def begin(folder: Path, study: Study, command: str) -> None:
    """From here on the folder is this study's. Called when it is known that its base can be trained."""
    found = {"digest": study.digest, "study": study.model_dump(mode="json"), "command": command}
    write_text(folder / "study.json", json.dumps(found, indent=2))


def begun(folder: Path) -> dict[str, Any] | None:
    return _read(folder / "study.json", BEGUN)


def known(folder: Path) -> dict[str, Any]:
    before = begun(folder)
    if not before:
        have = sorted(p.parent.name for p in folder.parent.glob("*/study.json"))
        listed = (
            f"it holds: {', '.join(have)}" if have else "it holds none; `mainrun sweep run STUDY` starts one"
        )
        raise UsageError(f"no study {folder.name!r} in {folder.parent}{nearest(folder.name, have)}; {listed}")
    return {"command": f"mainrun sweep {folder.name}"} | before


def finished(folder: Path) -> dict[str, Any]:
    """What came out."""
    before = known(folder)
    file = folder / "export.json"
    export = _read(file, FINISHED)
    if not export:
        raise RunError(f"{folder} is not finished; `{before['command']}` goes on with it")
    if fault := _disagrees(export):
        raise RunError(
            f"{file} is damaged: {fault}; restore it, or remove it: `{before['command']}` writes it again"
        )
    return export


def _disagrees(export: dict[str, Any]) -> str:
    """Why the parts of an export contradict each other; empty: they do not."""
    numbers = [trial["trial"] for trial in export["trials"]]
    if len(set(numbers)) < len(numbers):
        return "it has a trial twice"
    if unscored := [
        trial["trial"] for trial in export["trials"] if trial["state"] == "done" and trial["value"] is None
    ]:
        return f"its trial {unscored[0]} is done and has no value"
    if export.get("raw_rung_correlation") and not export["study"].get("rungs"):
        return "it has scores of rungs, and a study without rungs"
    winner = (export.get("evidence") or {}).get("winner")
    return (
        f"it has no trial {winner}, which it says won" if winner is not None and winner not in numbers else ""
    )


BEGUN = {"digest": records.text, "study": records.table, "command?": records.any_text}
COSTS = dict.fromkeys(("asked", "trained", "reused", "wasted"), records.count) | {
    "branch?": records.count,
    "tokens?": records.count,
}
TRIAL = {f"{name}?": records.count for name in ("asked", "trained", "reused", "wasted", "branch", "tokens", "steps")} | {
    "trial": records.count, "state": records.text, "value": records.optional(records.any_number), "params": records.table_of(records.setting),
    "scores": records.table, "sets": [records.any_text], "raw_scores?": records.table, "seed?": records.optional(records.count),
    "rung?": records.number, "run?": records.any_text, "reason?": records.any_text, "flops?": records.not_negative,
    "seconds?": records.not_negative,
}  # fmt: skip
CONFIRMED = {
    "trial": records.count, "difference": records.any_number, "interval": records.pair(records.any_number), "p_holm": records.any_number,
    "claim": records.true_or_false, "why": records.any_text, "params": records.table_of(records.setting),
}  # fmt: skip
EVIDENCE = {
    "noise": {"sigma": records.any_number, "floor": records.any_number, "values": [records.any_number]}, "rows": [CONFIRMED], "claim": records.any_text,
    "winner": records.optional(records.count), "val?": {"full": records.any_number, "official": records.any_number},
    "runs?": [COSTS | {"kind": records.text}],
}  # fmt: skip
CORRELATIONS = records.optional(records.table_of(records.optional(records.any_number)))
FINISHED = BEGUN | {
    "name?": records.text, "preset": records.any_text, "objective": records.text, "trials": [TRIAL], "ledger": COSTS,
    "evidence?": records.optional(EVIDENCE), "rung_correlation?": CORRELATIONS, "raw_rung_correlation?": CORRELATIONS,
    "study": {"rungs?": records.optional(records.table), "storage?": records.any_text},
}  # fmt: skip


def _read(file: Path, shape: records.Shape) -> dict[str, Any] | None:
    document: dict[str, Any] | None = records.load(
        file, shape, f"restore it, or move {file.parent} away and begin anew"
    )
    return document


def decisive(study: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in study.items() if key not in Study.FREE}


def differences(a: dict[str, Any], b: dict[str, Any], above: str = "") -> list[str]:
    found = []
    for key in sorted({*a, *b}):
        x, y, name = a.get(key), b.get(key), f"{above}{key}"
        if isinstance(x, dict) and isinstance(y, dict):
            found += differences(x, y, f"{name}.")
        elif x != y:
            found.append(f"{name} was {x!r}, is {y!r}")
    return found[:5]
