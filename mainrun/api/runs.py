"""Read runs from Python: one run, all runs of a folder as a table, and the comparison of runs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mainrun.api import html
from mainrun.api.calls import Place, path_of, plain_errors
from mainrun.config import TrainConfig
from mainrun.errors import RunError, UsageError
from mainrun.store import costs, records
from mainrun.store.rundir import RunDir, find
from mainrun.ui.ls_cli import state_of

if TYPE_CHECKING:
    from pandas import DataFrame

# The first columns of `Run.metrics`, which every run has.
METRICS = (
    "event", "step", "tokens", "split", "loss", "full", "official", "bits_per_byte", "coverage",
    "scored_tokens", "lr", "grad_norm", "seconds", "reused",
)  # fmt: skip
TEXTS = ("event", "split")
# The first columns of `mainrun.runs()`. The config fields follow, in the order of `mainrun presets --fields`.
COLUMNS = (
    "run", "state", "full", "best_full", "official", "coverage", "bits_per_byte", "dev_full", "step", "steps",
    "tokens", "reused_steps", "params", "flops", "train_seconds", "tokens_per_s", "machine", "guards", "path",
)  # fmt: skip
# What `runs` reads of config.json and summary.json. To check all values would double its time.
CONFIG = {"config": records.table, "plan?": {"steps?": records.count}}
READ = (
    "steps?", "last?", "best?", "scores?", "params?", "tokens?", "flops?", "seconds?", "tokens_per_s?",
    "ledger?", "machine_class?", "machine_classes?", "guards?",
)  # fmt: skip
SUMMARY = {name: records.SUMMARY[name] for name in READ}


class Run:
    """A run directory. The properties read its files, so they follow a run that is still training."""

    def __init__(self, path: Place) -> None:
        """Open a run directory. `mainrun.run` also finds a run by its id."""
        self.path = path_of(path, "path").absolute()
        self._dir = RunDir(self.path)
        if not (self.path / "config.json").is_file():
            raise RunError(f"{path} is not a run directory, because it has no config.json")

    @property
    def id(self) -> str:
        """The id of the run, which is the name of its directory."""
        return self.path.name

    @property
    def state(self) -> str:
        """running, done, interrupted, diverged, failed or killed, as in `mainrun ls`."""
        with plain_errors():
            return _state(self._dir, self._dir.summary())

    @property
    def config(self) -> TrainConfig:
        """The config of the run, for example `run.config.lr`."""
        with plain_errors():
            return self._dir.config()

    @property
    def summary(self) -> dict[str, Any]:
        """The scores, costs and guards of the finished run. Raises RunError if the run is not finished."""
        from mainrun.ui.compare import load_summary

        with plain_errors():
            return load_summary(self._dir)

    @property
    def score(self) -> float:
        """The last `full` score of the finished run, in nats per character."""
        return float(self.summary["last"]["full"])

    @property
    def metrics(self) -> DataFrame:
        """The log as a table, with one row per training step and per evaluation of a split.

        Columns that belong to the other kind of row are NaN. An evaluation has the tokens of its step.
        """
        with plain_errors():
            return _metrics_frame(self._dir.intact_rows())

    def sample(
        self, prompt: str = "", n: int = 1, *, max_tokens: int = 40, temperature: float = 0.8, seed: int = 0
    ) -> list[str]:
        """Generate titles with the model of the run. The same seed gives the same titles."""
        from mainrun.ui.sample import sample

        with plain_errors():
            options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
            return sample(self.path, prompt, n=n, **options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return f"<Run {str(self.path)!r}: {', '.join(text for _, text in self._facts()[:2])}>"

    def _facts(self) -> list[tuple[str, str]]:
        """Return the names and values that represent the run."""
        from mainrun.run.progress import clock, percent, short

        try:
            summary = self._dir.summary()
            state = _state(self._dir, summary)
            status = self._dir.status()
        except RunError as e:
            return [("state", "damaged"), ("reason", str(e))]
        if summary is None:
            return [("state", state), ("step", f"step {status.get('step', 0):,}")]
        last = summary["last"]
        return [
            ("state", state),
            ("full", f"{last['full']:.4f}"),
            ("official", f"{last['official']:.4f} ({percent(last['coverage'])} covered)"),
            ("steps", f"{summary['steps']:,}"),
            ("parameters", short(summary["params"])),
            ("time", clock(summary["seconds"])),
            ("guards", _guards(summary)),
            ("path", str(self.path)),
        ]

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the scores, the costs, and the curve of the training loss."""
        try:
            rows = self._dir.intact_rows()
        except RunError:
            rows = []
        losses = [row["loss"] for row in rows if row["event"] == "step"]
        return html.card(self.id, self._facts(), html.sparkline(losses, "training loss by step"))


