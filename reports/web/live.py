"""Follow the runs and studies in a folder while other processes write them. Nothing is ever written.

A file may be missing, half-written or damaged at any moment. What can be read is shown.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from mainrun.config import TrainConfig, from_dict
from mainrun.errors import ConfigError, MainrunError
from mainrun.run.progress import clock
from mainrun.store import records
from mainrun.store.rundir import RunDir
from mainrun.ui.grouping import failed_guards, group_by_recipe
from mainrun.ui.ls_cli import state_of
from reports.evidence import load
from reports.evidence.tables import setting
from reports.web.views import RunView, StudyView, View, curves, study_view

Signature = tuple[Any, ...]  # what changes if a file changes
RUN_FILES = ("config.json", "env.json", "status.json", "summary.json", "metrics.jsonl", ".lock")
STUDY_FILES = ("study.json", "export.json", "study.db", "study.db-wal", ".lock")
STATES = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
STUDY = {"study": {"objective?": records.any_text, "budget?": {"trials?": records.optional(records.count)}}}


def signature(folder: Path, names: Iterable[str]) -> Signature:
    parts: list[Any] = []
    for name in names:
        try:
            stat = (folder / name).stat()
            parts.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        except OSError:
            parts.append(None)
    return tuple(parts)


def is_alive(pid: int) -> bool:
    """Return whether a process exists on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


# -- runs


@dataclass
class Log:
    """A log that grows. Only its new lines are read. A log that was cut is read again."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    end: int = 0  # the position after the last complete line that was read
    inode: int = 0

    def read(self) -> None:
        try:
            with self.path.open("rb") as f:
                stat = os.fstat(f.fileno())
                if stat.st_size < self.end or stat.st_ino != self.inode:
                    self.rows = []
                    self.end = 0
                    self.inode = stat.st_ino
                f.seek(self.end)
                data = f.read()
        except OSError:
            return
        complete = data[: data.rfind(b"\n") + 1]
        self.end += len(complete)
        for line in complete.splitlines():
            row = _row(line)
            if row is not None:
                self.rows.append(row)


def _row(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line of metrics.jsonl, or None if the line is damaged."""
    try:
        row = records.parse(line)
        records.check(row, records.metrics_row)
    except ValueError:
        return None
    return dict(row)


@dataclass
class RunReader:
    """Reads a run, and reads it again if its files change."""

    path: Path
    cfg: TrainConfig | None = None
    seen: Signature = ()

    def __post_init__(self) -> None:
        self.log = Log(self.path / "metrics.jsonl")
        self.view = RunView(self.path.name, "", "damaged", {})

    def update(self) -> Signature:
        """Read the run if it changed, and return its signature."""
        seen = signature(self.path, RUN_FILES)
        if seen != self.seen or self.view.state == "running":
            try:
                if seen != self.seen or self._was_killed():
                    self.view = self._read()
            except (MainrunError, OSError, ValueError, TypeError, LookupError) as error:
                self.view = replace(self.view, state="damaged", note=str(error))
        self.seen = seen
        return (*seen, self.view.state)

    def _was_killed(self) -> bool:
        run = RunDir(self.path)
        return state_of(run, run.status()) != "running"

    def _read(self) -> RunView:
        run = RunDir(self.path)
        document = run.config_file()
        config = document.get("config", {})
        try:
            self.cfg = from_dict(config)
        except ConfigError:  # a run of another version
            self.cfg = None
        env = run.env()
        fingerprints = document.get("fingerprints")
        view = RunView(
            id=self.path.name,
            recipe=str(config.get("preset", "")),
            state="not started",
            config=config,
            command=env.get("command") or (),
            machine=str((env.get("machine_class") or {}).get("device", "")),
            data=str(fingerprints.get("val", "")) if isinstance(fingerprints, dict) else "",
        )
        summary = run.summary()
        self.log.read()
        if summary is not None:
            return _finished(view, summary, self.log.rows)
        return _unfinished(view, run, self.log.rows, document.get("plan", {}))


