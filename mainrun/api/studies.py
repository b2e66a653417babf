"""Run and read studies from Python, with the same folder and the same trials as `mainrun sweep`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mainrun.api import html
from mainrun.api.calls import Place, config_fields, path_of, plain_errors, plain_value, set_options
from mainrun.api.runs import Run, runs
from mainrun.errors import RunError, UsageError

if TYPE_CHECKING:
    from pandas import DataFrame

    from sweeps.study import Study as Definition

DEFAULT_OUT = Path("runs/studies")
PARTS = ("trial", "difference", "interval", "p_holm", "claim", "pairs", "why")  # the columns of `evidence`


@dataclass(frozen=True)
class BestTrial:
    """The best trial of a study."""

    number: int
    value: float
    params: dict[str, Any]
    confirmed: bool  # whether the gain over the base was confirmed with new seeds
    run: Run  # `run.config` trains the trial again, for example with another seed


class Study:
    """The folder of a study. The properties read its files, so they follow a study that is still running."""

    def __init__(self, path: Place) -> None:
        """Open the folder of a study. `mainrun.study` also finds a study by its name."""
        from sweeps.folder import require_study

        self.path = path_of(path, "path").absolute()
        with plain_errors():
            self._document = require_study(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        """Whether the search and the confirmation are finished."""
        return (self.path / "export.json").is_file()

    @property
    def definition(self) -> dict[str, Any]:
        """The study file: the preset, the space, the budget, and all other keys."""
        return dict(self._document["study"])

    @property
    def export(self) -> dict[str, Any]:
        """Everything that the finished study recorded. Raises RunError if the study is not finished."""
        from sweeps.folder import read_export

        with plain_errors():
            return read_export(self.path)

    @property
    def trials(self) -> DataFrame:
        """The trials: all columns of Optuna's `trials_dataframe`, and our own, such as `score` and `run`.

        While the study is running, the table has the trials that are in its database.
        """
        from sweeps import frame

        with plain_errors():
            if self.finished:
                return frame.finished_frame(self.export)
            return frame.running_frame(self.optuna())

    def optuna(self) -> Any:
        """Return the `optuna.Study` of the database, for Optuna's plots and importances."""
        import optuna

        from sweeps.database import open_storage

        url = str(self.definition.get("storage", ""))
        file = self.path / "study.db"
        if not url and not file.is_file():
            raise RunError(f"{self.path} has no study.db yet; run `{self._document['command']}`")
        return optuna.load_study(study_name=self.definition["name"], storage=open_storage(url, file))

    @property
    def best(self) -> BestTrial:
        """The confirmed winner, or the trial with the best score if none is confirmed."""
        trials = self.trials
        done = trials[trials["state"] == "COMPLETE"]
        if not len(done):
            raise RunError(f"no trial of the study {self.name} was trained to the end yet")
        winner = self._evidence().get("winner")
        if winner is not None:
            row = trials[trials["number"] == winner].iloc[0]
        else:
            row = done.sort_values(["value", "number"]).iloc[0]
        return BestTrial(
            number=int(row["number"]),
            value=float(row["value"]),
            params=self._params(int(row["number"]), row),
            confirmed=winner is not None,
            run=Run(self.path / "runs" / row["run"]),
        )

    def _params(self, number: int, row: Any) -> dict[str, Any]:
        if self.finished:
            return dict(next(each["params"] for each in self.export["trials"] if each["trial"] == number))
        names = [name for name in row.index if name.startswith("params_") and row[name] == row[name]]
        return {name.removeprefix("params_"): plain_value(row[name]) for name in names}

    @property
    def claim(self) -> str:
        """What the study may claim, in one sentence."""
        if not self.finished:
            return "not finished, so nothing is claimed yet"
        return str(self._evidence().get("claim", "not confirmed"))

    @property
    def evidence(self) -> DataFrame:
        """The confirmation: one row per confirmed trial, with its difference to the base and the interval."""
        import pandas as pd

        return pd.DataFrame(self._evidence().get("rows", []), columns=list(PARTS))

    @property
    def runs(self) -> DataFrame:
        """The runs of the study, as `mainrun.runs` returns them."""
        return runs(self.path / "runs")

    def _evidence(self) -> dict[str, Any]:
        if not self.finished:
            return {}
        return self.export.get("evidence") or {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Study) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return f"<Study {str(self.path)!r}: {'finished' if self.finished else 'not finished'}>"

    def _facts(self) -> list[tuple[str, str]]:
        """Return the names and values that represent the study."""
        from sweeps.display import describe_values

        facts = [("state", "finished" if self.finished else "not finished")]
        try:
            counts = self.trials["outcome"].value_counts(sort=False)
            states = ", ".join(f"{count} {state}" for state, count in counts.items())
            facts.append(("trials", states or "none yet"))
            best = self.best
            values = describe_values(best.params)
            facts.append(("best", f"{best.value:.4f}, trial {best.number}: {values}"))
        except RunError as e:
            facts.append(("best", str(e)))
        return [*facts, ("claim", self.claim), ("path", str(self.path))]

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the trials, the best one, the claim, and the best score by trial."""
        facts = self._facts()
        try:
            trials = self.trials
        except RunError:
            return html.card(self.name, facts)
        scores = trials["value"].where(trials["state"] == "COMPLETE").cummin().dropna()
        return html.card(self.name, facts, html.sparkline(list(scores), "best score by trial"))


def study(name: Place, out: Place = DEFAULT_OUT) -> Study:
    """Return a study, given its folder or its name. Names are searched in the folder `out`."""
    path = path_of(name, "name")
    if (path / "study.json").is_file():
        return Study(path)
    return Study(path_of(out, "out") / path)


def sweep(
    study: Place | Mapping[str, Any],
    *,
    out: Place = DEFAULT_OUT,
    name: str | None = None,
    workers: int | None = None,
    engine: str | None = None,
    address: str | None = None,
    storage: str | None = None,
    budget: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **fields: Any,
) -> Study:
    """Run a study, or resume it, and return it. The folder and the trials are those of `mainrun sweep`.

    An interrupt (Ctrl-C, or the stop button of a notebook) stops the study and raises `Interrupted`. The same
    call then resumes it.

    study: a built-in study, a TOML file, or the content of a study file as a dict.
    fields: config fields of all trials, such as `corpus="file:titles.txt"`.
    out: the folder of the studies.
    name: run the study separately under this name.
    workers: the maximum number of concurrent trials. By default, as many as the cores allow.
    engine: "local", or "ray" with the `address` of its cluster.
    storage: the URL of Optuna's database. By default, a SQLite file in the study's folder is used.
    budget: limits that replace those of the study, such as `{"trials": 12}`.
    quiet: show no progress on stderr.
    """
    from sweeps.cli import run_study

    sets = config_fields(sweep, fields)
    options = {"name": name, "workers": workers, "engine": engine, "address": address, "storage": storage}
    changes: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if budget is not None:
        changes["budget"] = plain_value(dict(budget))
    definition = _read(study, sets, changes)
    folder = path_of(out, "out") / definition.name
    with plain_errors():
        run_study(definition, folder, _command(study, sets, changes, folder.parent), quiet)
    return Study(folder)


def _read(study: Place | Mapping[str, Any], sets: dict[str, Any], changes: dict[str, Any]) -> Definition:
    from sweeps.study import read_study, validate_study

    if not isinstance(study, Mapping):
        return read_study(str(study), sets, **changes)
    data = plain_value(dict(study))
    if not isinstance(data.get("set", {}), dict):
        raise UsageError(f"got set={data['set']!r} in the study; give a dict of config fields")
    data["set"] = {**data.get("set", {}), **sets}
    return validate_study({"name": "study", **data, **changes}, "in the dict")


def _command(study: Any, sets: dict[str, Any], changes: dict[str, Any], out: Path) -> str:
    """Return a command that resumes the study, or the call if the study is not a file."""
    from sweeps.study import without_password

    if isinstance(study, Mapping) or "budget" in changes:
        source = "{...}" if isinstance(study, Mapping) else repr(str(study))
        return f"mainrun.sweep({source}, ...) in Python"
    command = ["mainrun", "sweep", "run", str(study), *set_options(sets), "--out", str(out)]
    for key, value in changes.items():
        command += ["--as" if key == "name" else f"--{key}", without_password(str(value))]
    return shlex.join(command)
