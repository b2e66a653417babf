"""The tables of a report, as values: the PDF shows them rounded, the CSV whole. And how a number is written."""

from __future__ import annotations

import csv
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mainrun import stats
from mainrun.config import MIN_COVERAGE, TrainConfig
from reports.evidence.load import Evidence, Run, Study, bad, config_differences, few, ladder_scores
from reports.evidence.studies import ledger

Format = Callable[[Any], str]


def fixed(decimals: int, sign: bool = False) -> Format:
    return lambda v: (
        "" if v is None else f"{v:{'+' if sign else ''}.{decimals}f}".replace("-", "\N{MINUS SIGN}")
    )


def whole(v: Any) -> str:
    return "" if v is None else f"{v:,.0f}"


def plain(v: Any) -> str:
    """A number that is a name, like a seed."""
    return f"{v}"


def chance(v: Any) -> str:
    return "<0.001" if v is not None and v < 0.001 else fixed(3)(v)


def text(v: Any) -> str:
    return "" if v is None else str(v)


def power(v: Any) -> str:
    """3.55e13: FLOPs."""
    return "" if v is None else f"{v:.3g}".replace("e+", "e")


def value(v: Any) -> str:
    """A field as --set takes it."""
    if v is None:
        return "none"
    if isinstance(v, (dict, list, tuple, bool)):
        return json.dumps(v)
    return f"{v:.6g}" if isinstance(v, float) else str(v)


@dataclass(frozen=True)
class Column:
    head: str
    format: Format = text
    share: float = 0.0  # of the page's width; 0: what the words need

    @property
    def right(self) -> bool:
        return self.format not in (text, value)


@dataclass
class Table:
    name: str  # of the CSV file
    title: str
    columns: Sequence[Column]
    rows: list[list[Any]]
    note: str = ""
    red: set[int] = field(default_factory=set)  # rows that do not count

    def cells(self) -> Iterator[list[str]]:
        for row in self.rows:
            yield [column.format(v) for column, v in zip(self.columns, row, strict=True)]

    def write(self, folder: Path) -> Path:
        path = folder / f"{self.name}.csv"
        with path.open("w", encoding="utf-8", newline="") as f:
            out = csv.writer(f, lineterminator="\n")
            out.writerow([column.head for column in self.columns])
            out.writerows(
                [json.dumps(v) if isinstance(v, (dict, list)) else v for v in row] for row in self.rows
            )
        return path


def mean_of(runs: Sequence[Run], get: Callable[[Run], float]) -> float | None:
    return sum(map(get, runs)) / len(runs) if runs else None


def recipes(e: Evidence) -> Table:
    rows, red = [], set()
    for i, r in enumerate(
        sorted(e.recipes, key=lambda r: (not r.good, mean_of(r.good, lambda run: run.full) or 0))
    ):
        scores = stats.Mean(tuple(r.scores.values())) if r.good else None
        counted = r.good or r.runs
        fresh = [run for run in counted if not run.summary.get("ledger", {}).get("reused")]
        rows.append(
            [
                r.name,
                len(r.good),
                scores and scores.mean,
                scores and scores.sd,
                scores and scores.half,
                mean_of(r.good, lambda run: run.summary["last"]["official"]),
                100 * (mean_of(counted, lambda run: run.summary["last"]["coverage"]) or 0),
                counted[0].summary["params"],
                mean_of(counted, lambda run: run.summary["flops"]),
                mean_of(fresh, lambda run: run.summary["seconds"]),
            ]
        )
        if not r.good:
            red.add(i)
    columns = [
        Column("recipe", text, 0.25), Column("seeds", whole), Column("full", fixed(4)), Column("sd", fixed(4)), Column("±95%", fixed(4)),
        Column("official", fixed(4)), Column("covers %", fixed(1)), Column("params", whole), Column("FLOPs", power),
        Column("seconds", fixed(1)),
    ]  # fmt: skip
    note = (
        "Means over the seeds that passed every guard, of the last step, in nats per character; sd between seeds; ±95% of the mean by "
        "Student's t. An official score that covers less than "
        f"{MIN_COVERAGE:.0%} of val is not compared. Seconds leave out runs that took steps from the store."
    )
    return Table("recipes", "Recipes", columns, rows, note, red)


