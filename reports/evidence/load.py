"""What a report stands on: finished runs on the same data, grouped into recipes, and exported studies. Everything wrong is said at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mainrun.config import TrainConfig
from mainrun.errors import MainrunError, RunError
from mainrun.files import inputs
from mainrun.plan.plan import Decision, Plan
from mainrun.plan.recipes import load, preset_names
from mainrun.stats import Noise, noise
from mainrun.store import records
from mainrun.store.rundir import RunDir, find
from mainrun.ui.compare import SAME, load_summary

EXPORT = ("study.json", "trials.parquet")
FIRED = ("SUCCESS", "ERROR")  # how an event of growth.jsonl ends that says an op is over


@dataclass(frozen=True)
class Run:
    path: Path
    cfg: TrainConfig
    plan: dict[str, Any]
    env: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    journal: list[dict[str, Any]]  # of growth.jsonl

    @property
    def id(self) -> str:
        return str(self.summary["run"])  # not what today's code would name it

    @property
    def full(self) -> float:
        """The score that ranks: of the last step."""
        return float(self.summary["last"]["full"])

    @property
    def failed(self) -> list[str]:
        return [g["name"] for g in self.summary["guards"] if g["status"] == "fail"]

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["event"] == "step"]

    @cached_property
    def evals(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["event"] == "eval" and row["split"] == "val"]

    @cached_property
    def ops(self) -> list[dict[str, Any]]:
        """What changed on the way, one row an op: from the journal, or (of a run before there was one) from the plan."""
        if self.journal:
            return [row for row in self.journal if str(row.get("event", "")).endswith(FIRED)]
        if not self.cfg.growth.ops:
            return []
        plan = Plan(self.cfg, self.plan["train_tokens"])
        ops = zip(
            self.cfg.growth.ops, plan.decisions, strict=False
        )  # what waits for a loss has no step in a plan
        return [
            {"name": op.name, "value": op.value, "step": step, "tokens": plan.tokens(step)}
            for op, (step, skipped) in ops
            if not skipped
        ]

    @cached_property
    def resolved(self) -> Plan:
        """The plan that the run followed: with what its journal says about when each op fired."""
        fired = (
            [Decision(row["step"], str(row["event"]).endswith("ERROR")).to_int() for row in self.ops]
            if self.journal
            else []
        )
        return Plan(self.cfg, self.plan["train_tokens"], fired)


@dataclass(frozen=True)
class Recipe:
    """Runs that differ by their seed alone. What failed a guard is shown, and never counted."""

    name: str
    runs: tuple[Run, ...]

    @cached_property
    def good(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if not run.failed)

    @property
    def cfg(self) -> TrainConfig:
        return self.runs[0].cfg

    @cached_property
    def scores(self) -> dict[int, float]:
        return {run.cfg.seed: run.full for run in self.good}


@dataclass(frozen=True)
class Study:
    path: Path
    facts: dict[str, Any]  # study.json
    trials: list[dict[str, Any]]  # trials.parquet: a row a trial

    @property
    def name(self) -> str:
        return str(self.facts.get("name") or self.path.name)

    def fact(self, name: str) -> Any:
        """Of the export itself, of the study file that it holds, or of its evidence."""
        inside = (self.facts, *(self.facts.get(k) or {} for k in ("study", "evidence")))
        return next((found[name] for found in inside if found.get(name) not in (None, {}, [], "")), None)

    @cached_property
    def done(self) -> list[dict[str, Any]]:
        """Trials whose value counts."""
        return [t for t in self.trials if t.get("value") is not None and not bad(t)]

    @cached_property
    def whole(self) -> list[dict[str, Any]]:
        """Those whose values may be compared: trained to the end. An export that does not tell has its highest rung."""
        ended = [t for t in self.done if state(t) in ("complete", "completed", "done")]
        top = max(((t.get("rung") or 0) for t in self.done), default=0)
        return ended or [t for t in self.done if (t.get("rung") or 0) == top]

    @cached_property
    def stopped(self) -> list[dict[str, Any]]:
        whole = {t["trial"] for t in self.whole}
        return [t for t in self.done if t["trial"] not in whole]

    @cached_property
    def searched(self) -> list[str]:
        """The fields of the space that took more than one value."""
        names = [k for k in (self.trials[0] if self.trials else {}) if k.startswith("params.")]
        return [
            k.removeprefix("params.")
            for k in names
            if len({str(t.get(k)) for t in self.trials if t.get(k) is not None}) > 1
        ]


def bad(trial: dict[str, Any]) -> bool:
    return state(trial) in ("fail", "failed", "error", "diverged")


def state(trial: dict[str, Any]) -> str:
    """Optuna's names, with or without their class before them."""
    return str(trial.get("state", "")).split(".")[-1].lower()


