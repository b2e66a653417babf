"""Read the inputs of a report, which are finished runs and exported studies.

`gather` reads all inputs and groups the runs into recipes. If there are problems with the inputs, `gather`
raises a single error that lists all problems.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from mainrun.config import TrainConfig
from mainrun.errors import MainrunError, RunError, UsageError
from mainrun.files import inputs
from mainrun.plan.plan import Decision, Plan
from mainrun.plan.recipes import load, preset_names
from mainrun.stats import Noise, noise
from mainrun.store import records
from mainrun.store.rundir import RunDir, find
from mainrun.ui.compare import SAME, load_summary
from mainrun.ui.grouping import (
    contradictions,
    failed_guards,
    group_by_recipe,
    recipe_fields,
    recipe_key,
    runs_by_seed,
)
from mainrun.ui.paired import parse_pair

Source = TypeVar("Source")
Item = TypeVar("Item")

EXPORT = ("study.json", "trials.parquet")
OP_ENDED = ("SUCCESS", "ERROR")  # event name suffixes that mark the end of an op
FAILED_STATES = ("fail", "failed", "error", "diverged")
ENDED_STATES = ("diverged", "failed")  # the states of runs that have no score and need none
COMPLETED_STATES = ("complete", "completed", "done")


@dataclass(frozen=True)
class Run:
    """A finished run that was read from its run directory."""

    path: Path
    cfg: TrainConfig
    plan: dict[str, Any]
    env: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]  # the rows of metrics.jsonl
    journal: list[dict[str, Any]]  # the rows of growth.jsonl

    @property
    def id(self) -> str:
        """The id that the run recorded, because the current code might compute a different id for the run."""
        return str(self.summary["run"])

    @property
    def full(self) -> float:
        """The full score at the last step, which is used to rank recipes."""
        return float(self.summary["last"]["full"])

    @property
    def failed_guards(self) -> list[str]:
        return failed_guards(self.summary)

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["event"] == "step"]

    @cached_property
    def evals(self) -> list[dict[str, Any]]:
        """The evaluations of the val split, in the order of the steps."""
        return [row for row in self.rows if row["event"] == "eval" and row["split"] == "val"]

    @cached_property
    def ops(self) -> list[dict[str, Any]]:
        """The growth ops of the run, in the order of the steps.

        The ops of an old run without a journal are read from the plan of the run.
        """
        if self.journal:
            return [row for row in self.journal if _op_ended(row)]
        if not self.cfg.growth.ops:
            return []
        plan = Plan(self.cfg, self.plan["train_tokens"])
        ops = []
        # An op that is triggered by a loss has no step in the plan, so the plan may contain fewer ops.
        for op, (step, skipped) in zip(self.cfg.growth.ops, plan.decisions, strict=False):
            if not skipped:
                ops.append({"name": op.name, "value": op.value, "step": step, "tokens": plan.tokens(step)})
        return ops

    @cached_property
    def resolved(self) -> Plan:
        """The plan that the run followed. The step of each growth op is read from the journal."""
        fired = []
        if self.journal:
            for row in self.ops:
                decision = Decision(row["step"], str(row["event"]).endswith("ERROR"))
                fired.append(decision.to_int())
        return Plan(self.cfg, self.plan["train_tokens"], fired)


@dataclass(frozen=True)
class Ended:
    """A run that diverged or failed, and that has no score."""

    path: Path
    state: str
    step: int
    why: str


@dataclass(frozen=True)
class Recipe:
    """A group of runs that differ only in their seed.

    A run that failed a guard is shown in the report, but does not count for the scores of the recipe.
    """

    name: str
    runs: tuple[Run, ...]

    @cached_property
    def valid_runs(self) -> tuple[Run, ...]:
        """The runs that passed every guard."""
        return tuple(run for run in self.runs if not run.failed_guards)

    @property
    def cfg(self) -> TrainConfig:
        return self.runs[0].cfg

    @cached_property
    def scores(self) -> dict[int, float]:
        """The full score of each valid run, with the seed of the run as the key."""
        return {run.cfg.seed: run.full for run in self.valid_runs}

    @property
    def mean_score(self) -> float:
        return sum(self.scores.values()) / len(self.scores)


@dataclass(frozen=True)
class Study:
    """A study that was exported by `mainrun sweep`."""

    path: Path
    facts: dict[str, Any]  # the content of study.json
    trials: list[dict[str, Any]]  # the rows of trials.parquet, one row per trial

    @property
    def name(self) -> str:
        return str(self.facts.get("name") or self.path.name)

    def fact(self, name: str) -> Any:
        """Return a fact from the exported study.json, or from its nested tables "study" and "evidence"."""
        for table in (self.facts, self.facts.get("study"), self.facts.get("evidence")):
            if table and table.get(name) not in (None, {}, [], ""):
                return table[name]
        return None

    @cached_property
    def scored(self) -> list[dict[str, Any]]:
        """All trials that have a value and did not fail."""
        return [trial for trial in self.trials if trial.get("value") is not None and not is_failed(trial)]

    @cached_property
    def completed(self) -> list[dict[str, Any]]:
        """All trials that were trained to the end, so that their values can be compared.

        If the export does not record which trials were completed, all trials at the highest rung count as
        completed.
        """
        completed = [trial for trial in self.scored if trial_state(trial) in COMPLETED_STATES]
        if completed:
            return completed
        top = max(map(_rung, self.scored), default=0)
        return [trial for trial in self.scored if _rung(trial) == top]

    @cached_property
    def stopped(self) -> list[dict[str, Any]]:
        """All trials that were stopped at a lower rung than the completed trials."""
        completed = {trial["trial"] for trial in self.completed}
        return [trial for trial in self.scored if trial["trial"] not in completed]

    @cached_property
    def searched_fields(self) -> list[str]:
        """All fields of the search space that have more than one value among the trials."""
        if not self.trials:
            return []
        fields = []
        for column in self.trials[0]:
            values = set()
            for trial in self.trials:
                if trial.get(column) is not None:
                    values.add(str(trial[column]))
            if column.startswith("params.") and len(values) > 1:
                fields.append(column.removeprefix("params."))
        return fields


def is_failed(trial: dict[str, Any]) -> bool:
    return trial_state(trial) in FAILED_STATES


def trial_state(trial: dict[str, Any]) -> str:
    """Return the state of a trial in lower case, such as "complete" for "TrialState.COMPLETE"."""
    return str(trial.get("state", "")).split(".")[-1].lower()


def _rung(trial: dict[str, Any]) -> Any:
    return trial.get("rung") or 0


@dataclass(frozen=True)
class ReportData:
    """All data that a report shows."""

    recipes: tuple[Recipe, ...]
    studies: tuple[Study, ...]
    baseline: Recipe | None = None
    optimised: Recipe | None = None
    selection: str = ""  # a text that says how the optimized recipe was selected
    repeats: tuple[str, ...] = ()  # a sentence about each run that repeats another run
    ended: tuple[Ended, ...] = ()  # runs without a score

    @cached_property
    def runs(self) -> list[Run]:
        return [run for recipe in self.recipes for run in recipe.runs]

    @cached_property
    def ranked(self) -> list[Recipe]:
        """The recipes from the best mean score to the worst. Recipes without a valid run are last."""
        worst = float("inf")
        return sorted(self.recipes, key=lambda recipe: recipe.mean_score if recipe.valid_runs else worst)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each recipe, with the name of the recipe as the key: 1 is the best recipe."""
        return {recipe.name: number for number, recipe in enumerate(self.ranked, 1)}

    @cached_property
    def noise(self) -> Noise | None:
        """The noise between runs of the same recipe with different seeds.

        If two presets have the same recipe, the runs of both presets are combined.
        """
        groups: dict[str, dict[int, float]] = {}
        for recipe in self.recipes:
            groups.setdefault(recipe_key(recipe.cfg), {}).update(recipe.scores)
        return noise([list(scores.values()) for scores in groups.values()])

    @cached_property
    def ladder(self) -> list[Recipe]:
        """The recipes of an ablation preset, in the order of the preset's steps.

        The list is empty if fewer than three recipes of the preset have a valid run.
        """
        for preset in preset_names():
            order = [cfg.preset for cfg in load(preset)]
            steps = {}
            for recipe in self.recipes:
                if recipe.valid_runs and recipe.cfg.preset in order:
                    steps[recipe.cfg.preset] = recipe
            if len(steps) > 2:
                return sorted(steps.values(), key=lambda recipe: order.index(recipe.cfg.preset))
        return []


