"""`mainrun ls`: list the runs in a folder, with filters and sorting."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mainrun.errors import RunError, UsageError, nearest
from mainrun.files import inputs
from mainrun.ui import completion
from mainrun.ui.console import Debug, Json, emit, field_value, show_table, validate_paths

if TYPE_CHECKING:
    from mainrun.store.rundir import RunDir

Row = dict[str, Any]

# The values of a run that are not config fields. The table shows those in SHOWN.
RESULTS = (
    "run", "state", "step", "steps", "full", "best", "official", "params", "tokens", "flops", "seconds",
    "modified",
)  # fmt: skip
SHOWN = ("run", "state", "step", "full", "best", "params", "seconds", "modified")
SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": lambda got, wanted: got <= wanted,
    ">=": lambda got, wanted: got >= wanted,
    "<": lambda got, wanted: got < wanted,
    ">": lambda got, wanted: got > wanted,
}


def columns(incomplete: str) -> list[completion.Candidate]:
    """Complete a column of the table or a config field."""
    names = [*((name, "a column of the table") for name in RESULTS), *completion.fields()]
    return completion.starting(incomplete, names)


Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="CONDITION",
        autocompletion=columns,
        help="List only the runs that meet a condition on a config field or a column, such as 'lr<0.01', "
        "state=done or preset!=demo. Repeat the option for several conditions.",
    ),
]
Sort = Annotated[
    str,
    typer.Option(
        "--sort",
        metavar="NAME|-NAME",
        autocompletion=columns,
        help="Sort by a config field or a column. With -, sort downwards.",
    ),
]


class Condition(NamedTuple):
    """A condition of --where."""

    name: str
    sign: str
    text: str  # the value, as it was written

    def holds(self, row: Row) -> bool:
        got = value_of(row, self.name)
        wanted = inputs.toml_value(self.text)
        if self.sign in SIGNS:
            return is_number(got) and SIGNS[self.sign](got, wanted)
        equal = field_value(got) == self.text or (is_number(got) and is_number(wanted) and got == wanted)
        return equal == (self.sign == "=")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def ls(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", callback=validate_paths, help="The folder of the runs.")
    ] = Path("runs"),
    where: Where = None,
    sort: Sort = "run",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the runs in a folder.

    The table has a column for each config field that --where or --sort names. With --json, each run has all
    its config fields.
    """
    conditions = [parse_condition(text) for text in where or []]
    downwards = sort.startswith("-")
    key = sort.removeprefix("-")
    check_name(key, f"--sort {inputs.shown(sort, 80)}")
    if not directory.is_dir():
        what = "is not a folder" if directory.exists() else "does not exist"
        raise UsageError(f"DIR {directory} {what}; give a folder that contains runs")
    rows = [row for row in read_rows(directory) if all(condition.holds(row) for condition in conditions)]
    rows = sorted_rows(rows, key, downwards)
    if as_json:
        emit(rows)
        return
    columns = list(SHOWN)
    for name in (key, *(condition.name for condition in conditions)):
        if name not in columns:
            columns.insert(-1, name)
    show_table(columns, [[cell(name, value_of(row, name)) for name in columns] for row in rows])


# -- conditions and sorting


def parse_condition(text: str) -> Condition:
    """Split a condition of --where, such as "lr<0.01". Raise UsageError if it is not valid."""
    got = f"--where {inputs.shown(text, 80)}"
    parts = re.fullmatch(r"\s*(\w+)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*", text, re.DOTALL)
    if parts is None:
        raise UsageError(f"got {got}; write NAME, a sign (= != < <= > >=) and a value, such as 'lr<0.01'")
    name, sign, value = parts.groups()
    check_name(name, got)
    try:
        wanted = inputs.toml_value(value)
    except inputs.BadInput as e:
        raise UsageError(f"got {got}, whose value cannot be used: {e}") from None
    if sign in SIGNS and not is_number(wanted):
        raise UsageError(f"got {got}; the sign {sign} needs a number; use = or != for text")
    return Condition(name, sign.replace("==", "="), value)


