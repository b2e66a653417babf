"""Draw the value of each trial at a rung against the value of the same trial at the last rung.

The figure shows how well the scores after a short training predict the final ranking of the trials.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.evidence.figures.axes import format_ticks, panels
from reports.evidence.figures.style import COLOURS
from reports.evidence.load import Study
from reports.evidence.studies import rungs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = "The value at a rung against the value at the last rung, for trials that reached the last rung."
NEEDS = "three trials trained to the end, with scores at a lower rung"
PANELS = 3  # the maximum number of panels; only the last rungs are shown


def draw(study: Study) -> Figure | None:
    drawn = rungs(study)[-PANELS:]
    if not drawn:
        return None
    figure, panel = panels(2.3, 1, len(drawn), sharey=True)
    for axes, rung in zip(panel, drawn, strict=True):
        axes.plot(rung.values, rung.last, "o", color=COLOURS[0], markerfacecolor="none")
        title = f"{len(rung.values)} trials"
        if rung.correlation is not None:
            title += f", rank correlation {rung.correlation:.2f}"
        axes.set(title=title, xlabel=f"value at rung {rung.number}")
        format_ticks(axes.xaxis, 4)
        format_ticks(axes.yaxis)
    panel[0].set_ylabel("value at the last rung")
    return figure