def _finished(view: RunView, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> RunView:
    per_token = None
    if summary.get("flops") and summary.get("tokens"):
        per_token = summary["flops"] / summary["tokens"]
    scores, losses = curves(rows, per_token)
    failed = failed_guards(summary) if summary.get("guards") else []
    return replace(
        view,
        state="failed a guard" if failed else "done",
        note=f"failed {', '.join(failed)}" if failed else "",
        step=summary.get("steps"),
        steps=summary.get("steps"),
        full=summary["last"].get("full"),
        best=summary["best"].get("full"),
        official=summary["last"].get("official"),
        params=summary.get("params"),
        tokens=summary.get("tokens"),
        flops=summary.get("flops"),
        seconds=summary.get("seconds"),
        scores=scores,
        losses=losses,
    )


def _unfinished(
    view: RunView, run: RunDir, rows: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]
) -> RunView:
    status = run.status()
    state = state_of(run, status)
    steps = status.get("steps", plan.get("steps"))
    seconds = sum(float(row.get("seconds") or 0.0) for row in rows)
    step = rows[-1]["step"] if rows else status.get("step", 0)
    eta = None
    if state == "running" and steps and step:
        eta = seconds / step * (steps - step)
    scores, losses = curves(rows, None)
    evaluations = [row for row in rows if row["event"] == "eval"]
    last = evaluations[-1] if evaluations else {}
    same = [row["full"] for row in evaluations if row["split"] == last["split"]]
    return replace(
        view,
        state=state,
        note=str(status.get("why", "")),
        step=step,
        steps=steps,
        full=last.get("full"),
        best=min(same, default=None),
        official=last.get("official"),
        params=last.get("params"),
        tokens=rows[-1].get("tokens") if rows and rows[-1]["event"] == "step" else None,
        seconds=seconds,
        eta=eta,
        scores=scores,
        losses=losses,
    )


# -- studies


@dataclass
class StudyReader:
    """Reads a study, and reads it again if its files or its runs change."""

    path: Path
    seen: Signature = ()

    def __post_init__(self) -> None:
        self.readers: dict[Path, RunReader] = {}
        self.view = StudyView(self.path.name, "damaged", "value", ())

    def update(self) -> Signature:
        files = signature(self.path, STUDY_FILES)
        alive = self._driver_is_alive()
        parts: list[Any] = [files, alive]
        if not (self.path / "export.json").is_file():
            parts += update_runs(self.readers, run_folders(self.path / "runs"))
        seen = tuple(parts)
        if seen != self.seen:
            try:
                self.view = self._read(alive)
            except (MainrunError, OSError, ValueError, TypeError, LookupError, sqlite3.Error) as error:
                self.view = replace(self.view, claim=f"Cannot be read now: {error}")
        self.seen = seen
        return seen

    def _driver_is_alive(self) -> bool:
        """Return whether the process that wrote the lock of the study still exists on this machine."""
        try:
            holder = (self.path / ".lock").read_text(encoding="utf-8", errors="replace").split()
        except OSError:
            return False
        return bool(holder) and holder[0].isdecimal() and is_alive(int(holder[0]))

    def _read(self, alive: bool) -> StudyView:
        exported = not (self.path / "study.db").exists() and (self.path / "trials.parquet").exists()
        if exported or (self.path / "export.json").is_file():
            (study,) = load.gather([str(self.path)]).studies
            return study_view(study, with_importance=False)
        document = records.load(self.path / "study.json", STUDY, "restore it") or {"study": {}}
        study = document["study"]
        runs = [reader.view for reader in self.readers.values()]
        trials = database_trials(self.path / "study.db")
        known = {trial["run"] for trial in trials}
        space = study.get("space") if isinstance(study.get("space"), dict) else {}
        fields = list(space)
        running = [run for run in runs if run.state == "running"]
        finished = len(trials)
        total = (study.get("budget") or {}).get("trials")
        eta = None
        times = [trial["seconds"] for trial in trials if trial["seconds"]]
        if alive and total and times:
            eta = max(0, total - finished) * sum(times) / len(times) / max(1, len(running))
        return StudyView(
            name=self.path.name,
            state="running" if alive or running else "stopped",
            objective=str(study.get("objective") or "value"),
            trials=trials + [_open_trial(run, fields) for run in runs if run.id not in known],
            about=str(study.get("about") or ""),
            command=str(document.get("command") or ""),
            finished=finished,
            total=total,
            space=space,
            eta=eta,
            workers=[_work(run, fields) for run in running],
        )


def _open_trial(run: RunView, fields: Sequence[str]) -> dict[str, Any]:
    """Return the row of a run that belongs to no finished trial."""
    params = {name: run.config[name] for name in fields if name in run.config}
    row = {"trial": None, "state": run.state, "value": run.full, "params": params, "run": run.id}
    return {**row, "reason": run.note, "tokens": run.tokens}