# -- reading the inputs


@dataclass
class _Collector:
    """Collects run directories and studies, and error messages about these inputs."""

    runs: dict[Path, RunDir] = field(default_factory=dict)
    studies: dict[Path, Path] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    ended: dict[Path, Ended] = field(default_factory=dict)  # only runs that no argument names

    def add(self, path: Path) -> bool:
        """Add a folder that is a run directory or a study, and return whether the folder was added."""
        if os.path.lexists(path / "config.json"):
            self.runs.setdefault(path.resolve(), RunDir(path))
            return True
        if any(os.path.lexists(path / name) for name in EXPORT):
            if (path / "export").is_dir():  # the folder contains a study with its export
                path = path / "export"
            self.studies.setdefault(path.resolve(), path)
            return True
        return False

    def add_below(self, folder: Path) -> None:
        """Add all run directories and studies in a folder and its subfolders, except in hidden subfolders."""
        added = 0
        for path, subfolders, _ in os.walk(folder):
            ended = _ended(Path(path))
            if ended is not None:
                self.ended.setdefault(ended.path.resolve(), ended)
                subfolders.clear()
            elif self.add(Path(path)):
                added += 1
                subfolders.clear()
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if not added:
            self.faults.append(
                f"{folder} contains no run and no exported study; "
                "create one with `mainrun train` or `mainrun sweep export`"
            )

    def read(self, sources: Iterable[Source], read: Callable[[Source], Item]) -> list[Item]:
        """Read all sources, and return their items. If a source cannot be read, record a fault instead."""
        items = []
        for source in sources:
            try:
                items.append(read(source))
            except MainrunError as error:
                self.faults.append(str(error))
        return items


