"""Read and write the folder of a study, which contains the following files:

study.json   the study, its digest, and the command that resumes it
tokens.json  the number of training tokens in an epoch, and fingerprints of the data (corpus_size.py)
runs/        the run directories, and the store that all runs share
times.jsonl  when each run started and ended (times.py)
study.db     the Optuna database of the study, unless a different storage is configured (database.py)
export.json  the results of the study, if the study is finished (export.py)
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
def locked_folder(folder: Path, study: Study) -> Iterator[None]:
    """Create and lock the folder of a study.

    Raises UsageError if another driver uses the folder, or if the folder belongs to another study.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    check_regular_file(folder / ".lock", "remove it, and run the same command again")
    try:
        with disk_errors(folder):
            lock = FileLock(folder / ".lock", str(os.getpid()))
    except Locked as holder:
        raise UsageError(
            f"{folder} is in use by process {holder}; wait until the process ends, or give another --out"
        ) from None
    try:
        _check_same_study(folder, study)
        yield
    finally:
        lock.release()


def _check_same_study(folder: Path, study: Study) -> None:
    document = read_study_json(folder)
    if not document or document["digest"] == study.digest:
        return
    changes = differences(
        _without_free_keys(document["study"]), _without_free_keys(study.model_dump(mode="json"))
    )
    if changes:
        fault = "; ".join(changes)
    else:
        fault = "its study.json was edited; restore it"
    raise UsageError(
        f"{folder} contains another study with this name: {fault}. "
        "Resume that study with its old study file, or start a new study with --as NAME"
    )