def _work(run: RunView, fields: Sequence[str]) -> str:
    """Describe what a worker trains."""
    parts = [run.id, f"step {run.step or 0} of {run.steps or '?'}"]
    if run.eta is not None:
        parts.append(f"{clock(run.eta)} left")
    parts += [f"{name}={setting(run.config[name])}" for name in fields if name in run.config]
    return ", ".join(parts)


def database_trials(file: Path) -> list[dict[str, Any]]:
    """Return the finished trials in Optuna's SQLite database of a study."""
    if not file.is_file():
        return []
    trials: dict[int, dict[str, Any]] = {}
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=1)) as database:
        values = dict(database.execute("SELECT trial_id, value FROM trial_values"))
        for row_id, number, state in database.execute("SELECT trial_id, number, state FROM trials"):
            trials[row_id] = {"trial": number, "state": STATES.get(state, state), "value": values.get(row_id)}
            trials[row_id] |= {"params": {}, "run": None, "reason": "", "tokens": None, "seconds": None}
        query = "SELECT trial_id, param_name, param_value, distribution_json FROM trial_params"
        for row_id, name, value, distribution in database.execute(query):
            trials[row_id]["params"][name] = _parameter(value, json.loads(distribution))
        query = "SELECT trial_id, key, value_json FROM trial_user_attributes"
        for row_id, key, text in database.execute(query):
            value = json.loads(text)
            if key == "ledger":
                trials[row_id] |= {name: value.get(name) for name in ("tokens", "seconds")}
            elif key in ("run", "why"):
                trials[row_id]["run" if key == "run" else "reason"] = value
    return sorted(trials.values(), key=lambda trial: trial["trial"])


def _parameter(value: float, distribution: Mapping[str, Any]) -> Any:
    attributes = distribution.get("attributes") or {}
    if "choices" in attributes:
        return attributes["choices"][int(value)]
    return int(value) if distribution.get("name") == "IntDistribution" else value


# -- the folder


def run_folders(folder: Path) -> list[Path]:
    """Return the run directories directly in a folder."""
    try:
        return sorted(path for path in folder.iterdir() if (path / "config.json").is_file())
    except OSError:
        return []


def update_runs(readers: dict[Path, RunReader], folders: Iterable[Path]) -> list[Signature]:
    """Read all runs that are new or changed, and forget those that are gone."""
    present = list(folders)
    for path in [path for path in readers if path not in present]:
        del readers[path]
    return [readers.setdefault(path, RunReader(path)).update() for path in present]


def find(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the run directories and the studies in a folder and its subfolders."""
    runs: list[Path] = []
    studies: list[Path] = []
    for place, subfolders, names in os.walk(folder):
        if "config.json" in names or "study.json" in names:
            (runs if "config.json" in names else studies).append(Path(place))
            subfolders.clear()
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    return runs, studies


class Watch:
    """The runs and studies in a folder, as they are now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[Path, RunReader] = {}
        self.studies: dict[Path, StudyReader] = {}

    def look(self) -> str:
        """Read what changed, and return a text that changes with what the page shows."""
        runs, studies = find(self.folder)
        parts: list[Any] = [str(path) for path in (*runs, *studies)]
        parts += update_runs(self.runs, runs)
        for path in [path for path in self.studies if path not in studies]:
            del self.studies[path]
        for path in studies:
            parts.append(self.studies.setdefault(path, StudyReader(path)).update())
        return sha256(repr(parts).encode()).hexdigest()[:16]

    def view(self) -> View:
        readers = sorted(self.runs.values(), key=lambda r: (r.view.state != "running", r.view.id))
        names = self._recipes(readers)
        runs = [replace(r.view, recipe=names.get(r.path, r.view.recipe)) for r in readers]
        studies = [reader.view for reader in self.studies.values()]
        problems = [f"{run.id}: {run.note}" for run in runs if run.state == "damaged"]
        return View(f"Board of {self.folder}", runs=runs, studies=studies, problems=problems)

    def _recipes(self, readers: Sequence[RunReader]) -> dict[Path, str]:
        """Return the name of the recipe of each run whose config this version can read."""
        known = [reader for reader in readers if reader.cfg is not None]
        names: dict[Path, str] = {}
        for name, group in group_by_recipe(known, _cfg_of):
            names |= {reader.path: name for reader in group}
        return names


def _cfg_of(reader: RunReader) -> TrainConfig:
    assert reader.cfg is not None
    return reader.cfg
