"""Draw the learning rate and the weight decay at each step of the plan that a run followed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reports.evidence.figures.axes import add_legend, format_ticks, panels
from reports.evidence.figures.series import coloured, short_names, thin
from reports.evidence.figures.style import COLOURS, MARKERS, line_style
from reports.evidence.load import ReportData, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"lr": "lr (of the matrices)", "weight_decay": "weight_decay"}
OPTIONAL = {"weight_decay_aux": "weight_decay_aux"}  # drawn only if a recipe sets the field


def caption(_: ReportData) -> str:
    return (
        "The learning rate and the weight decay of each step, by the plan that the run followed. "
        "Marks show growth ops."
    )


def draw(data: ReportData) -> Figure | None:
    drawn = [(recipe, place) for recipe, place in coloured(data) if place is not None]
    if not drawn:
        return None
    titles = dict(TITLES)
    for name, title in OPTIONAL.items():
        if any(is_set(recipe.valid_runs[0], name) for recipe, _ in drawn):
            titles[name] = title
    figure, panel = panels(2.3, 1, len(titles))
    names = short_names(data, [recipe for recipe, _ in drawn])
    for axes, (name, title) in zip(panel, titles.items(), strict=True):
        for recipe, place in drawn:
            draw_schedule(axes, recipe.valid_runs[0], name, place, names[recipe.name])
        axes.set(title=title, xlabel="step")
        axes.set_ylim(bottom=0)
        format_ticks(axes.xaxis)
        format_ticks(axes.yaxis)
    panel[0].set_ylabel("rate")
    panel[1].set_ylabel("decay, in units of 1 / rate")
    add_legend(figure, panel[0])
    return figure


def is_set(run: Run, name: str) -> bool:
    """Return whether the config of a run, or of one of its segments, sets an optional field."""
    return any(getattr(segment.cfg, name) is not None for segment in run.resolved.segments)


def draw_schedule(axes: Axes, run: Run, name: str, place: int, label: str) -> None:
    """Draw one value of the plan, such as the learning rate, at each step, and mark the growth ops."""
    plan = run.resolved
    steps = thin(range(plan.steps))
    values = [getattr(plan.at(step), name) for step in steps]
    axes.plot(np.array(steps) + 1, values, label=label, **line_style(place))
    for op in run.ops:
        step = min(op["step"], plan.steps - 1)
        value = getattr(plan.at(step), name)
        axes.plot(step, value, MARKERS[place], color=COLOURS[place], markersize=5, zorder=4)