@dataclass(frozen=True)
class Evidence:
    recipes: tuple[Recipe, ...]
    studies: tuple[Study, ...]
    baseline: Recipe | None = None
    optimised: Recipe | None = None
    chosen: str = ""  # how the two were

    @cached_property
    def runs(self) -> list[Run]:
        return [run for recipe in self.recipes for run in recipe.runs]

    @cached_property
    def noise(self) -> Noise | None:
        """Between the seeds of a recipe. One under two names, as two presets may have it, is counted once."""
        groups: dict[str, dict[int, float]] = {}
        for r in self.recipes:
            groups.setdefault(json.dumps(fields(r.cfg), sort_keys=True), {}).update(r.scores)
        return noise([list(scores.values()) for scores in groups.values()])

    @cached_property
    def ladder(self) -> list[Recipe]:
        """The steps of an ablation in the order of their preset, where at least three of them have a run that counts."""
        for preset in preset_names():
            order = [cfg.preset for cfg in load(preset)]
            named = {r.cfg.preset: r for r in self.recipes if r.good and r.cfg.preset in order}
            if len(named) > 2:
                return [named[name] for name in order if name in named]
        return []


@dataclass
class _Found:
    """Run directories and studies as they are met, and what is wrong with any of them."""

    runs: dict[Path, RunDir] = field(default_factory=dict)
    studies: dict[Path, Path] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def take(self, path: Path) -> bool:
        """Whether this folder is one of them."""
        if os.path.lexists(path / "config.json"):
            self.runs.setdefault(path.resolve(), RunDir(path))
            return True
        if any(os.path.lexists(path / name) for name in EXPORT):
            if (path / "export").is_dir():  # the study's own folder, where its driver works
                path = path / "export"
            self.studies.setdefault(path.resolve(), path)
            return True
        return False

    def below(self, folder: Path) -> None:
        taken = 0
        for path, below, _ in os.walk(folder):
            below.sort()
            if self.take(Path(path)):
                taken += 1
                below.clear()
            below[:] = [name for name in below if not name.startswith(".")]
        if not taken:
            self.faults.append(
                f"{folder} holds no run and no exported study; `mainrun train` and `mainrun sweep export` make them"
            )


def gather(places: Sequence[str], out: Path = Path("runs")) -> Evidence:
    """places: run directories, ids of runs in `out`, exported studies, or folders of these; none: all of `out`."""
    met = _Found()
    for place in places or [str(out)]:
        path = Path(place)
        if not path.is_dir() and (out / place).is_dir():
            path = out / place
        if path.is_dir():
            if not met.take(path):
                met.below(path)
            continue
        try:
            met.take(find(place, out).path)
        except RunError as e:
            met.faults.append(str(e))
    runs = list(_each(met.runs.values(), _run, met.faults))
    studies = list(_each(met.studies.values(), _study, met.faults))
    met.faults += _mixed(runs, studies)
    recipes = _recipes(runs)
    for recipe in recipes:
        seeds = [run.cfg.seed for run in recipe.runs]
        for seed in sorted({s for s in seeds if seeds.count(s) > 1}):
            twice = ", ".join(str(run.path) for run in recipe.runs if run.cfg.seed == seed)
            met.faults.append(
                f"seed {seed} of {recipe.name} is there more than once ({twice}); give one of them: a seed counts once"
            )
    if met.faults:
        head = (
            f"{len(met.faults)} things keep the report from being written:\n" if len(met.faults) > 1 else ""
        )
        raise RunError(head + "\n".join(met.faults))
    return Evidence(recipes, tuple(studies), *_headline(recipes))


def _each(things: Iterable[Any], read: Any, faults: list[str]) -> Iterator[Any]:
    for thing in things:
        try:
            yield read(thing)
        except MainrunError as e:
            faults.append(str(e))


def _run(run: RunDir) -> Run:
    summary = load_summary(run)
    missing = [
        name for name in ("env.json", "metrics.jsonl", "tokenizer.json") if not (run.path / name).is_file()
    ]
    if missing:
        raise RunError(
            f"{run.path} lacks {', '.join(missing)}; restore what is missing, or train the run again with --fresh"
        )
    loaded = Run(run.path, run.config(), run.plan(), run.env(), summary, run.rows(), run.journal())
    _check_run(run, loaded)
    return loaded


