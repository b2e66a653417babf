"""Choose and draw the figures of page 1: the difference, the curves, and what the result is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.evidence.compared import comparison
from reports.evidence.figures import headline, history, interval, seeds, slices, waterfall
from reports.evidence.figures.style import HALF
from reports.evidence.load import ReportData

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEFT, RIGHT = "headline", "result"


def draw(data: ReportData, height: float) -> dict[str, Figure | None]:
    """Draw the figures of page 1, each under the name of its file."""
    figures: dict[str, Figure | None] = {"interval": interval.draw(comparison(data))}
    if data.runs:
        figures[LEFT] = headline.draw(data, height)
        figures[right(data)] = draw_right(data, height)
    elif data.studies:
        figures[LEFT] = history.draw(data.studies[0], height, HALF)
        figures[RIGHT] = slices.draw(data.studies[0], height, HALF, columns=1, most=2)
    return figures


def right(data: ReportData) -> str:
    """Return the name of the right figure: the waterfall, a study's progress, or all runs."""
    if data.ladder:
        return "waterfall"
    if data.studies and data.studies[0].scored:
        return RIGHT
    return "seeds"


def draw_right(data: ReportData, height: float) -> Figure | None:
    if data.ladder:
        return waterfall.draw(data, height, HALF)
    if data.studies and data.studies[0].scored:
        return history.draw(data.studies[0], height, HALF)
    return seeds.draw(data, height, HALF)


def captions(data: ReportData) -> dict[str, str]:
    """Return the caption of each figure of page 1."""
    if not data.runs:
        return {LEFT: history.CAPTION, RIGHT: slices.CAPTION}
    name = right(data)
    texts = {"waterfall": waterfall.caption, "seeds": seeds.caption, RIGHT: lambda _: history.CAPTION}
    return {LEFT: headline.caption(data), name: texts[name](data)}