def run(name: Place, out: Place = "runs") -> Run:
    """Return the run with a path, an id, or a unique prefix of an id. Ids are searched in `out`."""
    with plain_errors():
        return Run(find(path_of(name, "name") if str(name) else "", path_of(out, "out")).path)


def runs(out: Place = "runs") -> DataFrame:
    """Return a table of the runs in a folder: one row per run, with its scores, costs, guards and config.

    A run that is not finished has no scores. A damaged run has the state `damaged`, and a warning names it.
    """
    import pandas as pd

    folder = path_of(out, "out")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"got out={str(out)!r}, which is a file; give the folder of the run directories")
    with plain_errors():
        rows = [_run_row(RunDir(file.parent)) for file in sorted(folder.glob("*/config.json"))]
    return pd.DataFrame(rows, columns=[*COLUMNS, *TrainConfig.model_fields])


def compare(*runs: Run | Place, out: Place = "runs") -> DataFrame:
    """Return a table that compares finished runs with the first one, as `mainrun compare` does.

    The runs are objects, paths or ids. Raises RunError if the runs were scored on different titles.
    """
    import pandas as pd

    from mainrun.ui import compare as comparison

    if not runs:
        raise UsageError("compare needs at least one run, such as mainrun.compare(run_a, run_b)")
    summaries = [_run_of(each, out).summary for each in runs]
    rows = comparison.rows(summaries)
    for row, summary in zip(rows, summaries, strict=True):
        row["guards"] = _guards(summary)
    return pd.DataFrame(rows).set_index("run")


def _run_of(value: Run | Place, out: Place) -> Run:
    return value if isinstance(value, Run) else run(value, out)


def _state(run_dir: RunDir, summary: dict[str, Any] | None) -> str:
    if summary is not None:
        return "done"
    return state_of(run_dir, run_dir.status())


def _guards(summary: dict[str, Any]) -> str:
    """Return "pass", or the guards that failed or flagged the run."""
    named: dict[str, list[str]] = {"fail": [], "flag": []}
    for guard in summary.get("guards", []):
        if guard["status"] in named:
            named[guard["status"]].append(guard["name"])
    return "; ".join(f"{status}: {', '.join(names)}" for status, names in named.items() if names) or "pass"


def _run_row(run_dir: RunDir) -> dict[str, Any]:
    """Return the row of a run in `runs`."""
    row: dict[str, Any] = {"run": run_dir.path.name, "path": str(run_dir.path)}
    try:
        recorded = records.load(run_dir.path / "config.json", CONFIG, run_dir.fix)
        row |= recorded["config"]
        row["steps"] = recorded.get("plan", {}).get("steps")
        summary = records.load(run_dir.path / "summary.json", SUMMARY, run_dir.fix)
        row["state"] = _state(run_dir, summary)
        row["step"] = run_dir.status().get("step", 0)
        if summary is not None:
            row |= _scores_and_costs(summary)
    except RunError as e:
        warnings.warn(str(e), stacklevel=3)
        row["state"] = "damaged"
    return row


def _scores_and_costs(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that come from a summary. A summary of an older version may lack some of them."""
    last = summary.get("last", {})
    dev = summary.get("scores", {}).get("dev", {})
    row = {name: last.get(name) for name in ("full", "official", "coverage", "bits_per_byte")}
    row |= {name: summary[name] for name in ("steps", "tokens", "params", "flops") if name in summary}
    return row | {
        "best_full": summary.get("best", {}).get("full"),
        "dev_full": dev.get("last", {}).get("full"),
        "reused_steps": summary.get("ledger", {}).get("reused", 0),
        "train_seconds": summary.get("seconds"),
        "tokens_per_s": summary.get("tokens_per_s"),
        "machine": costs.machine(summary),
        "guards": _guards(summary),
    }


def _metrics_frame(rows: Iterable[Any]) -> DataFrame:
    import pandas as pd

    table: list[dict[str, Any]] = []
    tokens_at: dict[int, int] = {}  # the tokens of the training up to each step
    others: Counter[str] = Counter()
    for logged in rows:
        row = {"reused": False, **logged}
        if row["event"] == "step":
            tokens_at[row["step"]] = row["tokens"]
        else:
            row["scored_tokens"] = row["tokens"]
            row["tokens"] = tokens_at.get(row["step"])
        others.update(row.keys() - set(METRICS))
        table.append(row)
    frame = pd.DataFrame(table, columns=[*METRICS, *sorted(others)])
    for name in METRICS:
        if name in TEXTS:
            continue
        kind = {"step": "int64", "reused": "bool"}.get(name, "float64")
        frame[name] = frame[name].astype(kind)  # without rows, pandas cannot know the type
    return frame
