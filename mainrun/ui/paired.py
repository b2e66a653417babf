"""Test claims about pairs of recipes over the seeds that both recipes have in common.

Each claim is a paired t-test of one recipe against another. The p-values and the intervals of all claims are
adjusted together by Holm's method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, NamedTuple

from mainrun.config import TrainConfig
from mainrun.errors import LONGEST_GUESS, RunError, UsageError
from mainrun.files.inputs import printable, shown
from mainrun.stats import LEVEL, Difference, difference, holm, holm_levels
from mainrun.ui.compare import show_table
from mainrun.ui.grouping import contradictions, failed_guards, group_by_recipe, runs_by_seed

if TYPE_CHECKING:
    from rich.console import Console

Scores = dict[int, float]  # maps the seed of each run of a recipe to the score `full` of its last step
HEAD = ("other", "base", "n", "other full", "base full", "difference", "low", "high", "p", "result")


class Claim(NamedTuple):
    """The claim that the scores of `other` are lower than the scores of `base` by more than a margin."""

    base: str
    other: str
    margin: float


class RunScore(NamedTuple):
    cfg: TrainConfig
    summary: Mapping[str, Any]


def judge_claims(runs: Sequence[RunScore], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Test the claims in `texts`, which have the form BASE,OTHER or BASE,OTHER,MARGIN.

    Return one row per claim. A negative difference means that the scores of OTHER are lower, thus better.
    """
    recipes = _scores_of_recipes(runs)
    claims = [_parse(text, list(recipes)) for text in texts]
    _check_distinct(claims)
    differences = [_paired_difference(claim, recipes) for claim in claims]
    rows = [_row(claim, change, recipes) for claim, change in zip(claims, differences, strict=True)]
    ps = [row["p"] for row in rows]
    adjusted = zip(rows, claims, differences, holm(ps), holm_levels(ps), strict=True)
    for row, claim, change, p, level in adjusted:
        row |= {"p_holm": p, "confidence": level, "interval": change.interval_of(level)}
        row["result"] = _result(claim, change.mean, p)
    return rows


def _row(claim: Claim, change: Difference, recipes: Mapping[str, Scores]) -> dict[str, Any]:
    """Return the facts about a claim that do not depend on the other claims."""
    left_out = {}
    for name in (claim.base, claim.other):
        left_out[name] = sorted(recipes[name].keys() - set(change.seeds))
    return {
        "base": claim.base,
        "other": claim.other,
        "margin": claim.margin,
        "n": len(change.seeds),
        "seeds": list(change.seeds),
        "seeds_left_out": left_out,
        "full_base": change.a,
        "full_other": change.b,
        "difference": change.mean,
        "p": change.p_of(-claim.margin),
    }


def _scores_of_recipes(runs: Sequence[RunScore]) -> dict[str, Scores]:
    """Return the scores of each recipe. Raise RunError if the runs cannot support a claim."""
    _check_same_train(runs)
    recipes: dict[str, Scores] = {}
    for name, of_recipe in group_by_recipe(runs, lambda run: run.cfg):
        if name in recipes:
            raise RunError(
                f"two recipes are called {printable(name)}, although their configs differ; "
                "compare them in two separate commands"
            )
        for run in of_recipe:
            _check_guards(run)
        by_seed = runs_by_seed(of_recipe)
        for fault in contradictions(name, by_seed, lambda run: str(run.summary["run"])):
            raise RunError(fault)
        recipes[name] = {seed: same[0].summary["last"]["full"] for seed, same in by_seed.items()}
    return recipes


def _check_same_train(runs: Sequence[RunScore]) -> None:
    """Raise RunError if the runs were trained on different titles. Old summaries lack the fingerprint."""
    sources: dict[str, str] = {}
    for run in runs:
        train = run.summary["fingerprints"].get("train")
        if train is not None:
            sources.setdefault(train, run.summary["run"])
    if len(sources) > 1:
        (train, first), (other_train, other) = list(sources.items())[:2]
        raise RunError(
            f"{first} and {other} were trained on different titles: train fingerprint {train[:12]} against "
            f"{other_train[:12]}; test claims about runs with the same titles and the same dev_frac"
        )


def _check_guards(run: RunScore) -> None:
    failed = failed_guards(run.summary)
    if failed:
        raise RunError(
            f"{run.summary['run']} failed the guard {failed[0]}, so its score is not valid; leave the run out"
        )


def _parse(text: str, recipes: Sequence[str]) -> Claim:
    """Read a value of `--paired`."""
    base, other, margin = parse_pair("--paired", text, recipes, "BASE,OTHER or BASE,OTHER,MARGIN")
    return Claim(base, other, _margin(text, margin))


