"""Draw what a study with the sampler `frugal` trained: the searched fields and the length of each run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from reports.evidence.figures.axes import (
    add_legend,
    format_panel_ticks,
    format_ticks,
    panels,
    set_title,
    shorten,
)
from reports.evidence.figures.style import COLOURS, GREY, WIDTH
from reports.evidence.load import Study
from reports.evidence.studies import Scale, by_importance, importance, setting, with_field

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = "Larger circles are longer runs. Filled circles are the best quarter of the whole runs."
NEEDS = "trials of several lengths, and a field with more than one setting"
PANELS = 3
BEST_SHARE = 0.25


def draw(study: Study, height: float = 2.4, width: float = WIDTH) -> Figure | None:
    horizons = sorted({trial["horizon"] for trial in study.trials if trial.get("horizon")})
    present = [field for field in study.searched_fields if with_field(study.trials, field)]
    fields = by_importance(present, importance(study))[: max(1, int(PANELS * width / WIDTH))]
    if len(horizons) < 2 or not fields:
        return None
    figure, panel = panels(height, 1, len(fields), width)
    best = best_trials(study)
    for axes, field in zip(panel, fields, strict=True):
        draw_field(axes, study, field, best)
    for horizon in horizons:
        label = f"{horizon:g}" if horizon < 1 else "whole"
        size = mark_size(horizon)
        panel[0].plot([], [], "o", color=GREY, markerfacecolor="none", markersize=size, label=label)
    label = "best"
    panel[0].plot([], [], "o", color=COLOURS[1], markersize=mark_size(1), label=label)
    set_title(figure, "Short runs explore, whole runs decide")
    add_legend(figure, panel[0])
    return figure


def draw_field(axes: Axes, study: Study, field: str, best: set[int]) -> None:
    trials = with_field(study.trials, field)
    scale = Scale.of_field(study, field, [setting(trial, field) for trial in trials])
    if scale.log:
        axes.set_yscale("log")
    for trial, place in zip(trials, scale.places, strict=True):
        colour, fill = GREY, "none"
        if trial["trial"] in best:
            colour = fill = COLOURS[1]
        size = mark_size(trial["horizon"] or 1.0)
        axes.plot(trial["trial"], place, "o", color=colour, markerfacecolor=fill, markersize=size)
    axes.set(xlabel="trial", ylabel=field)
    format_ticks(axes.xaxis)
    if scale.names:
        axes.set_yticks(range(len(scale.names)), [shorten(name, 12) for name in scale.names])
    else:
        format_panel_ticks(axes.yaxis, scale.places)


def best_trials(study: Study) -> set[int]:
    """Return the numbers of the best quarter of the trials that were trained to the end."""
    ranked: list[dict[str, Any]] = sorted(study.completed, key=lambda trial: float(trial["value"]))
    count = math.ceil(BEST_SHARE * len(ranked))
    return {trial["trial"] for trial in ranked[:count]}


def mark_size(horizon: float) -> float:
    """Return the size of a mark, whose area is proportional to the length of the run."""
    return 5.5 * math.sqrt(horizon)