# what the pages need beside what a comparison needs
REPORTED = {"flops": records.above_zero, "presentations": {"train_tokens_per_epoch": records.at_least_one}}
ROWS = {"step": {"tokens": records.count, "loss": records.number}, "eval": {}}
STARTED = {"params": records.count, "flops_per_token": records.not_negative}
ENDED = {"tokens": records.count, "value": records.anything, "step": records.step}


def _check_run(run: RunDir, loaded: Run) -> None:
    """Check that a run has what the pages need, and that its journal fits its config."""
    faults = {"summary.json": records.fault(loaded.summary, REPORTED)}
    faults["metrics.jsonl"] = next(
        (fault for row in loaded.rows if (fault := records.fault(row, ROWS[row["event"]]))), ""
    )
    faults["growth.jsonl"] = next(
        (fault for row in loaded.journal if (fault := records.fault(row, _needed(row)))), ""
    )
    if not loaded.steps or not loaded.evals:
        faults["metrics.jsonl"] = "has no row of a step" if not loaded.steps else "has no score of val"
    if any("params" in op for op in loaded.ops) and not any(
        row["event"].endswith("START") for row in loaded.journal
    ):
        faults["growth.jsonl"] = "says how ops ended, and of none that it began"
    for name, fault in faults.items():
        if fault:
            raise RunError(f"{run.path / name} is damaged: it {fault}; {run.fix}")
    if "train_tokens" not in loaded.plan:
        raise RunError(f"{run.path}/config.json is damaged: it lacks 'plan.train_tokens'; {run.fix}")
    try:
        _ = loaded.resolved
    except (MainrunError, LookupError, AssertionError) as e:
        raise RunError(
            f"{run.path} cannot have trained as its config.json and growth.jsonl say ({e}); {run.fix}"
        ) from None


def _needed(row: dict[str, Any]) -> records.Shape:
    if row["event"].endswith("START"):
        return STARTED
    return ENDED if row["event"].endswith(FIRED) else {}


def _study(path: Path) -> Study:
    missing = [name for name in EXPORT if not os.path.lexists(path / name)]
    if missing:
        raise RunError(
            f"the study {path} lacks {', '.join(missing)}; `mainrun sweep` writes both at the end of a study; go on with it"
        )
    import pyarrow.parquet

    again = "export it again with `mainrun sweep export`"
    facts = records.load(path / "study.json", FACTS, again)
    try:
        with inputs.open_file(path / "trials.parquet") as f:
            rows = pyarrow.parquet.read_table(f).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as e:
        why = " ".join(str(getattr(e, "strerror", None) or e).split())[:300]
        raise RunError(f"the study {path} cannot be read (trials.parquet: {why}); {again}") from None
    if rows and not {"trial", "state", "value"} <= rows[0].keys():
        raise RunError(
            f"the study {path} is not as `mainrun sweep export` writes it (no trial, state and value); {again}"
        )
    for row in rows:
        if fault := records.fault(
            row, TRIAL | {name: records.setting for name in row if name.startswith("params.")}
        ):
            raise RunError(f"{path}/trials.parquet is damaged: a trial {fault}; {again}")
    return Study(path, facts, rows)


CONFIRMED = {
    "trial?": records.optional(records.count), "mean?": records.optional(records.any_number), "difference?": records.optional(records.any_number),
    "interval?": records.optional(records.pair(records.any_number)), "p_holm?": records.optional(records.any_number), "why?": records.any_text,
}  # fmt: skip
# what `Study.fact` looks for, in the export itself and in two parts of it
FACT: dict[str, Any] = {
    "rows?": records.optional([CONFIRMED]), "rung_correlation?": records.optional(records.table_of(records.optional(records.any_number))),
    "space?": records.optional(
        records.table_of(records.optional({"values?": records.optional([records.anything]), "when?": records.optional(records.table)}))
    ),
    "importance?": records.optional(records.table_of(records.optional(records.number))),
}  # fmt: skip
FACTS = FACT | {
    "name?": records.text, "study?": records.optional(FACT), "evidence?": records.optional(FACT),
    "ledger?": records.optional(records.table_of(records.optional(records.not_negative))),
}  # fmt: skip
LEDGER = dict.fromkeys(
    ("asked?", "trained?", "reused?", "wasted?", "branch?", "steps?"), records.optional(records.not_negative)
)
TRIAL = LEDGER | {
    "trial": records.count, "state": records.text, "value": records.optional(records.number), "reason?": records.optional(records.any_text),
    "rung?": records.optional(records.any_number), "scores?": records.optional(records.scores),
}  # fmt: skip