def _without_free_keys(study: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in study.items() if key not in Study.FREE}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Describe the first five differences between two nested tables.

    For example, a difference is described as "space.lr.high was 0.1, is 0.2".
    """
    texts: list[str] = []
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        old_value = old.get(key)
        new_value = new.get(key)
        if isinstance(old_value, dict) and isinstance(new_value, dict):
            texts += differences(old_value, new_value, f"{name}.")
        elif old_value != new_value:
            texts.append(f"{name} was {old_value!r}, is {new_value!r}")
    return texts[:5]


# -- study.json


def write_study_json(folder: Path, study: Study, command: str) -> None:
    """Write study.json, which records the study that a folder belongs to.

    Call this function only after checking that the study's base config can be trained.
    """
    document = {"digest": study.digest, "study": study.model_dump(mode="json"), "command": command}
    write_text(folder / "study.json", json.dumps(document, indent=2))


def read_study_json(folder: Path) -> dict[str, Any] | None:
    return _read(folder / "study.json", STUDY_JSON)


def require_study(folder: Path) -> dict[str, Any]:
    """Return the content of study.json in the folder of a study.

    If the study does not exist, raises a UsageError that names the existing studies.
    """
    document = read_study_json(folder)
    if not document:
        names = sorted(file.parent.name for file in folder.parent.glob("*/study.json"))
        existing = "the folder has no studies; `mainrun sweep run STUDY` starts one"
        if names:
            existing = f"existing studies: {', '.join(names)}"
        raise UsageError(
            f"no study {folder.name!r} in {folder.parent}{nearest(folder.name, names)}; {existing}"
        )
    return {"command": f"mainrun sweep {folder.name}"} | document


# -- export.json


def read_export(folder: Path) -> dict[str, Any]:
    """Return the content of export.json in the folder of a finished study."""
    command = require_study(folder)["command"]
    file = folder / "export.json"
    export = _read(file, EXPORT_JSON)
    if not export:
        raise RunError(f"the study in {folder} is not finished; run `{command}` to resume the study")
    fault = _contradiction(export)
    if fault:
        raise RunError(
            f"{file} is damaged: {fault}; restore it, or remove it and run `{command}` to write it again"
        )
    return export


def _contradiction(export: dict[str, Any]) -> str:
    """Describe the first contradiction between parts of an export, or return an empty string."""
    trials = export["trials"]
    numbers = {trial["trial"] for trial in trials}
    if len(numbers) < len(trials):
        return "it has a trial twice"
    for trial in trials:
        if trial["state"] == "done" and trial["value"] is None:
            return f"its trial {trial['trial']} is done but has no value"
    if export.get("raw_rung_correlation") and not export["study"].get("rungs"):
        return "it has scores at rungs, but its study has no rungs"
    winner = (export.get("evidence") or {}).get("winner")
    if winner is not None and winner not in numbers:
        return f"its winner, trial {winner}, does not exist"
    return ""


# -- the expected structure of study.json and export.json

STUDY_JSON = {"digest": records.text, "study": records.table, "command?": records.any_text}
COST = {
    "asked": records.count,
    "trained": records.count,
    "reused": records.count,
    "wasted": records.count,
    "branch?": records.count,
    "tokens?": records.count,
}
OPTION = {
    "horizon": records.not_negative,
    "late?": records.not_negative,
    "stands_in": records.true_or_false,
    "new_tokens": records.count,
    "value": records.not_negative,
    "values": records.table_of(records.setting),
}
TRIAL = {
    "trial": records.count,
    "state": records.text,
    "value": records.optional(records.any_number),
    "params": records.table_of(records.setting),
    "scores": records.table,
    "sets": [records.any_text],
    "raw_scores?": records.table,
    "seed?": records.optional(records.count),
    "rung?": records.number,
    "run?": records.any_text,
    "reason?": records.any_text,
    "steps?": records.count,
    "asked?": records.count,
    "trained?": records.count,
    "reused?": records.count,
    "wasted?": records.count,
    "branch?": records.count,
    "tokens?": records.count,
    "flops?": records.not_negative,
    "forward_flops?": records.optional(records.not_negative),
    "seconds?": records.not_negative,
    "horizon?": records.not_negative,
    "late?": records.not_negative,
    "planned?": records.count,
    "started?": records.not_negative,
    "ended?": records.not_negative,
    "why?": {"phase": records.text, "options": [OPTION]},
}
CONFIRMED_TRIAL = {
    "trial": records.count,
    "difference": records.any_number,
    "interval": records.pair(records.any_number),
    "p_holm": records.any_number,
    "claim": records.true_or_false,
    "why": records.any_text,
    "params": records.table_of(records.setting),
    "pairs?": records.count,
    "floor?": records.any_number,
    "stopped?": records.text,
}
EVIDENCE = {
    "noise": {
        "sigma": records.any_number,
        "floor": records.any_number,
        "values": [records.any_number],
        "df?": records.count,
    },
    "sequential?": {
        "pairs": records.count,
        "maximum": records.count,
        "level": records.not_negative,
        "nominal_p": records.not_negative,
    },
    "rows": [CONFIRMED_TRIAL],
    "claim": records.any_text,
    "winner": records.optional(records.count),
    "val?": {"full": records.any_number, "official": records.any_number},
    "runs?": [COST | {"kind": records.text}],
}
CORRELATIONS = records.optional(records.table_of(records.optional(records.any_number)))
HORIZON = {
    "horizon": records.not_negative,
    "late?": records.not_negative,
    "runs": records.count,
    "correlation": records.optional(records.any_number),
}
EXPORT_JSON = STUDY_JSON | {
    "name?": records.text,
    "preset": records.any_text,
    "objective": records.text,
    "trials": [TRIAL],
    "ledger": COST,
    "evidence?": records.optional(EVIDENCE),
    "rung_correlation?": CORRELATIONS,
    "raw_rung_correlation?": CORRELATIONS,
    "frugal?": {"horizons": [HORIZON]},
    "study": {"rungs?": records.optional(records.table), "storage?": records.any_text},
}


def _read(file: Path, shape: records.Shape) -> dict[str, Any] | None:
    fix = f"restore it, or move {file.parent} away and start the study again"
    document: dict[str, Any] | None = records.load(file, shape, fix)
    return document