def gather(places: Sequence[str], out: Path = Path("runs")) -> ReportData:
    """Read the inputs of a report. If there are problems, raise a RunError that lists all problems.

    Each place is a run directory, the id of a run in `out`, an exported study, or a folder that contains runs
    and studies. If `places` is empty, all runs and studies in `out` are read.
    """
    collector = _Collector()
    for place in places or [str(out)]:
        path = Path(place)
        if not path.is_dir() and (out / place).is_dir():
            path = out / place
        if path.is_dir():
            if not collector.add(path):
                collector.add_below(path)
            continue
        try:
            collector.add(find(place, out).path)
        except RunError as error:
            collector.faults.append(str(error))
    runs = collector.read(collector.runs.values(), _read_run)
    studies = collector.read(collector.studies.values(), _read_study)
    recipes = _group_into_recipes(runs)
    faults = [*collector.faults, *_mixed_data(runs, studies)]
    for recipe in recipes:
        faults += contradictions(recipe.name, runs_by_seed(recipe.runs), lambda run: str(run.path))
    if len(faults) > 1:
        faults.insert(0, f"{len(faults)} problems prevent the report:")
    if faults:
        raise RunError("\n".join(faults))
    repeats = tuple(_describe_repeats(recipes))
    recipes = tuple(map(_without_repeats, recipes))
    baseline, optimised, selection = _select_pair(recipes)
    ended = tuple(sorted(collector.ended.values(), key=lambda ended: ended.path.name))
    return ReportData(recipes, tuple(studies), baseline, optimised, selection, repeats, ended)


