"""What the page shows about runs and studies, whether they are finished or still running."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reports.evidence import findings, studies, tables
from reports.evidence.load import COMPLETED_STATES, FAILED_STATES, ReportData, Run, Study, trial_state
from reports.evidence.tables import Table

MOST_POINTS = 160  # of a curve
DIGITS = 6  # of a number in a curve
Point = list[float | None]  # step, tokens, seconds, FLOPs and value


@dataclass(frozen=True)
class RunView:
    """What the page shows about a run. Unknown values are None."""

    id: str
    recipe: str
    state: str
    config: Mapping[str, Any]
    command: Sequence[str] = ()
    note: str = ""  # why the run failed, or the guards that it failed
    step: int | None = None
    steps: int | None = None
    full: float | None = None
    best: float | None = None
    official: float | None = None
    params: int | None = None
    tokens: int | None = None
    flops: float | None = None
    seconds: float | None = None
    eta: float | None = None  # the seconds until the last step
    machine: str = ""
    data: str = ""  # a fingerprint; runs with different data cannot be compared
    scores: Sequence[Point] = ()
    losses: Sequence[Point] = ()

    @property
    def is_bad(self) -> bool:
        return self.state in ("failed", "diverged", "damaged", "killed", "failed a guard")


def best_run(runs: Sequence[RunView]) -> RunView | None:
    """Return the run with the lowest full score, or None if the runs cannot be compared."""
    scored = [run for run in runs if run.full is not None and not run.is_bad]
    if len({run.data for run in scored}) != 1:
        return None
    return min(scored, key=lambda run: (run.full, run.id))


@dataclass(frozen=True)
class StudyView:
    """What the page shows about a study."""

    name: str
    state: str
    objective: str
    trials: Sequence[Mapping[str, Any]]  # with the keys trial, state, value, params, run and reason
    about: str = ""
    claim: str = ""
    command: str = ""
    finished: int = 0
    total: int | None = None  # the number of trials in the budget
    eta: float | None = None
    workers: Sequence[str] = ()  # what each worker trains
    importance: Mapping[str, float] = field(default_factory=dict)
    space: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[Table] = ()

    @property
    def fields(self) -> list[str]:
        """The searched fields, from the most important to the least important."""
        names = dict.fromkeys(name for trial in self.trials for name in trial["params"])
        return sorted(names, key=lambda name: -self.importance.get(name, 0.0))

    def is_log(self, name: str) -> bool:
        """Return whether a field was searched on a logarithmic scale."""
        bounds = self.space.get(name)
        return isinstance(bounds, dict) and bool(bounds.get("log"))

    @property
    def best(self) -> Mapping[str, Any] | None:
        done = [trial for trial in self.trials if is_complete(trial) and trial["trial"] is not None]
        return min(done, key=lambda trial: trial["value"], default=None)


def is_complete(trial: Mapping[str, Any]) -> bool:
    return trial["value"] is not None and trial["state"] in COMPLETED_STATES


def is_failed(trial: Mapping[str, Any]) -> bool:
    return trial["state"] in FAILED_STATES


@dataclass(frozen=True)
class View:
    """Everything that the page shows."""

    title: str
    subtitle: str = ""
    runs: Sequence[RunView] = ()
    studies: Sequence[StudyView] = ()
    claim: findings.Claim | None = None
    floor: float | None = None  # the noise floor
    pair: tuple[str, str] = ("", "")  # the names of the two recipes that the claim compares
    findings: Sequence[str] = ()
    notes: Sequence[str] = ()  # what a reader must know beside the claim
    tables: Sequence[Table] = ()
    problems: Sequence[str] = ()  # what could not be read


# -- curves


def curves(
    rows: Iterable[Mapping[str, Any]], flops_per_token: float | None
) -> tuple[list[Point], list[Point]]:
    """Return the full scores and the training losses of a run, from the rows of metrics.jsonl.

    The scores are those of val. A run without them has the scores of dev.
    """
    scores: dict[str, list[Point]] = {}
    losses: list[Point] = []
    tokens = 0
    seconds = 0.0
    for row in rows:
        seconds += float(row.get("seconds") or 0.0)
        if row["event"] == "step":
            tokens = row["tokens"]
            losses.append(_point(row, tokens, seconds, flops_per_token, row["loss"]))
        else:
            point = _point(row, tokens, seconds, flops_per_token, row["full"])
            scores.setdefault(row["split"], []).append(point)
    return thin(scores.get("val") or scores.get("dev") or []), thin(losses)


def _point(row: Mapping[str, Any], tokens: int, seconds: float, flops: float | None, value: float) -> Point:
    cost = row.get("flops")
    if cost is None and flops is not None:
        cost = flops * tokens
    return [row["step"], tokens, seconds, cost, value]


def thin(points: Sequence[Point]) -> list[Point]:
    """Return at most about MOST_POINTS points. Each is the mean of neighbours, and the last one is kept."""
    size = math.ceil(len(points) / MOST_POINTS)
    thinned = []
    for start in range(0, len(points), size or 1):
        group = points[start : start + size]
        values = [point[-1] for point in group if point[-1] is not None and math.isfinite(point[-1])]
        mean = sum(values) / len(values) if values else None
        thinned.append([*map(_short, group[-1][:-1]), _short(mean)])
    return thinned


def _short(number: float | None) -> float | None:
    if number is None or not math.isfinite(number):
        return None
    rounded = float(f"{number:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() else rounded


# -- the data of a report


def view_of(data: ReportData, title: str) -> View:
    """Return what the page shows about finished runs and exported studies."""
    from reports.evidence.front_page import subtitle  # loads reportlab, which the board does not need

    pair = [recipe.name for recipe in (data.baseline, data.optimised) if recipe is not None]
    first, second = (*pair, "", "")[:2]
    made = []
    if data.runs:
        made = [tables.recipes(data), tables.ablation(data), tables.differences(data)]
    notes = []
    if data.selection.startswith("the lowest"):
        notes.append(
            f"{second} was selected on val itself, as {data.selection}. Part of its lead comes from this "
            "selection."
        )
    return View(
        title=title,
        subtitle=subtitle(data),
        runs=[_run(recipe.name, run) for recipe in data.recipes for run in recipe.runs],
        studies=list(map(study_view, data.studies)),
        claim=findings.claim(data),
        floor=data.noise.floor if data.noise else None,
        pair=(first, second),
        findings=findings.findings(data),
        notes=notes,
        tables=[table for table in (*made, tables.failures(data)) if table is not None],
    )


def _run(recipe: str, run: Run) -> RunView:
    summary = run.summary
    scores, losses = curves(run.rows, summary["flops"] / summary["tokens"])
    failed = run.failed_guards
    return RunView(
        id=run.id,
        recipe=recipe,
        state="failed a guard" if failed else "done",
        config=run.cfg.model_dump(mode="json"),
        command=run.env.get("command") or (),
        note=f"failed {', '.join(failed)}" if failed else "",
        step=summary["steps"],
        steps=summary["steps"],
        full=run.full,
        best=summary["best"]["full"],
        official=summary["last"]["official"],
        params=summary["params"],
        tokens=summary["tokens"],
        flops=summary["flops"],
        seconds=summary["seconds"],
        data=str(summary["fingerprints"].get("val", "")),
        machine=str(summary.get("machine_class", {}).get("device", "")),
        scores=scores,
        losses=losses,
    )


def study_view(study: Study, with_importance: bool = True) -> StudyView:
    """Return what the page shows about an exported study. The importance needs Optuna, which loads slowly."""
    trials = list(map(_trial, study.trials))
    return StudyView(
        name=study.name,
        state="finished",
        objective=studies.objective(study),
        trials=trials,
        about=str(study.fact("about") or ""),
        claim=str(study.fact("claim") or ""),
        finished=len(trials),
        total=len(trials),
        space=study.fact("space") or {},
        importance=studies.importance(study) if with_importance else {},
        tables=[table for table in tables.study(study, 1) if "In short" not in table.title],
    )


def _trial(row: Mapping[str, Any]) -> dict[str, Any]:
    params = {}
    for name, value in row.items():
        if name.startswith("params.") and value is not None:
            params[name.removeprefix("params.")] = value
    kept = {name: row.get(name) for name in ("trial", "value", "run", "reason", "steps", "tokens", "horizon")}
    return {**kept, "state": trial_state(dict(row)), "params": params}
