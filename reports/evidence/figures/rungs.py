"""Draw the value of each trial at a rung against the value of the same trial at the last rung.

The figure shows how well the scores after a short training predict the final ranking of the trials.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.evidence.figures.axes import format_ticks, panels, set_title
from reports.evidence.figures.style import COLOURS, WIDTH
from reports.evidence.load import Study
from reports.evidence.studies import rungs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = "The values of all trials that reached the last rung."
NEEDS = "three trials trained to the end, with scores at a lower rung"
GOOD, FAIR = 0.8, 0.5  # rank correlations
PANELS = 3  # the maximum number of panels; only the last rungs are shown


def draw(study: Study, height: float = 2.3, width: float = WIDTH) -> Figure | None:
    drawn = rungs(study)[-max(1, int(PANELS * width / WIDTH)) :]
    if not drawn:
        return None
    figure, panel = panels(height, 1, len(drawn), width, sharey=True)
    for axes, rung in zip(panel, drawn, strict=True):
        axes.plot(rung.values, rung.last, "o", color=COLOURS[0], markerfacecolor="none")
        label = f"value at rung {rung.number}; {len(rung.values)} trials"
        if rung.correlation is not None:
            label += f", rank correlation {rung.correlation:.2f}"
        axes.set_xlabel(label)
        format_ticks(axes.xaxis, 4)
        format_ticks(axes.yaxis, 4)
    panel[0].set_ylabel("last rung")
    set_title(figure, verdict(drawn[-1].correlation))
    return figure


def verdict(correlation: float | None) -> str:
    """Say how well the scores of the last drawn rung rank the trials."""
    if correlation is None:
        return "Early scores and final values"
    if correlation >= GOOD:
        return "Early scores rank the trials well"
    if correlation >= FAIR:
        return "Early scores rank the trials roughly"
    return "Early scores say little about the final ranking"