def _mixed(runs: Sequence[Run], studies: Sequence[Study]) -> list[str]:
    """Scores of other titles, or of other spans, do not stand side by side."""
    given = [(run.id, run.summary) for run in runs] + [(f"study {s.name}", s.facts) for s in studies]
    faults = []
    asked = {f"{name} fingerprint": ("fingerprints", name) for name in SAME} | {
        "evaluation geometry": ("geometry", "")
    }
    advice = {
        "evaluation geometry": "train them with one --set official_geometry=ROWSxTOKENS (the steps come from the store)",
    }
    for what, (key, part) in asked.items():
        values: dict[str, list[str]] = {}
        for name, facts in given:
            value = facts.get(key)
            value = value.get(part) if part and isinstance(value, dict) else value
            if value is not None:
                values.setdefault(
                    "x".join(map(str, value)) if isinstance(value, list) else str(value)[:12], []
                ).append(name)
        if len(values) > 1:
            each = "; ".join(f"{value}: {few(names)}" for value, names in values.items())
            faults.append(
                f"the {what} is not one: {each}; {advice.get(what, 'report runs of the same titles and splits together')}"
            )
    return faults


def few(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# -- recipes


def fields(cfg: TrainConfig) -> dict[str, Any]:
    """What makes a recipe: every field that touches the trajectory, but the seed."""
    dumped = cfg.model_dump()
    return {k: dumped[k] for k in dumped if k != "seed" and TrainConfig.class_of(k) != "inert"}


def _recipes(runs: Sequence[Run]) -> tuple[Recipe, ...]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.cfg.preset, run.cfg.seed, run.id)):
        groups.setdefault((run.cfg.preset, json.dumps(fields(run.cfg), sort_keys=True)), []).append(run)
    found = []
    for (preset, _), mine in groups.items():
        alike = [json.loads(text) for name, text in groups if name == preset]
        own = json.loads(json.dumps(fields(mine[0].cfg)))
        differ = [k for k in own if any(other[k] != own[k] for other in alike)]
        said = [
            f"{k}={own[k]:.6g}" if isinstance(own[k], float) else f"{k}={own[k]}"
            for k in differ
            if k != "growth"
        ]
        said += ["with growth"] if "growth" in differ and own["growth"]["ops"] else []
        found.append(Recipe(" ".join([preset, *said]), tuple(mine)))
    return tuple(found)


def _headline(recipes: Sequence[Recipe]) -> tuple[Recipe | None, Recipe | None, str]:
    """By name where the names say it; else the best mean, which is then said, for a best of many is better than it is."""

    def called(name: str) -> list[Recipe]:
        mine = [r for r in recipes if r.cfg.preset.split(":")[-1] == name]
        return sorted(mine, key=lambda r: (-len(r.good), r.cfg.preset.startswith("ablation:"), r.name))

    if not recipes:
        return None, None, "no run was given"
    base = (called("baseline") or list(recipes))[0]
    others = [r for r in recipes if r is not base]
    if named := [r for r in called("optimized") if r is not base]:
        return (
            base,
            named[0],
            "the recipe is called optimized" + (", the one with most seeds" if len(named) > 1 else ""),
        )
    good = [r for r in others if r.good]
    if not good:
        return base, others[0] if others else None, "the only other recipe"
    best = min(good, key=lambda r: sum(r.scores.values()) / len(r.scores))
    return (
        base,
        best,
        f"the lowest mean full score of {len(good)} recipes" if len(good) > 1 else "the only other recipe",
    )


def ladder_scores(ladder: Sequence[Recipe]) -> list[dict[int, float]]:
    """The scores of each step, over the seeds that all have where there are two: then every change is the difference of what is shown."""
    common = set.intersection(*(set(r.scores) for r in ladder))
    if len(common) < 2:
        return [r.scores for r in ladder]
    return [{seed: r.scores[seed] for seed in sorted(common)} for r in ladder]


def config_differences(a: TrainConfig, b: TrainConfig) -> list[tuple[str, Any, Any]]:
    x, y = a.model_dump(exclude={"preset"}), b.model_dump(exclude={"preset"})
    return [(k, x[k], y[k]) for k in x if x[k] != y[k]]
