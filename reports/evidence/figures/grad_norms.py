"""Draw the norm of the gradient of each layer at the first steps, one line per recipe."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from reports.evidence.figures.axes import add_legend, panels, tick_text
from reports.evidence.figures.series import coloured
from reports.evidence.figures.style import COLOURS, line_style
from reports.evidence.load import Recipe, ReportData

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Norms = dict[str, list[float]]  # the norms of each layer, one per logged step
MOST_TICKS = 20  # the maximum number of layers that have a tick
PAD = 1.6  # the factor by which the y axis exceeds the norms, so that at least one tick is shown


def caption(_: ReportData) -> str:
    return (
        "The norm of the gradient of each layer before clipping, at the first steps that the run logged "
        "(grad_norm_steps), of the first seed: the median over these steps, and a band from the lowest to "
        "the highest step. A layer that is not trained is left out. The gradient of a tied head counts as "
        "part of the embedding, and the final normalization counts as part of the head."
    )


def draw(data: ReportData) -> Figure | None:
    drawn = [(recipe, norms_of(recipe), index) for recipe, index in coloured(data)]
    drawn = [(recipe, norms, index) for recipe, norms, index in drawn if norms]
    if not drawn:
        return None
    figure, (axes,) = panels(2.5)
    blocks = max(len(norms) - 2 for _, norms, _ in drawn)
    for recipe, norms, index in drawn:
        steps = len(norms["embedding"])
        draw_norms(axes, norms, blocks, index, f"{recipe.name}, {steps} {'step' if steps == 1 else 'steps'}")
    axes.set(xlabel="layer", ylabel="gradient norm", yscale="log")
    every = math.ceil(blocks / MOST_TICKS)
    shown = range(0, blocks, every)
    axes.set_xticks([-1, *shown, blocks], ["embedding", *map(str, shown), "head"])
    set_norm_ticks(axes.yaxis, [norm for _, norms, _ in drawn for row in norms.values() for norm in row])
    add_legend(figure, axes)
    return figure


def norms_of(recipe: Recipe) -> Norms:
    """Return the logged norms of the first valid run that has them, or an empty dict.

    If the model grows during these steps, only the steps before the number of layers changes are used.
    """
    for run in recipe.valid_runs:
        logged = [row["grad_norms"] for row in run.steps if "grad_norms" in row]
        rows = [row for row in logged if list(row) == layers(len(logged[0]))]
        if rows:
            return {name: [row[name] for row in rows] for name in rows[0]}
    return {}


def layers(count: int) -> list[str]:
    """Return the names of all layers of a model, as metrics.jsonl contains them."""
    return ["embedding", *(f"block_{i}" for i in range(count - 2)), "head"]


def draw_norms(axes: Axes, norms: Norms, blocks: int, index: int | None, label: str) -> None:
    """Draw the norms of one run. The head is at the right end, after the last block of the deepest model."""
    x = [-1, *range(len(norms) - 2), blocks]
    values = np.array(list(norms.values()), dtype=float)
    values[values == 0] = np.nan  # a logarithmic axis cannot show the layers that are not trained
    axes.plot(x, np.median(values, axis=1), marker=".", label=label, **line_style(index))
    if index is not None:
        low, high = values.min(axis=1), values.max(axis=1)
        axes.fill_between(x, low, high, color=COLOURS[index], alpha=0.2, linewidth=0)


def set_norm_ticks(axis: Axis, norms: Sequence[float]) -> None:
    """Set the limits and the ticks of a logarithmic axis: 1, 2 and 5 of each decade, or only 1 of many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    positive = [norm for norm in norms if norm > 0] or [1.0]
    low, high = min(positive) / PAD, max(positive) * PAD
    axis.axes.set_ylim(low, high)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(tick_text))
