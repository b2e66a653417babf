"""Compute the values that figures show for a run, and draw the lines of a recipe."""

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

POINTS = 400  # the approximate maximum number of points in a line of a figure
Series = Callable[[Run], Sequence[float]]


def column(rows: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows]


def full(run: Run) -> list[float]:
    """Return the full score of a run at each evaluation."""
    return column(run.evals, "full")


def steps(run: Run) -> list[int]:
    """Return the step of each evaluation of a run."""
    return column(run.evals, "step")


def tokens(run: Run) -> list[float]:
    """Return the number of tokens that a run has trained on at each evaluation."""
    counts = dict(zip(column(run.steps, "step"), column(run.steps, "tokens"), strict=True))
    return [counts.get(step, run.resolved.tokens(step)) for step in steps(run)]


def seconds(run: Run) -> list[float]:
    """Return the number of seconds that a run has spent on training and evaluation at each evaluation."""
    total = 0.0
    totals = []
    for row in run.rows:
        total += float(row.get("seconds") or 0.0)
        if row["event"] == "eval" and row["split"] == "val":
            totals.append(total)
    return totals


def flops(run: Run) -> list[float]:
    """Return the number of FLOPs that a run has used at each evaluation.

    If an old run did not record FLOPs at evaluations, the FLOPs are estimated from the number of tokens.
    """
    total = float(run.summary["flops"])
    totals = []
    for row, count in zip(run.evals, tokens(run), strict=True):
        totals.append(float(row.get("flops") or total * count / run.summary["tokens"]))
    return totals


def full_scores(recipes: Iterable[Recipe]) -> list[float]:
    """Return the full scores of all evaluations of several recipes, to choose the limits of an axis."""
    scores: list[float] = []
    for recipe in recipes:
        for run in recipe.valid_runs:
            scores += full(run)
    return scores


def thin(values: Sequence[Any]) -> list[Any]:
    """Reduce a sequence to about POINTS evenly spaced values. The last value is always included."""
    every = math.ceil(len(values) / POINTS)
    return [*values[:-1:every], *values[-1:]]


def headline_pair(data: ReportData) -> list[Recipe]:
    """Return the baseline and the optimized recipe. A recipe without valid runs is left out."""
    return [recipe for recipe in (data.baseline, data.optimised) if recipe is not None and recipe.valid_runs]


def coloured(data: ReportData) -> list[tuple[Recipe, int | None]]:
    """Return the recipes to draw, each with an index into the color palette.

    The baseline and the optimized recipe get the first colors. If there are more recipes than colors, all
    other recipes have the index None and are drawn first, in gray.
    """
    pair = headline_pair(data)
    others = [recipe for recipe in data.recipes if recipe.valid_runs and recipe not in pair]
    if len(pair) + len(others) <= MOST:
        return list(zip([*pair, *others], range(MOST), strict=False))
    return [*zip(others, repeat(None), strict=False), *zip(pair, range(MOST), strict=False)]


def short_names(data: ReportData, recipes: Sequence[Recipe], limit: int = 40) -> dict[str, str]:
    """Return a short name for each recipe: the settings that all of these recipes share are left out.

    A name that is still too long becomes the preset and the number of the recipe in the table of recipes.
    """
    parts = [recipe.name.split() for recipe in recipes]
    shared = set(parts[0][1:]).intersection(*parts) if len(parts) > 1 else set()
    names: dict[str, str] = {}
    for recipe, words in zip(recipes, parts, strict=True):
        name = " ".join([words[0], *(word for word in words[1:] if word not in shared)])
        if len(name) > limit:
            name = f"{words[0][: limit - 5]} #{data.numbers[recipe.name]}"
        names[recipe.name] = name
    return names


def draw_recipe(axes: Axes, recipe: Recipe, x: Series, y: Series, place: int | None, name: str = "") -> None:
    """Draw the mean over the seeds of a recipe, and a band between the lowest and the highest value.

    `name` is the label of the recipe in the legend, if this is not the name of the recipe.

    If the runs of the recipe were evaluated at different steps, draw one line per run instead.
    """
    label = None
    if place is not None:
        label = name or recipe.name
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