def _ended(path: Path) -> Ended | None:
    """Return a run that diverged or failed, or None if a folder is anything else."""
    if not (path / "config.json").is_file() or os.path.lexists(path / "summary.json"):
        return None
    try:
        status = RunDir(path).status()
    except MainrunError:
        return None  # reading the run reports what is wrong
    if status.get("state") not in ENDED_STATES:
        return None
    return Ended(path, status["state"], int(status.get("step", 0)), str(status.get("why", "")))


def _without_repeats(recipe: Recipe) -> Recipe:
    """Return a recipe with one run per seed, which is the run with the most data."""
    return Recipe(recipe.name, tuple(max(runs, key=_data) for runs in runs_by_seed(recipe.runs).values()))


def _data(run: Run) -> tuple[Any, ...]:
    """Return how much a report can show about a run, compared with other runs that have the same result."""
    reused = run.summary.get("ledger", {}).get("reused", 0)  # the time of these steps is unknown
    return run.cfg.grad_norm_steps, len(run.rows), -reused, run.cfg.token_scores, run.id


def _describe_repeats(recipes: Sequence[Recipe]) -> Iterator[str]:
    """Yield a sentence about each run that a recipe without repeats lacks."""
    for recipe in recipes:
        for runs in runs_by_seed(recipe.runs).values():
            shown = max(runs, key=_data)
            for run in runs:
                if run is not shown:
                    yield f"{run.path} repeats {shown.path} with the same result, and is left out."


def _read_run(folder: RunDir) -> Run:
    summary = load_summary(folder)
    missing = _missing(folder.path, ("env.json", "metrics.jsonl", "tokenizer.json"), Path.is_file)
    if missing:
        raise RunError(
            f"the run {folder.path} lacks {missing}; "
            "restore the missing files, or train the run again with --fresh"
        )
    run = Run(
        path=folder.path,
        cfg=folder.config(),
        plan=folder.plan(),
        env=folder.env(),
        summary=summary,
        rows=folder.rows(),
        journal=folder.journal(),
    )
    _check_run(folder, run)
    return run


def _missing(folder: Path, names: Sequence[str], exists: Callable[[Path], bool]) -> str:
    return ", ".join(name for name in names if not exists(folder / name))


# Keys that a report needs in addition to the keys that `mainrun compare` needs.
REPORTED = {"flops": records.above_zero, "presentations": {"train_tokens_per_epoch": records.at_least_one}}
ROWS = {"step": {"tokens": records.count, "loss": records.number}, "eval": {}}
STARTED = {"params": records.count, "flops_per_token": records.not_negative}
ENDED = {"tokens": records.count, "value": records.anything, "step": records.step}


def _check_run(folder: RunDir, run: Run) -> None:
    """Check that a run has all data for a report, and that its growth journal matches its config."""
    for name, fault in (
        ("summary.json", records.fault(run.summary, REPORTED)),
        ("metrics.jsonl", _metrics_fault(run)),
        ("growth.jsonl", _journal_fault(run)),
    ):
        if fault:
            raise RunError(f"{folder.path / name} is damaged: it {fault}; {folder.fix}")
    if "train_tokens" not in run.plan:
        raise RunError(f"{folder.path}/config.json is damaged: it lacks 'plan.train_tokens'; {folder.fix}")
    try:
        _ = run.resolved
    except (MainrunError, LookupError, AssertionError) as error:
        raise RunError(
            f"the config.json and the growth.jsonl of {folder.path} contradict each other ({error}); "
            f"{folder.fix}"
        ) from None


def _metrics_fault(run: Run) -> str:
    if not run.steps:
        return "has no row of a step"
    if not run.evals:
        return "has no score of val"
    return _first_fault(run.rows, lambda row: ROWS[row["event"]])


