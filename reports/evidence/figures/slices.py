"""Draw the value of each trial against each searched field, with one panel per field."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from reports.evidence.figures.axes import (
    add_legend,
    format_panel_ticks,
    format_ticks,
    label_best,
    panels,
    set_score_limits,
    set_title,
    shorten,
)
from reports.evidence.figures.shades import add_key, frame, shade
from reports.evidence.figures.style import GREY, WIDTH
from reports.evidence.load import Study
from reports.evidence.studies import Scale, by_importance, importance, objective, settings, values, with_field

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Darker trials are better. Grey crosses mark trials that were not trained to the end. The highest values "
    "may lie above the frame."
)
NEEDS = "two trials with a value, and a field with more than one setting"
PANELS = 4


def draw(
    study: Study, height: float = 2.0, width: float = WIDTH, columns: int = PANELS, most: int = PANELS
) -> Figure | None:
    present = [field for field in study.searched_fields if with_field(study.scored, field)]
    fields = by_importance(present, importance(study))[:most]
    if not fields or len(study.scored) < 2:
        return None
    columns = min(columns, len(fields))
    rows = math.ceil(len(fields) / columns)
    figure, panel = panels(height, rows, columns, width, sharey=True)
    for axes, field in zip(panel, fields, strict=False):
        draw_field(axes, study, field)
    set_score_limits(panel[0], values(study.scored))
    for axes in panel[len(fields) :]:
        axes.set_visible(False)
    for axes in panel[::columns]:
        axes.set_ylabel(f"{objective(study)},\nnats/char")
        format_ticks(axes.yaxis, 3)
    if study.completed:
        add_key(panel[0], values(study.completed), marker="o", linestyle="", markersize=4)
    set_title(figure, title(study, len(fields)))
    add_legend(figure, panel[0])
    return figure


def title(study: Study, shown: int) -> str:
    """Say what the panels show, and which settings were the best."""
    which = f"the {shown} most important of {len(study.searched_fields)} searched fields"
    if shown == len(study.searched_fields):
        which = "each searched field"
    return f"Value against {which}; the ring is the best trial"


def draw_field(axes: Axes, study: Study, field: str) -> None:
    stopped = with_field(study.stopped, field)
    whole = with_field(study.completed, field)
    scale = Scale.of_field(study, field, settings(stopped + whole, field))
    if scale.log:
        axes.set_xscale("log")
    cut = len(stopped)
    axes.plot(scale.places[:cut], values(stopped), "x", color=GREY, markersize=2.5)
    darkest, lightest = frame(values(study.completed))
    ranked = sorted(zip(values(whole), scale.places[cut:], strict=True), reverse=True)
    for value, place in ranked:  # the best trials are drawn last, on top of the others
        color = shade(value, darkest, lightest)
        axes.plot(place, value, "o", color=color, markersize=3.5, markeredgewidth=0)
    best = min(study.completed, key=lambda trial: float(trial["value"]))
    for trial, place in zip(whole, scale.places[cut:], strict=True):
        if trial is best:
            label_best(axes, (place, float(best["value"])), f"trial {best['trial']}")
    axes.set_xlabel(field)
    if scale.names:
        axes.set_xticks(range(len(scale.names)), [shorten(name, 12) for name in scale.names])
    else:
        format_panel_ticks(axes.xaxis, scale.places)
