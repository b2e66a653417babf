"""The sentences of a report. Each is written from the numbers, and says less where the numbers say less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mainrun import stats
from mainrun.config import MIN_COVERAGE
from reports.evidence import tables
from reports.evidence.load import Evidence, Recipe, Run, Study
from reports.evidence.studies import importance, ledger
from reports.evidence.tables import fixed, whole

BUSY = 1.25  # runs of one recipe whose times differ by more were not alone on their machine


@dataclass(frozen=True)
class Claim:
    """What page 1 says of the two recipes."""

    kind: str  # better, worse, within noise, not sure, no claim
    text: str
    difference: stats.Difference | None = None


def claim(e: Evidence) -> Claim:
    a, b, noise = e.baseline, e.optimised, e.noise
    if a is None:
        return Claim("no claim", "No claim: no run was given, so there is nothing to compare.")
    if b is None:
        return Claim("no claim", f"No claim: {a.name} is the only recipe; a comparison needs a second one.")
    for recipe in (a, b):
        if not recipe.good:
            failed = sorted({name for run in recipe.runs for name in run.failed})
            return Claim(
                "no claim",
                f"No claim: every run of {recipe.name} failed a guard ({', '.join(failed)}), so it has no figure.",
            )
    d = stats.difference(a.scores, b.scores)
    size = f"{fixed(4, sign=True)(d.mean)} nats per character"
    if d.interval is None or noise is None:
        return Claim(
            "no claim",
            f"No claim: {a.name} was run with {seeds(d.n_a)} and {b.name} with {seeds(d.n_b)}, and what a seed alone changes is not known. "
            f"The difference is {size}; two seeds of each, better three, would back it.",
            d,
        )
    low, high = d.interval
    backing = f"95% interval {fixed(4, sign=True)(low)} to {fixed(4, sign=True)(high)}, {how(d)}"
    floor = f"the noise floor of {fixed(4)(noise.floor)}"
    if abs(d.mean) <= noise.floor:
        return Claim(
            "within noise",
            f"{b.name} is not better than {a.name} within noise: the difference of {size} is under {floor} ({backing}).",
            d,
        )
    if low <= 0 <= high:
        return Claim(
            "not sure",
            f"No claim: the difference of {size} is above {floor}, but its interval holds zero ({backing}).",
            d,
        )
    times = (
        f"{abs(d.mean) / noise.floor:.1f} times {floor}"
        if noise.floor
        else "with no noise between seeds at all"
    )
    if d.mean < 0:
        return Claim(
            "better",
            f"{b.name} is better than {a.name}: full falls by {fixed(4)(-d.mean)} ({backing}), {times}.",
            d,
        )
    return Claim(
        "worse", f"{b.name} is worse than {a.name}: full rises by {fixed(4)(d.mean)} ({backing}), {times}.", d
    )


def seeds(n: int) -> str:
    return "one seed" if n == 1 else f"{n} seeds"


def how(d: stats.Difference) -> str:
    return f"{len(d.seeds)} paired seeds" if d.paired else f"{d.n_a} and {d.n_b} seeds, not paired"


def cost(e: Evidence) -> str:
    a, b = e.baseline, e.optimised
    if a is None or b is None or not (a.good and b.good):
        return "Cost: there are no two recipes with a run that counts, so none is compared."
    said = [
        f"{times(mean(b, flops), mean(a, flops))} the FLOPs ({tables.power(mean(b, flops))} against {tables.power(mean(a, flops))})",
        f"{times(params(b), params(a))} the parameters ({whole(params(b))} against {whole(params(a))})",
    ]
    reused = [r.name for r in (a, b) if any(run.summary.get("ledger", {}).get("reused") for run in r.good)]
    classes = {tables.value(hardware(run)) for r in (a, b) for run in r.good}
    if reused:
        note = f"; time is not compared, since {' and '.join(reused)} took steps from the store"
    elif len(classes) > 1:
        note = "; time is not compared, since the runs were on different machines"
    else:
        said.append(
            f"{times(mean(b, seconds), mean(a, seconds))} the time ({mean(b, seconds):.1f} s against {mean(a, seconds):.1f} s)"
        )
        spread = max(max(map(seconds, r.good)) / min(map(seconds, r.good)) for r in (a, b))
        note = (
            f"; the same work took up to {spread:.1f} times as long in another run, so the machine was busy"
            if spread > BUSY
            else ""
        )
    return f"{b.name} takes {', '.join(said[:-1])} and {said[-1]} of {a.name}{note}."


def hardware(run: Run) -> dict[str, object]:
    """Of a machine class what is the machine's; the dtype, say, is the recipe's."""
    return {
        k: v
        for k, v in run.summary.get("machine_class", {}).items()
        if k in ("device", "instructions", "processes")
    }


def flops(run: Run) -> float:
    return float(run.summary["flops"])


def seconds(run: Run) -> float:
    return float(run.summary["seconds"])


def params(recipe: Recipe) -> int:
    return int(recipe.good[0].summary["params"])


def mean(recipe: Recipe, get: Callable[[Run], float]) -> float:
    return sum(map(get, recipe.good)) / len(recipe.good)


def times(a: float, b: float) -> str:
    return f"{a / b:.2f} times"


def ablated(e: Evidence) -> Iterator[str]:
    table = tables.ablation(e)
    if table is None:
        return
    steps = [row for row in table.rows if row[3] is not None]
    first, last = table.rows[0][0], table.rows[-1][0]
    best = min(steps, key=lambda row: row[3])
    backed = [row for row in steps if row[7] in ("better", "worse")]
    quiet = sum(row[7] == "within noise" for row in steps)
    text = f"Of the {len(steps)} steps from {first} to {last}, {best[0]} lowers full most ({fixed(4, sign=True)(best[3])}, {best[7]})"
    if best[3] >= 0:
        text = f"None of the {len(steps)} steps from {first} to {last} lowers full"
    if e.noise is None:
        yield text + "; with one seed a step, none of the changes is backed."
    else:
        backing = f"{len(backed)} of {len(steps)} changes are backed after Holm's correction"
        yield f"{text}; {backing}, {quiet} {'is' if quiet == 1 else 'are'} within noise."


def searched(study: Study) -> str:
    spent = ledger(study)
    lost = len(study.trials) - len(study.done)
    text = (
        f"The study {study.name} has {len(study.trials)} trials"
        + f", {lost} of them without a value" * bool(lost)
    )
    if said := study.fact("claim"):
        text += f": {said}"
    if found := importance(study):
        field, share = max(found.items(), key=lambda item: item[1])
        text += f"; {field} matters most (importance {share:.3f})"
    if spent.get("asked") and "trained" in spent:
        text += f"; of {whole(spent['asked'])} steps asked for, {whole(spent['trained'])} were trained"
    return text + "."


def covered(e: Evidence) -> str:
    """What the official score covers, and whether it may be compared."""
    share = [(run.summary["last"]["coverage"], run.id) for run in e.runs]
    if not share:
        return "No run was given, so no score is reported."
    low, which = min(share)
    if low < MIN_COVERAGE:
        return (
            f"The official score of {which} covers {100 * low:.1f}% of val, under {MIN_COVERAGE:.0%}: official figures are not compared "
            "here; full covers every token."
        )
    early = [run for run in e.runs if run.summary["best"]["step"] != run.summary["last"]["step"]]
    text = f"The official score covers at least {100 * low:.1f}% of val in every run. "
    if early:
        return (
            text
            + f"{len(early)} of {len(e.runs)} runs scored lower before their end; what counts is the last step."
        )
    return text + "The last evaluation of every run is also its lowest: no step was chosen."


def findings(e: Evidence) -> list[str]:
    """Three: whether it is better, what it costs, and the next that the inputs can tell."""
    return [claim(e).text, cost(e), [*ablated(e), *map(searched, e.studies), covered(e)][0]]
