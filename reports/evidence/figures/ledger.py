"""Draw how many steps a study requested, trained, reused and wasted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.evidence.figures.axes import format_ticks, label_bar, panels, set_row_names, set_title
from reports.evidence.figures.style import COLOURS, GREY, WIDTH
from reports.evidence.load import Study
from reports.evidence.studies import ledger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = "Asked is the sum of trained and reused. Wasted steps are part of the trained ones."
NEEDS = "the number of steps"
BARS = {"asked": GREY, "trained": COLOURS[0], "reused": COLOURS[0], "wasted": COLOURS[1]}


def draw(study: Study, height: float = 1.35, width: float = WIDTH) -> Figure | None:
    steps = ledger(study)
    if not steps.get("asked"):
        return None
    figure, (axes,) = panels(height, width=width)
    for y, (name, count) in enumerate(steps.items()):
        axes.barh(y, count, color=BARS[name], height=0.6)
        label_bar(axes, count, y, f"{count:,.0f}")
    set_row_names(axes, list(steps))
    axes.set_xlim(0, (1 + 0.15 * WIDTH / width) * max(steps.values()))
    axes.set_xlabel("steps")
    axes.grid(axis="y", visible=False)
    format_ticks(axes.xaxis, max(4, int(8 * width / WIDTH)))
    set_title(figure, title(steps))
    return figure


def title(steps: dict[str, float]) -> str:
    """Say which share of the requested steps was trained."""
    if "trained" not in steps:
        return f"{steps['asked']:,.0f} steps were requested"
    return f"{100 * steps['trained'] / steps['asked']:.0f}% of the requested steps were trained"