def _journal_fault(run: Run) -> str:
    if not run.journal:
        return ""
    started = any(row["event"].endswith("START") for row in run.journal)
    if not started and any("params" in op for op in run.ops):
        return "records how ops ended, but not that they began"
    return _first_fault(run.journal, _journal_shape)


def _first_fault(rows: Iterable[dict[str, Any]], shape_of: Callable[[dict[str, Any]], records.Shape]) -> str:
    for row in rows:
        fault = records.fault(row, shape_of(row))
        if fault:
            return fault
    return ""


def _journal_shape(row: dict[str, Any]) -> records.Shape:
    if row["event"].endswith("START"):
        return STARTED
    if _op_ended(row):
        return ENDED
    return {}


def _op_ended(row: dict[str, Any]) -> bool:
    return str(row.get("event", "")).endswith(OP_ENDED)


def _read_study(path: Path) -> Study:
    missing = _missing(path, EXPORT, os.path.lexists)
    if missing:
        raise RunError(
            f"the study {path} lacks {missing}, which `mainrun sweep` writes at the end of a study; "
            "resume the study"
        )
    import pyarrow.parquet

    advice = "export it again with `mainrun sweep export`"
    facts = records.load(path / "study.json", FACTS, advice)
    try:
        with inputs.open_file(path / "trials.parquet") as f:
            trials = [_plain_names(row) for row in pyarrow.parquet.read_table(f).to_pylist()]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = str(getattr(error, "strerror", None) or error)
        reason = " ".join(reason.split())[:300]
        raise RunError(f"the study {path} cannot be read (trials.parquet: {reason}); {advice}") from None
    if trials and not {"trial", "state", "value"} <= trials[0].keys():
        raise RunError(
            f"the study {path} is not in the format of `mainrun sweep export`, "
            f"because trials.parquet must have the columns trial, state and value; {advice}"
        )
    fault = _first_fault(trials, _trial_shape)
    if fault:
        raise RunError(f"{path}/trials.parquet is damaged: a trial {fault}; {advice}")
    return Study(path, facts, trials)