def check_name(name: str, got: str) -> None:
    """Raise UsageError if a name is neither a column nor a config field."""
    from mainrun.config import TrainConfig

    known = [*RESULTS, *TrainConfig.model_fields]
    if name not in known:
        raise UsageError(
            f"got {got}, but {inputs.shown(name, 80)} is neither a column nor a config field"
            f"{nearest(name, known)}; the columns are {', '.join(RESULTS)}, "
            "and `mainrun presets --fields` lists the fields"
        )


def value_of(row: Row, name: str) -> Any:
    return row[name] if name in RESULTS else row["config"].get(name)


def sorted_rows(rows: Iterable[Row], name: str, downwards: bool) -> list[Row]:
    """Sort the rows by a column or a config field. The runs without a value come last."""
    ordered = sorted(rows, key=lambda row: str(row["run"]))
    numbers = [row for row in ordered if isinstance(value_of(row, name), int | float)]
    texts = [row for row in ordered if isinstance(value_of(row, name), str)]
    rest = [row for row in ordered if row not in numbers and row not in texts]
    numbers.sort(key=lambda row: value_of(row, name), reverse=downwards)
    texts.sort(key=lambda row: value_of(row, name), reverse=downwards)
    return [*numbers, *texts, *rest]


# -- reading runs


def read_rows(folder: Path) -> Iterator[Row]:
    """Yield a row for each run in a folder. Print an error on stderr if a file of a run is damaged."""
    from mainrun.config import TrainConfig
    from mainrun.store.rundir import RunDir

    defaults = TrainConfig().model_dump(mode="json")
    for file in sorted(folder.glob("*/config.json")):
        run = RunDir(file.parent)
        row: Row = dict.fromkeys(RESULTS) | {"run": run.path.name, "state": "damaged", "config": {}}
        try:
            # a run of an older version has no values for new fields, which were off
            row["config"] = defaults | run.config_file().get("config", {})
            row |= _results(run)
        except RunError as e:
            print(e, file=sys.stderr)
        yield row


def _results(run: RunDir) -> Row:
    summary = run.summary()
    if summary is not None:
        last = summary.get("last", {})
        row = {name: summary.get(name) for name in ("steps", "params", "tokens", "flops", "seconds")}
        row |= {"state": "done", "step": row["steps"], "full": last.get("full")}
        row |= {"official": last.get("official"), "best": summary.get("best", {}).get("full")}
        return row | {"modified": _time_of(run.path / "summary.json")}
    status = run.status()
    row = {"state": state_of(run, status), "step": status.get("step", 0)}
    scores = []
    seconds = 0.0
    for logged in run.intact_rows():
        row |= {"step": logged["step"], "tokens": logged["tokens"]}
        if logged["event"] == "step" and not logged.get("reused"):
            seconds += logged["seconds"]
        if logged["event"] == "eval" and logged["split"] in ("dev", "val"):
            scores.append(logged)
            row |= {"full": logged["full"], "official": logged["official"], "params": logged.get("params")}
    row["seconds"] = seconds or None
    if scores:
        row["best"] = min(logged["full"] for logged in scores if logged["split"] == scores[-1]["split"])
    steps = status.get("steps", run.plan().get("steps"))
    log = run.path / "metrics.jsonl"
    return row | {"steps": steps, "modified": _time_of(log if log.exists() else run.path / "config.json")}


def state_of(run: RunDir, status: dict[str, Any]) -> str:
    """Return the state of an unfinished run. A run whose process was killed still has the state `running`."""
    state = str(status.get("state", "not started"))
    pid = status.get("pid")
    if state != "running" or not isinstance(pid, int) or isinstance(pid, bool):
        return state
    lock = run.path / ".lock"
    holder = lock.read_text(encoding="utf-8", errors="replace") if lock.is_file() else ""
    if not holder.startswith(f"{pid} on {platform.node()}\n"):
        return state  # another machine may train the run
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "killed"
    except (OSError, OverflowError):
        return state
    return state


def _time_of(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")


def cell(name: str, value: Any) -> str:
    """Format a value for the table."""
    from mainrun.run.progress import clock, short

    if value is None:
        return "" if name in RESULTS else "none"
    if name in ("full", "best", "official"):
        return f"{value:.4f}"
    if name in ("params", "tokens"):
        return short(value)
    if name == "seconds":
        return clock(value)
    if name == "modified":
        return f"{datetime.fromisoformat(value).astimezone():%Y-%m-%d %H:%M}"
    return inputs.printable(field_value(value))
