"""Write the sentences of a report. The strength of each claim depends on the strength of the evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mainrun import stats
from mainrun.config import MIN_COVERAGE
from mainrun.ui.compare import scientific
from reports.evidence import tables
from reports.evidence.load import Recipe, ReportData, Run, Study, shorten
from reports.evidence.studies import importance, ledger
from reports.evidence.tables import fixed, get_flops, get_seconds, integer

# If the training times of two runs of one recipe differ by more than the factor BUSY, the report says that
# the machine was busy.
BUSY = 1.25


@dataclass(frozen=True)
class Claim:
    """The claim on page 1 of a report, which compares the optimized recipe with the baseline."""

    kind: str  # "better", "worse", "within noise", "not sure" or "no claim"
    text: str
    difference: stats.Difference | None = None


def claim(data: ReportData) -> Claim:
    """Compare the scores of the optimized recipe and the baseline, and return the claim."""
    base = data.baseline
    other = data.optimised
    if base is None:
        return Claim("no claim", "No claim: no run was given, so there is nothing to compare.")
    if other is None:
        return Claim(
            "no claim", f"No claim: {base.name} is the only recipe; a comparison needs a second one."
        )
    for recipe in (base, other):
        if not recipe.valid_runs:
            failed = sorted({name for run in recipe.runs for name in run.failed_guards})
            text = f"every run of {recipe.name} failed a guard ({', '.join(failed)}), so it has no figure."
            return Claim("no claim", f"No claim: {text}")
    change = stats.difference(base.scores, other.scores)
    if change.interval is None or data.noise is None:
        text = (
            f"No claim: {base.name} was run with {count_seeds(change.n_a)} and {other.name} with "
            f"{count_seeds(change.n_b)}, so the effect of the seed alone is not known. The difference is "
            f"{_signed(change.mean)} nats per character; two seeds of each, or better three, would support "
            "it."
        )
        return Claim("no claim", text, change)
    kind, text = _judge(base.name, other.name, change, change.interval, data.noise)
    return Claim(kind, text, change)


def _judge(
    base: str, other: str, change: stats.Difference, interval: tuple[float, float], noise: stats.Noise
) -> tuple[str, str]:
    """Return the kind and the text of a claim, based on a confidence interval and the noise floor."""
    low, high = interval
    size = f"{_signed(change.mean)} nats per character"
    backing = f"95% interval {_signed(low)} to {_signed(high)}, {describe_seeds(change)}"
    floor = f"the noise floor of {fixed(4)(noise.floor)}"
    if abs(change.mean) <= noise.floor:
        text = (
            f"{other} is no better than {base}, within the noise: the difference of {size} is under {floor}"
        )
        return "within noise", f"{text} ({backing})."
    if low <= 0 <= high:
        text = f"No claim: the difference of {size} is above {floor}, but its interval contains zero"
        return "not sure", f"{text} ({backing})."
    ratio = "with no noise between seeds at all"
    if noise.floor:
        ratio = f"{abs(change.mean) / noise.floor:.1f} times {floor}"
    size = fixed(4)(abs(change.mean))
    if change.mean < 0:
        return "better", f"{other} is better than {base}: full falls by {size} ({backing}), {ratio}."
    return "worse", f"{other} is worse than {base}: full rises by {size} ({backing}), {ratio}."


def _signed(number: float) -> str:
    return fixed(4, sign=True)(number)


def count_seeds(count: int) -> str:
    if count == 1:
        return "one seed"
    return f"{count} seeds"


def describe_seeds(change: stats.Difference) -> str:
    """Describe how many seeds a comparison has, and whether the seeds are paired."""
    if change.paired:
        return f"{len(change.seeds)} paired seeds"
    return f"{change.n_a} and {change.n_b} seeds, not paired"


def cost(data: ReportData) -> str:
    """Return a sentence that compares the FLOPs, the parameters and the time of the two main recipes."""
    base = data.baseline
    other = data.optimised
    if base is None or other is None or not (base.valid_runs and other.valid_runs):
        return "Cost: not compared, because there are no two recipes with a valid run."
    flops = _mean(base, get_flops), _mean(other, get_flops)
    params = _params(base), _params(other)
    parts = [
        f"{_times(flops)} the FLOPs ({scientific(flops[1])} against {scientific(flops[0])})",
        f"{_times(params)} the parameters ({integer(params[1])} against {integer(params[0])})",
    ]
    obstacle = time_obstacle(base, other)
    note = ""
    if obstacle:
        note = f"; time is not compared, since {obstacle}"
    else:
        seconds = _mean(base, get_seconds), _mean(other, get_seconds)
        parts.append(f"{_times(seconds)} the time ({seconds[1]:.1f} s against {seconds[0]:.1f} s)")
        spread = max(_time_spread(base), _time_spread(other))
        if spread > BUSY:
            note = (
                f"; the same work took up to {spread:.1f} times as long in another run, "
                "so the machine was busy"
            )
    return f"{other.name} takes {', '.join(parts[:-1])} and {parts[-1]} of {base.name}{note}."


def _times(values: tuple[float, float]) -> str:
    """Format the ratio of the second value to the first value as text, such as "0.50 times"."""
    first, second = values
    return f"{second / first:.2f} times"


def time_obstacle(base: Recipe, other: Recipe) -> str:
    """Return the reason why the times of two recipes cannot be compared, or an empty string."""
    reused = [recipe.name for recipe in (base, other) if not all(map(tables.is_fresh, recipe.valid_runs))]
    if reused:
        return f"{' and '.join(reused)} took steps from the store"
    first, *others = map(_hardware, (*base.valid_runs, *other.valid_runs))
    if others.count(first) < len(others):
        return "the runs were on different machines"
    return ""


def _hardware(run: Run) -> dict[str, object]:
    """Return the part of a run's machine class that describes the hardware.

    The dtype is left out, because the dtype is part of the recipe.
    """
    machine = run.summary.get("machine_class", {})
    return {name: machine[name] for name in machine if name in ("device", "instructions", "processes")}


def _time_spread(recipe: Recipe) -> float:
    """Return the time of a recipe's slowest run, divided by the time of the recipe's fastest run."""
    seconds = list(map(get_seconds, recipe.valid_runs))
    return max(seconds) / min(seconds)


def _params(recipe: Recipe) -> int:
    return int(recipe.valid_runs[0].summary["params"])


def _mean(recipe: Recipe, get: Callable[[Run], float]) -> float:
    return sum(map(get, recipe.valid_runs)) / len(recipe.valid_runs)


def ablation_sentences(data: ReportData) -> Iterator[str]:
    """Yield a sentence about the ablation if the report has an ablation."""
    table = tables.ablation(data)
    if table is None:
        return
    first, *steps = [dict(zip(table.heads, row, strict=True)) for row in table.rows]
    best = min(steps, key=lambda step: step["delta"])
    which = f"the {len(steps)} steps from {first['step']} to {steps[-1]['step']}"
    text = f"Of {which}, {best['step']} lowers full most ({_signed(best['delta'])}, {best['verdict']})"
    if best["delta"] >= 0:
        text = f"None of {which} lowers full"
    if data.noise is None:
        yield f"{text}; with one seed per step, none of the changes is backed."
        return
    verdicts = [step["verdict"] for step in steps]
    backed = verdicts.count("better") + verdicts.count("worse")
    quiet = verdicts.count("within noise")
    verb = "is" if quiet == 1 else "are"
    yield (
        f"{text}; {backed} of {len(steps)} changes are backed after Holm's correction, "
        f"{quiet} {verb} within noise."
    )


def study_sentence(study: Study) -> str:
    """Return a sentence about the trials, the claim, the most important field and the steps of a study."""
    text = f"The study {study.name} has {len(study.trials)} trials"
    without_value = len(study.trials) - len(study.scored)
    if without_value:
        text += f", {without_value} of them without a value"
    claimed = study.fact("claim")
    if claimed:
        text += f": {claimed}"
    shares = importance(study)
    if shares:
        field = max(shares, key=shares.__getitem__)
        text += f"; {field} matters most (importance {shares[field]:.3f})"
    steps = ledger(study)
    if steps.get("asked") and "trained" in steps:
        text += f"; of {integer(steps['asked'])} steps requested, {integer(steps['trained'])} were trained"
    return f"{text}."


def study_details(study: Study) -> list[str]:
    """Return a sentence about the best trial, and one about what the confirmation found."""
    sentences = []
    if study.completed:
        best = min(study.completed, key=lambda trial: float(trial["value"]))
        sentences.append(
            f"Trial {best['trial']} has the lowest value of the {len(study.completed)} trials that were "
            f"trained to the end, {fixed(4)(float(best['value']))}."
        )
    rows = [row for row in study.fact("rows") or [] if isinstance(row, dict)]
    if rows:
        claimed = sum(bool(row.get("claim")) for row in rows)
        verb = "is" if claimed == 1 else "are"
        sentences.append(
            f"Of {len(rows)} confirmed trials, {claimed} {verb} claimed to be better than the base."
        )
    else:
        sentences.append("No trial was confirmed with new seeds, so the best value is too good by chance.")
    return sentences


def guard_sentence(data: ReportData) -> str:
    """Return a sentence about the guards of all runs."""
    failed = [run.id for run in data.runs if run.failed_guards]
    flagged = 0
    for run in data.runs:
        flagged += any(guard["status"] == "flag" for guard in run.summary["guards"])
    guards = max(len(run.summary["guards"]) for run in data.runs)
    if failed:
        return f"{len(failed)} of {len(data.runs)} runs failed a guard and do not count: {shorten(failed)}."
    text = f"No run failed any of the {guards} guards"
    if flagged:
        text += (
            f"; {flagged} of {len(data.runs)} runs are flagged, so they do not compare with the task's score"
        )
    return f"{text}."


def coverage_sentence(data: ReportData) -> str:
    """Return one or two sentences about the part of the val split that the official score covers."""
    if not data.runs:
        return "No run was given, so no score is reported."
    lowest = min(data.runs, key=lambda run: (run.summary["last"]["coverage"], run.id))
    coverage = lowest.summary["last"]["coverage"]
    if coverage < MIN_COVERAGE:
        return (
            f"The official score of {lowest.id} covers {100 * coverage:.1f}% of val, under "
            f"{MIN_COVERAGE:.0%}: official figures are not compared in this report; full covers every "
            "token."
        )
    text = f"The official score covers at least {100 * coverage:.1f}% of val in every run."
    early = 0
    for run in data.runs:
        if run.summary["best"]["step"] != run.summary["last"]["step"]:
            early += 1
    if early:
        text += f" {early} of {len(data.runs)} runs scored lower before their end; only the last step counts."
        return text
    return f"{text} The last evaluation of every run is also its lowest: no step was chosen."


def findings(data: ReportData) -> list[str]:
    """Return the three findings of page 1: the claim, the comparison of the cost, and one other finding."""
    others = [*ablation_sentences(data), *map(study_sentence, data.studies), coverage_sentence(data)]
    return [claim(data).text, cost(data), others[0]]
