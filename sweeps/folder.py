"""A study's folder: whose it is, what it began with, what came out.

study.json   the study, its digest, and the command that goes on with it
runs/        a run directory each, with a store that they share
study.db     Optuna's database of it (record.py), unless it is elsewhere
export.json  what came out, once it is finished (export.py)
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mainrun.errors import RunError, UsageError
from mainrun.store.rundir import disk_errors, write_text
from sweeps.study import Study


@contextmanager
def owned(folder: Path, study: Study) -> Iterator[None]:
    """One driver at a time, and always the same study in a folder."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+b", buffering=0)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UsageError(f"{folder} is searched by process {lock.read().decode()}; wait for it, or give another --out") from None
        with disk_errors(folder):
            lock.truncate(0)
            lock.write(str(os.getpid()).encode())
        before = begun(folder)
        if before and before["digest"] != study.digest:
            changes = "; ".join(differences(decisive(before["study"]), decisive(study.model_dump(mode="json"))))
            raise UsageError(
                f"{folder} holds another study of that name: {changes}. Go on with the old file, or start this one anew with --as NAME"
            )
        yield


def begin(folder: Path, study: Study, command: str) -> None:
    """From here on the folder is this study's. Called when it is known that its base can be trained."""
    found = {"digest": study.digest, "study": study.model_dump(mode="json"), "command": command}
    write_text(folder / "study.json", json.dumps(found, indent=2))


def begun(folder: Path) -> dict[str, Any] | None:
    return _read(folder / "study.json")


def known(folder: Path) -> dict[str, Any]:
    before = begun(folder)
    if not before:
        have = sorted(p.parent.name for p in folder.parent.glob("*/study.json"))
        raise UsageError(f"no study {folder.name!r} in {folder.parent}; there: {', '.join(have) or 'none'}")
    return {"command": f"mainrun sweep {folder.name}"} | before


def finished(folder: Path) -> dict[str, Any]:
    """What came out."""
    before = known(folder)
    found = _read(folder / "export.json")
    if not found:
        raise RunError(f"{folder} is not finished; `{before['command']}` goes on with it")
    return found


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise RunError(f"{file} cannot be read ({e}); restore it, or move {file.parent} away and begin anew") from None
    if not isinstance(found, dict) or not {"study", "digest"} <= set(found):
        raise RunError(f"{file} is none of ours; restore it, or move {file.parent} away and begin anew")
    return found


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
