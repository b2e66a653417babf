"""Draw the figure on page 1, which compares the baseline with the optimized recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.evidence.figures.axes import add_legend, format_ticks, panels, set_score_limits
from reports.evidence.figures.series import draw_recipe, full, full_scores, headline_pair, tokens
from reports.evidence.load import ReportData

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def caption(_: ReportData) -> str:
    return "Full score against the tokens trained. Bands reach from the lowest to the highest seed."


def draw(data: ReportData) -> Figure | None:
    pair = headline_pair(data)
    if not pair:
        return None
    figure, (axes,) = panels(3.1)
    for place, recipe in enumerate(pair):
        draw_recipe(axes, recipe, tokens, full, place)
    set_score_limits(axes, full_scores(pair))
    axes.set(xlabel="tokens trained", ylabel="full, nats per character")
    format_ticks(axes.xaxis, 8)
    format_ticks(axes.yaxis)
    add_legend(figure, axes)
    return figure