def parse_pair(option: str, text: str, recipes: Sequence[str], form: str) -> tuple[str, str, str]:
    """Return two recipes that an option names, and the rest of its value after the next comma.

    The parts of a name may be in any order. Names may contain commas.
    """
    named = {_parts(name): name for name in recipes}
    pieces = text.split(",")
    for i in range(1, len(pieces)):
        base = named.get(_parts(",".join(pieces[:i])))
        if base is None:
            continue
        for j in range(i + 1, len(pieces) + 1):
            other = named.get(_parts(",".join(pieces[i:j])))
            if other is None:
                continue
            if base == other:
                raise UsageError(
                    f"got {option} {shown(text)}, which compares a recipe with itself; give two recipes"
                )
            return base, other, ",".join(pieces[j:]).strip()
    unknown = [piece for piece in pieces if _parts(piece) not in named]
    listed = "; ".join(map(printable, _closest_first(unknown, recipes)))
    raise UsageError(f"got {option} {shown(text)}; give {form} with two recipes of the given runs: {listed}")


def _parts(name: str) -> tuple[str, ...]:
    """Return the words of a recipe's name in a fixed order, such as a preset and the fields that differ."""
    return tuple(sorted(name.split()))


def _closest_first(unknown: Sequence[str], recipes: Sequence[str]) -> list[str]:
    """Return the names of recipes, beginning with the one that is most similar to an unknown name."""

    def similarity(name: str) -> float:
        return max(
            (SequenceMatcher(None, piece[:LONGEST_GUESS], name).ratio() for piece in unknown), default=0
        )

    return sorted(recipes, key=similarity, reverse=True)


def _margin(text: str, number: str) -> float:
    if not number:
        return 0.0
    try:
        margin = float(number)
    except ValueError:
        margin = math.nan
    if not 0 <= margin < math.inf:
        raise UsageError(
            f"got --paired {shown(text)}, whose margin is not a number of nats per character; "
            "give a margin of 0 or more, such as 0.02"
        )
    return margin


def _check_distinct(claims: Sequence[Claim]) -> None:
    """Raise UsageError if two claims have the same recipes, because Holm's method would count both."""
    pairs = [{claim.base, claim.other} for claim in claims]
    for i, pair in enumerate(pairs):
        if pair in pairs[:i]:
            names = printable(" and ".join(sorted(pair)))
            raise UsageError(f"--paired compares {names} twice; give each pair of recipes once")


def _paired_difference(claim: Claim, recipes: Mapping[str, Scores]) -> Difference:
    base = recipes[claim.base]
    other = recipes[claim.other]
    change = difference(base, other)
    if not change.paired:
        seeds = []
        for name in (claim.base, claim.other):
            numbers = ", ".join(map(str, sorted(recipes[name])))
            seeds.append(f"{printable(name)} are {numbers}")
        raise RunError(
            "a paired difference needs at least two seeds that both recipes have, but the seeds of "
            f"{' and of '.join(seeds)}; train both recipes with the same seeds"
        )
    return change


def _result(claim: Claim, mean: float, p: float) -> str:
    """Describe what the data prove about a claim. `p` is adjusted for the number of claims."""
    if p >= 1 - LEVEL:
        return "not proved"
    if not claim.margin:
        return "better" if mean < 0 else "worse"
    if mean < -claim.margin:
        return f"better by >{claim.margin:g}"
    return f"not better by {claim.margin:g}"


# -- the table


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the table of the claims and its notes."""
    show_table(list(HEAD), [_cells(row) for row in rows], console)
    for note in _notes(rows):
        console.print(note, soft_wrap=True, markup=False)


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    p = "<0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}"
    return [
        printable(row["other"]),
        printable(row["base"]),
        str(row["n"]),
        f"{row['full_other']:.4f}",
        f"{row['full_base']:.4f}",
        f"{row['difference']:+.4f}",
        f"{low:+.4f}",
        f"{high:+.4f}",
        p,
        row["result"],
    ]


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    notes = [
        "Both scores are the mean of full at the last step, over the n seeds that both recipes have. The "
        "difference is the score of other minus the score of base, so a negative difference means that other "
        "is better. low and high are the t interval of the mean paired difference.",
    ]
    if len(rows) > 1:
        notes.append(f"p and the intervals are adjusted over {len(rows)} claims by Holm's method.")
    if any(row["margin"] for row in rows):
        notes.append(
            "p tests the difference -margin, so the interval excludes -margin if and only if p is below 0.05."
        )
    for row in rows:
        for name, seeds in row["seeds_left_out"].items():
            if seeds:
                partner = row["other"] if name == row["base"] else row["base"]
                notes.append(_left_out(name, partner, seeds))
    return notes


def _left_out(name: str, partner: str, seeds: Sequence[int]) -> str:
    """Say which seeds of a recipe were not compared with another recipe."""
    if len(seeds) == 1:
        subject = f"seed {seeds[0]} was left out"
        object = "this seed"
    else:
        subject = f"seeds {', '.join(map(str, seeds[:-1]))} and {seeds[-1]} were left out"
        object = "these seeds"
    return f"{printable(name)}: {subject}, because {printable(partner)} has no run with {object}"
