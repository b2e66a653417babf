"""Compute the numbers of a run for the axes of figures, and draw the lines of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from reports.evidence.figures.style import COLOURS, MOST, line_style
from reports.evidence.load import Recipe, ReportData, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 400  # the maximum number of points of a line on the page
Series = Callable[[Run], Sequence[float]]


def column(rows: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows]


def full(run: Run) -> list[float]:
    """Return the full score at each evaluation."""
    return column(run.evals, "full")


def steps(run: Run) -> list[int]:
    """Return the step of each evaluation."""
    return column(run.evals, "step")


def tokens(run: Run) -> list[float]:
    """Return the number of tokens trained up to each evaluation."""
    counts = dict(zip(column(run.steps, "step"), column(run.steps, "tokens"), strict=True))
    return [counts.get(step, run.resolved.tokens(step)) for step in steps(run)]


def seconds(run: Run) -> list[float]:
    """Return the seconds spent in steps and evaluations up to each evaluation."""
    total = 0.0
    totals = []
    for row in run.rows:
        total += float(row.get("seconds") or 0.0)
        if row["event"] == "eval" and row["split"] == "val":
            totals.append(total)
    return totals


def flops(run: Run) -> list[float]:
    """Return the FLOPs at each evaluation. For old runs, they are estimated from the tokens."""
    total = float(run.summary["flops"])
    totals = []
    for row, count in zip(run.evals, tokens(run), strict=True):
        totals.append(float(row.get("flops") or total * count / run.summary["tokens"]))
    return totals


def full_scores(recipes: Iterable[Recipe]) -> list[float]:
    """Return the full scores of all evaluations of some recipes, for the limits of an axis."""
    scores: list[float] = []
    for recipe in recipes:
        for run in recipe.valid_runs:
            scores += full(run)
    return scores


def thin(values: Sequence[Any]) -> list[Any]:
    """Return about POINTS evenly spaced values, always including the last value."""
    every = math.ceil(len(values) / POINTS)
    return [*values[:-1:every], *values[-1:]]


def headline_pair(data: ReportData) -> list[Recipe]:
    """Return the baseline and the optimized recipe, if they have valid runs."""
    return [recipe for recipe in (data.baseline, data.optimised) if recipe is not None and recipe.valid_runs]


def coloured(data: ReportData) -> list[tuple[Recipe, int | None]]:
    """Return the recipes to draw, each with its place in the palette.

    The two recipes of the headline come first in the palette. If there are too many recipes, all others have
    the place None. They are drawn first, in grey.
    """
    pair = headline_pair(data)
    others = [recipe for recipe in data.recipes if recipe.valid_runs and recipe not in pair]
    if len(pair) + len(others) <= MOST:
        return list(zip([*pair, *others], range(MOST), strict=False))
    return [*zip(others, repeat(None), strict=False), *zip(pair, range(MOST), strict=False)]


def draw_recipe(axes: Axes, recipe: Recipe, x: Series, y: Series, place: int | None) -> None:
    """Draw the mean over the seeds, and a band from the lowest to the highest seed.

    If the seeds were evaluated at different steps, draw one line per seed.
    """
    label = None
    if place is not None:
        label = recipe.name
    schedules = {tuple(steps(run)) for run in recipe.valid_runs}
    if len(schedules) > 1:
        for run in recipe.valid_runs:
            axes.plot(x(run), y(run), label=label, **line_style(place))
            label = None
        return
    xs = np.mean(list(map(x, recipe.valid_runs)), axis=0)
    ys = np.array(list(map(y, recipe.valid_runs)))
    axes.plot(xs, ys.mean(axis=0), label=label, **line_style(place))
    if place is not None and len(ys) > 1:
        colour = COLOURS[place]
        axes.fill_between(xs, ys.min(axis=0), ys.max(axis=0), color=colour, alpha=0.25, linewidth=0)
