"""Draw the scores of recipes, or of the trials of a study, against the FLOPs of a forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mainrun.stats import frontier
from mainrun.ui.compare import compact
from reports.evidence.figures.axes import add_legend, format_cost_ticks, format_ticks, panels, set_title
from reports.evidence.figures.series import coloured, column, short_names
from reports.evidence.figures.style import COLOURS, GREY, MARKERS, WIDTH
from reports.evidence.load import ReportData, Study
from reports.evidence.studies import objective, values
from reports.evidence.tables import get_forward_flops, mean_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDY_CAPTION = (
    "Each finished trial's value against the forward FLOPs per token of its model, if each routed layer "
    "selects the share capacity. The line joins the trials that score better than all cheaper trials."
)
NEEDS = "two finished trials with different forward FLOPs"
LABEL = "forward FLOPs per token"


def caption(_: ReportData) -> str:
    return (
        "Full score of val at the last step against the FLOPs of a forward pass per token. Each point is a "
        "run that passed its guards. The line joins the means of the recipes that score better than all "
        "cheaper recipes."
    )


def draw(data: ReportData) -> Figure | None:
    drawn = coloured(data)
    costs = [mean_of(recipe.valid_runs, get_forward_flops) or 0.0 for recipe, _ in drawn]
    if not differ(costs):
        return None
    figure, (axes,) = panels(2.5)
    names = short_names(data, [recipe for recipe, _ in drawn])
    draw_frontier(axes, costs, [recipe.mean_score for recipe, _ in drawn])
    for recipe, place in drawn:
        look = {"color": GREY, "marker": "o"}
        if place is not None:
            look = {"color": COLOURS[place], "marker": MARKERS[place]}
        flops = [get_forward_flops(run) for run in recipe.valid_runs]
        scores = [run.full for run in recipe.valid_runs]
        label = "" if place is None else names[recipe.name]
        axes.plot(flops, scores, linestyle="", markerfacecolor="none", label=label, zorder=3, **look)
    set_labels(axes, costs, "full, nats per character")
    set_title(figure, "Score against the cost of using the model")
    add_legend(figure, axes)
    return figure


def draw_study(study: Study, height: float = 2.4, width: float = WIDTH) -> Figure | None:
    trials = [trial for trial in study.completed if trial.get("forward_flops")]
    costs = column(trials, "forward_flops")
    if not differ(costs):
        return None
    figure, (axes,) = panels(height, width=width)
    draw_frontier(axes, costs, values(trials))
    axes.plot(costs, values(trials), "o", color=COLOURS[0], markerfacecolor="none", label="a trial")
    set_labels(axes, costs, objective(study))
    set_title(figure, "Value against the cost of the trial's model")
    add_legend(figure, axes)
    return figure


def differ(costs: Sequence[float]) -> bool:
    """Return whether a report shows different numbers for the costs."""
    return len(set(map(compact, costs))) > 1


def draw_frontier(axes: Axes, costs: Sequence[float], scores: Sequence[float]) -> None:
    places = frontier(costs, scores)
    x = np.array(costs)[places]
    y = np.array(scores)[places]
    axes.step(x, y, where="post", color=GREY, linewidth=0.8, zorder=1, label="no cheaper one is better")


def set_labels(axes: Axes, costs: Sequence[float], score: str) -> None:
    axes.set(xlabel=LABEL, ylabel=score)
    if max(costs) > 5 * min(costs):
        axes.set_xscale("log")
        format_cost_ticks(axes.xaxis)
    else:
        format_ticks(axes.xaxis, 8)
    format_ticks(axes.yaxis)
