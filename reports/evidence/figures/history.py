"""Draw the value of each trial of a study, in the order of the trial numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from reports.evidence.figures.axes import (
    add_legend,
    format_ticks,
    label_best,
    panels,
    set_score_limits,
    set_title,
)
from reports.evidence.figures.series import column
from reports.evidence.figures.style import COLOURS, GREY, WIDTH
from reports.evidence.load import Study, trial_state
from reports.evidence.studies import objective, values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = "Each trial's value at the end of its training, in the order of the trials."
NEEDS = "a trial with a value"
SHORT = "short"  # the state of a run that trains a recipe for a share of its steps


def draw(study: Study, height: float = 2.2, width: float = WIDTH) -> Figure | None:
    if not study.scored:
        return None
    figure, (axes,) = panels(height, width=width)
    short = [trial for trial in study.stopped if trial_state(trial) == SHORT]
    pruned = [trial for trial in study.stopped if trial_state(trial) != SHORT]
    kinds = (
        (GREY, "x", "stopped early", pruned),
        (GREY, ".", "short run", short),
        (COLOURS[0], "o", "whole run", study.completed),
    )
    for colour, marker, label, trials in kinds:
        if trials:
            numbers = column(trials, "trial")
            axes.plot(numbers, values(trials), marker, color=colour, markerfacecolor="none", label=label)
    lowest = np.minimum.accumulate(values(study.completed))
    label = "lowest so far"
    axes.step(column(study.completed, "trial"), lowest, where="post", color=COLOURS[1], label=label)
    set_score_limits(axes, values(study.scored))
    best = min(study.completed, key=lambda trial: float(trial["value"]))
    label_best(axes, (best["trial"], float(best["value"])), f"best: {best['trial']}")
    axes.set(xlabel="trial", ylabel=f"{objective(study)},\nnats/char")
    set_title(figure, title(study, best))
    format_ticks(axes.xaxis, max(4, int(8 * width / WIDTH)))
    format_ticks(axes.yaxis, 4)
    add_legend(figure, axes)
    return figure


def title(study: Study, best: dict[str, Any]) -> str:
    """Say which trial has the lowest value, and by how much it is below the first trial."""
    text = f"Trial {best['trial']} of {len(study.trials)} reached {float(best['value']):.4f}"
    first = study.completed[0]
    gain = float(first["value"]) - float(best["value"])
    if gain > 0:
        text += f", {gain:.4f} below trial {first['trial']}"
    return text