def _plain_names(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of trials.parquet with the names of older files: `trial` for `number`, and so on.

    The times are left out, so that the same trials always give the same report.
    """
    if "number" not in row:
        return row
    trial = {"trial": row["number"]}
    for name, value in row.items():
        if name.startswith("params_"):
            trial[f"params.{name.removeprefix('params_')}"] = value
        elif name not in ("number", "datetime_start", "datetime_complete", "duration", "outcome", "score"):
            trial[name] = value
    trial["state"] = row.get("outcome") or row.get("state")
    trial["value"] = row.get("score", row.get("value"))
    return trial


def _trial_shape(trial: dict[str, Any]) -> records.Shape:
    return TRIAL | {name: records.setting for name in trial if name.startswith("params.")}


CONFIRMED = {
    "trial?": records.optional(records.count),
    "mean?": records.optional(records.any_number),
    "difference?": records.optional(records.any_number),
    "interval?": records.optional(records.pair(records.any_number)),
    "p_holm?": records.optional(records.any_number),
    "why?": records.optional(records.any_text),
    "pairs?": records.optional(records.count),
    "stopped?": records.optional(records.any_text),
}
SPACE = {
    "values?": records.optional([records.anything]),
    "when?": records.optional(records.table),
}
# Keys that `Study.fact` reads from study.json, or from the tables "study" and "evidence" in study.json.
FACT: dict[str, Any] = {
    "rows?": records.optional([CONFIRMED]),
    "rung_correlation?": records.optional(records.table_of(records.optional(records.any_number))),
    "space?": records.optional(records.table_of(records.optional(SPACE))),
    "importance?": records.optional(records.table_of(records.optional(records.number))),
    "sequential?": records.optional(records.table),
}
FACTS = FACT | {
    "name?": records.text,
    "study?": records.optional(FACT),
    "evidence?": records.optional(FACT),
    "ledger?": records.optional(records.table_of(records.optional(records.not_negative))),
}
LEDGER = dict.fromkeys(
    ("asked?", "trained?", "reused?", "wasted?", "branch?", "steps?"), records.optional(records.not_negative)
)
TRIAL = LEDGER | {
    "trial": records.count,
    "state": records.text,
    "value": records.optional(records.number),
    "reason?": records.optional(records.any_text),
    "rung?": records.optional(records.any_number),
    "forward_flops?": records.optional(records.not_negative),
    "scores?": records.optional(records.scores),
}


# -- data that must not be mixed


def _mixed_data(runs: Sequence[Run], studies: Sequence[Study]) -> list[str]:
    """Return the reasons why the scores of the inputs cannot be compared.

    Scores cannot be compared if they were computed from different titles or different evaluation spans.
    """
    tables: list[tuple[str, Mapping[str, Any]]] = []  # the name of each run or study, and its recorded facts
    for run in runs:
        tables.append((run.id, run.summary))
    for study in studies:
        tables.append((f"study {study.name}", study.facts))
    faults = []
    for name in SAME:
        advice = "report only runs with the same titles and splits together"
        faults += _unequal(f"{name} fingerprint", tables, partial(_digest, name=name), advice)
    advice = "report runs from random weights only with each other"
    faults += _unequal("kind of start", tables, _kind_of_start, advice)
    advice = (
        "train the runs again with the same --set official_geometry=ROWSxTOKENS "
        "(mainrun reads the steps from the store)"
    )
    faults += _unequal("evaluation geometry", tables, _geometry, advice)
    return faults


def _digest(table: Mapping[str, Any], name: str) -> str | None:
    fingerprints = table.get("fingerprints")
    if isinstance(fingerprints, dict):
        fingerprints = fingerprints.get(name)
    if fingerprints is None:
        return None
    return str(fingerprints)[:12]


def _kind_of_start(table: Mapping[str, Any]) -> str | None:
    if "start" not in table:
        return None
    return "random weights" if table["start"] is None else "weights"


def _geometry(table: Mapping[str, Any]) -> str | None:
    geometry = table.get("geometry")
    if geometry is None:
        return None
    if isinstance(geometry, list):
        return "x".join(map(str, geometry))
    return str(geometry)[:12]


def _unequal(
    what: str,
    tables: Sequence[tuple[str, Mapping[str, Any]]],
    get: Callable[[Mapping[str, Any]], str | None],
    advice: str,
) -> list[str]:
    """Return an error message if a value differs between sources. Ignore sources that lack the value."""
    sources: dict[str, list[str]] = {}
    for source, table in tables:
        value = get(table)
        if value is not None:
            sources.setdefault(value, []).append(source)
    if len(sources) < 2:
        return []
    listed = "; ".join(f"{value}: {shorten(names)}" for value, names in sources.items())
    return [f"the inputs differ in their {what}: {listed}; {advice}"]


def shorten(names: Sequence[str], limit: int = 4) -> str:
    """Join the first `limit` names with commas, and add the number of remaining names."""
    joined = ", ".join(names[:limit])
    if len(names) > limit:
        return f"{joined} and {len(names) - limit} more"
    return joined


# -- recipes


def _group_into_recipes(runs: Sequence[Run]) -> tuple[Recipe, ...]:
    ordered = sorted(runs, key=lambda run: (run.cfg.preset, run.cfg.seed, run.id))
    return tuple(Recipe(name, tuple(runs)) for name, runs in group_by_recipe(ordered, _cfg_of))


def _cfg_of(run: Run) -> TrainConfig:
    return run.cfg


def _select_pair(recipes: Sequence[Recipe]) -> tuple[Recipe | None, Recipe | None, str]:
    """Select the baseline and the optimized recipe, and describe how the optimized recipe was selected.

    Recipes that are called "baseline" and "optimized" are preferred. If no recipe is called "optimized", the
    recipe with the lowest mean score is selected, among those with several seeds if there are any. In this
    case, the report mentions how the recipe was selected, because the lowest of many scores is partly due to
    chance.
    """
    if not recipes:
        return None, None, "no run was given"
    not_optimized = [recipe for recipe in recipes if step_name(recipe.cfg) != "optimized"]
    base = (_recipes_called("baseline", recipes) or not_optimized or list(recipes))[0]
    others = [recipe for recipe in recipes if recipe is not base]
    named = _recipes_called("optimized", others)
    if len(named) > 1:
        return base, named[0], "the recipe is called optimized and has the most seeds"
    if named:
        return base, named[0], "the recipe is called optimized"
    valid = [recipe for recipe in others if recipe.valid_runs]
    repeated = [recipe for recipe in valid if len(recipe.valid_runs) > 1]
    if len(valid) > 1 and len(repeated) == 1:
        return base, repeated[0], "the only other recipe with several seeds"
    candidates = repeated or valid
    if len(candidates) > 1:
        best = min(candidates, key=lambda recipe: recipe.mean_score)
        return base, best, f"the lowest mean full score of {len(candidates)} recipes"
    only = next(iter(valid or others), None)
    return base, only, "the only other recipe"


CHOSEN = "the user chose the recipes of page 1 among {}"


def choose_pair(data: ReportData, text: str, option: str = "--compare") -> ReportData:
    """Return the data with the two main recipes that the user names in an option."""
    named = {recipe.name: recipe for recipe in data.recipes}
    base, other, rest = parse_pair(option, text, list(named), "BASE,OTHER")
    if rest:
        raise UsageError(f"got {option} {inputs.shown(text, 80)}; give BASE,OTHER and nothing else")
    selection = CHOSEN.format(len(named))
    return replace(data, baseline=named[base], optimised=named[other], selection=selection)


def _recipes_called(name: str, recipes: Sequence[Recipe]) -> list[Recipe]:
    """Return the recipes whose preset or ablation step is called `name`, with the most valid runs first."""
    called = [recipe for recipe in recipes if step_name(recipe.cfg) == name]
    return sorted(called, key=lambda r: (-len(r.valid_runs), r.cfg.preset.startswith("ablation:"), r.name))


def step_name(cfg: TrainConfig) -> str:
    """Return the name of an ablation step without the preset, such as `size` for `ablation:size`."""
    return cfg.preset.split(":")[-1]


def ladder_scores(ladder: Sequence[Recipe]) -> list[dict[int, float]]:
    """Return the scores of each step of an ablation, limited to the seeds that all steps share.

    If all steps have the same seeds, the change between two steps equals the difference between the displayed
    means. If the steps share fewer than two seeds, all scores of each step are returned.
    """
    common = set(ladder[0].scores)
    for recipe in ladder:
        common &= recipe.scores.keys()
    scores = []
    for recipe in ladder:
        seeds = sorted(common) if len(common) > 1 else recipe.scores
        scores.append({seed: recipe.scores[seed] for seed in seeds})
    return scores


def base_indices(ladder: Sequence[Recipe]) -> list[int]:
    """Return, for each step of an ablation after the first, the index of the step that it changes.

    A step changes the earlier step from which it differs in the fewest fields. This is the step before it,
    unless the step before it was not kept.
    """
    fields = [recipe_fields(recipe.cfg) for recipe in ladder]
    indices = []
    for i in range(1, len(ladder)):
        differing = []
        for earlier in fields[:i]:
            differing.append(sum(earlier[name] != fields[i][name] for name in earlier))
        fewest = min(differing)
        indices.append(max(index for index, count in enumerate(differing) if count == fewest))
    return indices


def config_differences(a: TrainConfig, b: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Return a tuple (field, value in `a`, value in `b`) for each differing field, except the preset."""
    old = a.model_dump(exclude={"preset"})
    new = b.model_dump(exclude={"preset"})
    differences = []
    for name in old:
        if old[name] != new[name]:
            differences.append((name, old[name], new[name]))
    return differences
