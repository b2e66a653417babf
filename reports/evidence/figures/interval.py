"""Draw the difference of page 1 as a bar with its interval, zero and the noise floor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.evidence.compared import Comparison
from reports.evidence.figures.axes import format_ticks, panels
from reports.evidence.figures.style import COLOURS, GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 0.95


def draw(compared: Comparison | None) -> Figure | None:
    """Draw the interval of a difference. Without a difference, there is no figure."""
    if compared is None or compared.mean is None:
        return None
    figure, (axes,) = panels(HEIGHT)
    floor = compared.floor or 0.0
    low, high = compared.interval or (compared.mean, compared.mean)
    shown = (low, high, -floor, floor, compared.mean, 0.0)
    room = 0.06 * (max(shown) - min(shown)) or 0.01
    axes.set_xlim(min(shown) - room, max(shown) + room)
    axes.set_ylim(-1, 1)
    if floor:
        axes.axvspan(-floor, floor, color="#DADADA", linewidth=0, zorder=0)
        label = axes.annotate("noise floor", (floor, 0.98), (2, 0), textcoords="offset points")
        label.set(va="top", fontsize=7, color="#444444")
        if compared.mean > 0:
            label.set(ha="right")
            label.xy = (-floor, 0.98)
            label.set_position((-2, 0))
    axes.axvline(0, color="black", linewidth=0.9)
    colour = COLOURS[0] if compared.mean < 0 else COLOURS[1]
    if compared.interval:
        axes.barh(0, high - low, left=low, height=0.8, color=colour, alpha=0.45, linewidth=0, zorder=2)
        axes.plot([low, low], [-0.4, 0.4], color=colour, zorder=3)
        axes.plot([high, high], [-0.4, 0.4], color=colour, zorder=3)
    axes.plot([compared.mean, compared.mean], [-0.62, 0.62], color="black", linewidth=1.6, zorder=4)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.set_xlabel(axis_label(compared))
    format_ticks(axes.xaxis, 10)
    return figure


def axis_label(compared: Comparison) -> str:
    text = f"difference in {compared.score}, nats per character; below zero is better; "
    if compared.interval:
        return text + "bar: 95% interval, line: mean"
    return text + "line: the difference, without an interval"
