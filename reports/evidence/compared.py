"""Decide which two things page 1 compares: two recipes, or the best trial of a study with its base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reports.evidence import findings
from reports.evidence.figures.series import short_names
from reports.evidence.load import Recipe, ReportData, Study
from reports.evidence.studies import objective


@dataclass(frozen=True)
class Comparison:
    """Two scores, their difference, and how sure it is."""

    names: tuple[str, str]
    scores: tuple[float, float]
    seeds: tuple[str, str]  # the seeds behind each score, as text
    mean: float | None  # the second score minus the first one, over the seeds that count
    interval: tuple[float, float] | None
    backing: str  # says what the interval is based on
    floor: float | None  # the noise floor of the difference
    score: str  # the name of the score

    @property
    def mean_or_zero(self) -> float:
        return self.mean or 0.0


def comparison(data: ReportData) -> Comparison | None:
    """Return the comparison of page 1, or None if the inputs have nothing to compare."""
    if data.baseline is not None:
        return of_recipes(data)
    for study in data.studies:
        compared = of_study(study)
        if compared is not None:
            return compared
    return None


def of_recipes(data: ReportData) -> Comparison | None:
    change = findings.claim(data).difference
    base, other = data.baseline, data.optimised
    if change is None or base is None or other is None:
        return None
    names = short_names(data, [base, other])
    floor = None
    if data.noise is not None:
        floor = data.noise.floor
    return Comparison(
        names=(names[base.name], names[other.name]),
        scores=(change.a, change.b),
        seeds=(seeds_text(base, change.seeds), seeds_text(other, change.seeds)),
        mean=change.mean,
        interval=change.interval,
        backing=findings.describe_seeds(change),
        floor=floor,
        score="full",
    )


def seeds_text(recipe: Recipe, paired: tuple[int, ...]) -> str:
    """Return the seeds behind the score of a recipe as text, such as "3 seeds: 1, 2, 3"."""
    return list_seeds(paired or sorted(recipe.scores))


def list_seeds(seeds: Any) -> str:
    listed = list(map(str, seeds))
    if len(listed) > 6:
        listed = [*listed[:5], "…"]
    return f"{findings.count_seeds(len(seeds))}: {', '.join(listed)}".replace("one seed:", "seed")


def of_study(study: Study) -> Comparison | None:
    """Compare the best confirmed trial of a study with the base, on the seeds of the confirmation."""
    rows = [row for row in study.fact("rows") or [] if isinstance(row, dict)]
    rows = [row for row in rows if row.get("difference") is not None and row.get("mean") is not None]
    if not rows:
        return None
    winner = study.fact("winner")
    best = next((row for row in rows if row.get("trial") == winner), rows[0])
    difference = float(best["difference"])
    low, high = best.get("interval") or (None, None)
    interval = None
    if low is not None and high is not None:
        interval = (float(low), float(high))
    noise = study.fact("noise") or {}
    seeds = study.fact("seeds")
    text = "new seeds"
    if isinstance(seeds, list) and seeds:
        text = list_seeds(seeds)
    return Comparison(
        names=(f"base of the study {study.name}", f"trial {best.get('trial')}"),
        scores=(float(best["mean"]) - difference, float(best["mean"])),
        seeds=(text, text),
        mean=difference,
        interval=interval,
        backing="new paired seeds, as the study recorded it",
        floor=_number(noise.get("floor")) if isinstance(noise, dict) else None,
        score=objective(study),
    )


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return None