def runs(e: Evidence) -> Table:
    rows, red = [], set()
    for i, run in enumerate(e.runs):
        s, said = run.summary, Counter(g["status"] for g in run.summary["guards"])
        guards = (
            f"FAIL: {', '.join(run.failed)}"
            if run.failed
            else "ok" + f", {said['flag']} flag" * bool(said["flag"])
        )
        last = s["last"]
        rows.append(
            [
                run.id, run.cfg.seed, last["full"], s["best"]["full"], last["official"], 100 * last["coverage"], last["bits_per_byte"],
                s["steps"], s.get("ledger", {}).get("reused", 0), s["tokens_per_s"], guards,
            ]
        )  # fmt: skip
        if run.failed:
            red.add(i)
    columns = [
        Column("run", text, 0.3), Column("seed", plain), Column("full", fixed(4)), Column("best", fixed(4)), Column("official", fixed(4)),
        Column("covers %", fixed(1)), Column("bits/byte", fixed(4)), Column("steps", whole), Column("reused", whole),
        Column("tokens/s", whole), Column("guards", text, 0.14),
    ]  # fmt: skip
    note = "full and official of the last step; best: the lowest full of any evaluation, shown for honesty and used for nothing."
    if red:
        note += " Red: a run that failed a guard; it is in no mean, no difference and no figure."
    return Table("runs", "Runs", columns, rows, note, red)


def ablation(e: Evidence) -> Table | None:
    if not e.ladder:
        return None
    noise = e.noise
    scores = ladder_scores(e.ladder)
    apart = [stats.difference(a, b) for a, b in pairwise(scores)]
    adjusted = iter(stats.holm([d.p for d in apart if d.p is not None]))
    means = [stats.Mean(tuple(found.values())).mean for found in scores]
    rows: list[list[Any]] = [[short(e.ladder[0].cfg), len(scores[0]), means[0], *[None] * 4, "", ""]]
    for (before, recipe), d, mean, mine in zip(pairwise(e.ladder), apart, means[1:], scores[1:], strict=True):
        low, high = d.interval or (None, None)
        p = next(adjusted) if d.p is not None else None
        changed = ", ".join(
            f"{k}={value(b)}" for k, _, b in config_differences(before.cfg, recipe.cfg) if k != "seed"
        )
        rows.append([short(recipe.cfg), len(mine), mean, d.mean, low, high, p, verdict(d, noise, p), changed])
    columns = [
        Column("step", text, 0.11), Column("seeds", whole), Column("full", fixed(4)), Column("delta", fixed(4, sign=True)),
        Column("low", fixed(4, sign=True)), Column("high", fixed(4, sign=True)), Column("p", chance), Column("verdict", text, 0.12),
        Column("what it sets", text, 0.27),
    ]  # fmt: skip
    note = "Each step keeps the changes of the steps before it. delta with its 95% interval (low, high); p by Holm over all steps."
    if noise:
        note += f" Noise floor {noise.floor:.4f} (sd {noise.sd:.4f} between seeds, {noise.df} degrees of freedom)."
    return Table("ablation", "From step to step", columns, rows, note)


def short(cfg: TrainConfig) -> str:
    return cfg.preset.split(":")[-1]


def verdict(d: stats.Difference, noise: stats.Noise | None, p: float | None = None) -> str:
    """What a difference amounts to. A claim needs an interval without zero, and more than the floor."""
    if d.interval is None or noise is None:
        return "no claim: one seed"
    if abs(d.mean) <= noise.floor:
        return "within noise"
    if d.interval[0] <= 0 <= d.interval[1] or (p is not None and p > 1 - stats.LEVEL):
        return "not sure"
    return "better" if d.mean < 0 else "worse"


def differences(e: Evidence) -> Table | None:
    if e.baseline is None or e.optimised is None:
        return None
    rows: list[list[Any]] = [
        [k, value(a), value(b)]
        for k, a, b in config_differences(e.baseline.cfg, e.optimised.cfg)
        if k not in ("seed", "growth")
    ]
    for op in e.optimised.cfg.growth.ops:
        rows.append(["growth", "", f"{op} at {op.trigger}"])
    columns = [
        Column("field", text, 0.2),
        Column(e.baseline.name, text, 0.35),
        Column(e.optimised.name, text, 0.45),
    ]
    return Table(
        "config",
        f"Config of {e.optimised.name} against {e.baseline.name}",
        columns,
        rows,
        "Fields that are not here are equal.",
    )


def others(e: Evidence) -> Table | None:
    """The other recipes against the baseline, a line each."""
    mine = [r for r in e.recipes if r not in (e.baseline, e.optimised, *e.ladder)]
    if e.baseline is None or not mine:
        return None
    base = e.baseline.cfg
    rows = [
        [
            r.name,
            ", ".join(
                f"{k}={value(b)}"
                for k, _, b in config_differences(base, r.cfg)
                if k not in ("seed", "growth")
            ),
        ]
        for r in mine
    ]
    return Table(
        "other_configs",
        f"Other recipes against {e.baseline.name}",
        [Column("recipe", text, 0.25), Column("sets", text, 0.75)],
        rows,
    )


