"""Draw the value of each trial against each searched field, with one panel per field."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from reports.evidence.figures.axes import format_panel_ticks, format_ticks, panels, set_score_limits, shorten
from reports.evidence.figures.style import COLOURS, GREY
from reports.evidence.load import Study
from reports.evidence.studies import Scale, by_importance, importance, objective, settings, values, with_field

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "The value of each trial against each searched field. Grey crosses mark trials that were not trained to "
    "the end. The highest values may lie above the frame."
)
NEEDS = "two trials with a value, and a field with more than one setting"
PANELS = 9


def draw(study: Study) -> Figure | None:
    present = [field for field in study.searched_fields if with_field(study.scored, field)]
    fields = by_importance(present, importance(study))[:PANELS]
    if not fields or len(study.scored) < 2:
        return None
    columns = min(3, len(fields))
    rows = math.ceil(len(fields) / columns)
    figure, panel = panels(0.3 + 1.75 * rows, rows, columns, sharey=True)
    for axes, field in zip(panel, fields, strict=False):
        draw_field(axes, study, field)
    set_score_limits(panel[0], values(study.scored))
    for axes in panel[len(fields) :]:
        axes.set_visible(False)
    for axes in panel[::columns]:
        axes.set_ylabel(objective(study))
        format_ticks(axes.yaxis)
    return figure


def draw_field(axes: Axes, study: Study, field: str) -> None:
    stopped = with_field(study.stopped, field)
    whole = with_field(study.completed, field)
    scale = Scale.of(settings(stopped + whole, field))
    if scale.log:
        axes.set_xscale("log")
    cut = len(stopped)
    axes.plot(scale.places[:cut], values(stopped), "x", color=GREY, markersize=2.5)
    places = scale.places[cut:]
    axes.plot(places, values(whole), "o", color=COLOURS[0], markerfacecolor="none", markersize=3)
    axes.set_xlabel(field)
    if scale.names:
        axes.set_xticks(range(len(scale.names)), [shorten(name, 12) for name in scale.names])
    else:
        format_panel_ticks(axes.xaxis, scale.places)
