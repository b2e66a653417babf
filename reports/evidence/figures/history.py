"""Draw the value of each trial of a study, in the order of the trial numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reports.evidence.figures.axes import add_legend, format_ticks, panels, set_score_limits
from reports.evidence.figures.series import column
from reports.evidence.figures.style import COLOURS, GREY
from reports.evidence.load import Study, trial_state
from reports.evidence.studies import objective, values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = "Each trial's value at the end of its training, in the order of the trials."
NEEDS = "a trial with a value"
SHORT = "short"  # the state of a run that trains a recipe for a share of its steps


def draw(study: Study) -> Figure | None:
    if not study.scored:
        return None
    figure, (axes,) = panels(2.2)
    short = [trial for trial in study.stopped if trial_state(trial) == SHORT]
    pruned = [trial for trial in study.stopped if trial_state(trial) != SHORT]
    kinds = (
        (GREY, "x", "stopped at a lower rung", pruned),
        (GREY, ".", "short run", short),
        (COLOURS[0], "o", "trained to the end", study.completed),
    )
    for colour, marker, label, trials in kinds:
        if trials:
            numbers = column(trials, "trial")
            axes.plot(numbers, values(trials), marker, color=colour, markerfacecolor="none", label=label)
    lowest = np.minimum.accumulate(values(study.completed))
    label = "the lowest value so far"
    axes.step(column(study.completed, "trial"), lowest, where="post", color=COLOURS[1], label=label)
    set_score_limits(axes, values(study.scored))
    axes.set(xlabel="trial", ylabel=objective(study))
    format_ticks(axes.xaxis, 8)
    format_ticks(axes.yaxis)
    add_legend(figure, axes)
    return figure