def guards(e: Evidence) -> Table:
    names = list(dict.fromkeys(g["name"] for run in e.runs for g in run.summary["guards"]))
    rows, red = [], set()
    for i, name in enumerate(names):
        mine = [g for run in e.runs for g in run.summary["guards"] if g["name"] == name]
        said = Counter(g["status"] for g in mine)
        worst = next((s for s in ("fail", "flag") if said[s]), "pass")
        details = Counter(g["detail"] for g in mine if g["status"] == worst)
        detail, _ = min(details.items(), key=lambda item: (-item[1], item[0]))
        more = f" (and {len(details) - 1} more like it)" if len(details) > 1 else ""
        rows.append([name, said["pass"], said["flag"], said["fail"], f"{worst}: {detail}{more}"])
        if said["fail"]:
            red.add(i)
    columns = [
        Column("guard", text, 0.17), Column("pass", whole, 0.06), Column("flag", whole, 0.06), Column("fail", whole, 0.06),
        Column("the worst that was said", text, 0.65),
    ]  # fmt: skip
    note = "flag: honest, but not the task's own figure; fail: the figure is not what it claims to be."
    return Table("guards", "Guards", columns, rows, note, red)


def growth(run: Run, i: int) -> Table:
    rows, fulls = [], [(row["step"], row["full"]) for row in run.evals]
    for n, op in enumerate(run.ops, 1):
        before = [f for step, f in fulls if step <= op["step"]]
        after = [f for step, f in fulls if step > op["step"]]
        how = "failed: rolled back" if str(op.get("event", "")).endswith("ERROR") else None
        done = op.get("delta_logits")
        rows.append(
            [
                n, op["name"], value(op["value"]), op["step"], op["tokens"], before[-1] if before else None, after[0] if after else None,
                op.get("params"), op.get("flops_per_token"), power(done) if done is not None else how,
            ]
        )  # fmt: skip
    columns = [
        Column("#", whole), Column("op", text, 0.2), Column("value", text, 0.13), Column("step", whole), Column("tokens", whole),
        Column("full before", fixed(4)), Column("after", fixed(4)), Column("params", whole), Column("FLOPs/token", whole),
        Column("Δ logits", text),
    ]  # fmt: skip
    note = "full at the last evaluation before the op, and at the first one after it. Δ logits: the largest change that the op itself made."
    return Table(f"growth_{i}", "The ops", columns, rows, note)


# -- appendix


def commands(e: Evidence) -> Table:
    given: dict[str, list[str]] = {}
    for run in e.runs:
        words = run.env.get("command", ["", "(not recorded)"])[1:]
        given.setdefault(" ".join(["mainrun", *map(shlex.quote, words)]), []).append(run.id)
    rows = [[command, few(ids, 8)] for command, ids in given.items()]
    note = "As env.json has them: those of the last sitting of each run. A ladder trains all of its steps."
    return Table(
        "commands", "Commands", [Column("command", text, 0.6), Column("runs", text, 0.4)], rows, note
    )


def hashes(e: Evidence) -> Table:
    rows = [
        [
            run.id, run.cfg.digest[:12], run.summary.get("weights", "")[:12], run.env.get("evaluate_hash", "")[:12],
            run.summary.get("versions", {}).get("mainrun", "")[:12], run.summary.get("tokenizer", "")[:12],
        ]
        for run in e.runs
    ]  # fmt: skip
    columns = [
        Column("run"),
        *(Column(h, text, 0.15) for h in ("config", "weights", "evaluate", "source", "tokenizer")),
    ]
    note = "The first 12 digits of each sha256; evaluate and source: the code that scored and that trained."
    return Table("hashes", "Hashes", columns, rows, note)


def fingerprints(e: Evidence) -> Table:
    seen: dict[tuple[str, ...], list[str]] = {}
    for run in e.runs:
        f, origin = run.summary["fingerprints"], run.summary.get("origin", {})
        key = (
            *(f.get(k, "")[:12] for k in ("corpus", "train", "dev", "val")),
            f"{run.cfg.corpus}, {run.cfg.num_titles:,} titles",
        )
        seen.setdefault((*key, str(origin.get("sha256", ""))[:12]), []).append(run.id)
    rows = [[*key, len(ids)] for key, ids in seen.items()]
    heads = ("corpus", "train", "dev", "val", "which titles", "file")
    return Table(
        "fingerprints",
        "Data fingerprints",
        [*(Column(h, text, 0.15) for h in heads), Column("runs", whole)],
        rows,
    )


def machines(e: Evidence) -> Table:
    """Machine classes and versions: every one that any sitting of a run was on."""
    seen: Counter[tuple[str, str]] = Counter()
    for run in e.runs:
        for kind, entries in (
            ("machine class", run.summary.get("machine_classes", [])),
            ("versions", run.summary.get("all_versions", [])),
        ):
            for entry in entries:
                shown = {k: (v[:12] if k == "mainrun" else v) for k, v in entry.items()}
                seen[kind, ", ".join(f"{k} {value(v)}" for k, v in shown.items())] += 1
    rows = [[kind, what, n] for (kind, what), n in sorted(seen.items())]
    return Table(
        "machines",
        "Machines and versions",
        [Column("kind", text, 0.15), Column("what", text, 0.77), Column("runs", whole, 0.08)],
        rows,
    )


