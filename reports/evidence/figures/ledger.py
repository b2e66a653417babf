"""Draw how many steps a study requested, trained, reused and wasted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.evidence.figures.axes import format_ticks, label_bar, panels, set_row_names
from reports.evidence.figures.style import COLOURS, GREY
from reports.evidence.load import Study
from reports.evidence.studies import ledger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = "Asked steps are the sum of trained and reused steps. Wasted steps are part of the trained steps."
NEEDS = "the number of steps"
BARS = {"asked": GREY, "trained": COLOURS[0], "reused": COLOURS[0], "wasted": COLOURS[1]}


def draw(study: Study) -> Figure | None:
    steps = ledger(study)
    if not steps.get("asked"):
        return None
    figure, (axes,) = panels(1.35)
    for y, (name, count) in enumerate(steps.items()):
        axes.barh(y, count, color=BARS[name], height=0.6)
        label_bar(axes, count, y, f"{count:,.0f}")
    set_row_names(axes, list(steps))
    axes.set_xlim(0, 1.15 * max(steps.values()))
    axes.set_xlabel("steps")
    axes.grid(axis="y", visible=False)
    format_ticks(axes.xaxis, 8)
    return figure