# -- studies


def study(s: Study, i: int) -> list[Table]:
    states = Counter(str(t.get("state")) for t in s.trials)
    best = min(s.whole, key=lambda t: float(t["value"])) if s.whole else None
    facts: list[list[Any]] = [
        ["trials", f"{len(s.trials):,}: " + ", ".join(f"{n} {state}" for state, n in sorted(states.items()))]
    ]
    if best:
        facts.append(["best trial", f"{best['trial']}, value {float(best['value']):.4f}"])
    for key in (
        "preset",
        "objective",
        "set",
        "sampler",
        "budget",
        "rungs",
        "engine",
        "noise",
        "seeds",
        "base",
        "claim",
        "val",
    ):
        if (found := s.fact(key)) is not None:
            facts.append([key, told(found)])
    facts.append(["steps", ", ".join(f"{name} {n:,.0f}" for name, n in ledger(s).items()) or "not exported"])
    for rung, rho in (s.fact("rung_correlation") or {}).items():
        facts.append(
            [
                f"rung {rung}",
                "rank correlation with the last rung " + ("none" if rho is None else f"{rho:.2f}"),
            ]
        )
    made = [Table(f"study_{i}", "In short", [Column("fact", text, 0.15), Column("value", text, 0.85)], facts)]
    if isinstance(space := s.fact("space"), dict):
        rows = [[k, bounds(v), value(best.get(f"params.{k}")) if best else ""] for k, v in space.items()]
        columns = [Column("field", text, 0.3), Column("searched", text, 0.5), Column("best trial", text, 0.2)]
        made.append(Table(f"study_{i}_space", "Bounds", columns, rows))
    if confirmed := [c for c in s.fact("rows") or [] if isinstance(c, dict)]:
        rows = [
            [
                *(
                    c.get("trial"),
                    c.get("mean"),
                    c.get("difference"),
                    *(c.get("interval") or (None, None)),
                    c.get("p_holm"),
                ),
                "claimed" if c.get("claim") else c.get("why"),
                told(c.get("params")),
            ]
            for c in confirmed
        ]
        columns = [
            Column("trial", whole), Column("mean", fixed(4)), Column("difference", fixed(4, sign=True)), Column("low", fixed(4, sign=True)),
            Column("high", fixed(4, sign=True)), Column("p", chance), Column("verdict", text, 0.25), Column("what it sets", text, 0.35),
        ]  # fmt: skip
        note = "Against the base, on fresh paired seeds: interval and verdict as the study wrote them; p by Holm."
        made.append(Table(f"study_{i}_confirmation", "Confirmation", columns, rows, note))
    return made


def told(found: Any) -> str:
    """A table of settings in words: what is unset stays unsaid."""
    if isinstance(found, dict):
        return ", ".join(f"{k} {told(v)}" for k, v in found.items() if v not in (None, "", {}, []))
    if isinstance(found, (list, tuple)):
        return " ".join(map(told, found))
    return value(found)


def bounds(space: Any) -> str:
    if not isinstance(space, dict):
        return value(space)
    if space.get("values"):
        said = "one of " + ", ".join(value(v) for v in space["values"])
    else:
        said = f"{value(space.get('low'))} to {value(space.get('high'))}" + ", logarithmic" * bool(
            space.get("log")
        )
    when = space.get("when")
    return said + (f", when {told(when)}" if when else "")


def failures(e: Evidence, most: int = 30) -> Table | None:
    """Runs that failed a guard, trials that failed, ops that were rolled back."""
    rows: list[list[Any]] = [
        [run.id, "guard", f"{g['name']}: {g['detail']}"]
        for run in e.runs
        for g in run.summary["guards"]
        if g["status"] == "fail"
    ]
    for run in e.runs:
        for op in run.journal:
            if str(op.get("event", "")).endswith("ERROR"):
                rows.append(
                    [run.id, f"step {op['step']}", f"{op['name']} was rolled back: {value(op.get('checks'))}"]
                )
    for s in e.studies:
        failed = [t for t in s.trials if bad(t)]
        rows += [
            [f"{s.name}, trial {t['trial']}", str(t["state"]), str(t.get("reason") or "no reason given")]
            for t in failed[:most]
        ]
        if len(failed) > most:
            rows.append([s.name, "", f"and {len(failed) - most} more failed trials, in trials.parquet"])
    columns = [Column("what", text, 0.25), Column("where", text, 0.12), Column("why", text, 0.63)]
    return Table("failures", "Runs, trials and ops", columns, rows) if rows else None
