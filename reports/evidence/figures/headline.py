"""Draw the left figure on page 1, which compares the curves of the baseline and the optimized recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.evidence.figures.axes import add_legend, format_ticks, panels, set_score_limits, set_title
from reports.evidence.figures.series import (
    draw_recipe,
    full,
    full_scores,
    headline_pair,
    short_names,
    tokens,
)
from reports.evidence.figures.style import HALF
from reports.evidence.findings import claim
from reports.evidence.load import ReportData

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def caption(_: ReportData) -> str:
    return "Full score against the tokens trained. Bands reach from the lowest to the highest seed."


def draw(data: ReportData, height: float) -> Figure | None:
    pair = headline_pair(data)
    if not pair:
        return None
    figure, (axes,) = panels(height, width=HALF)
    names = short_names(data, pair)
    for place, recipe in enumerate(pair):
        draw_recipe(axes, recipe, tokens, full, place, names[recipe.name])
    set_score_limits(axes, full_scores(pair))
    axes.set(xlabel="tokens trained", ylabel="full, nats per character")
    format_ticks(axes.xaxis)
    format_ticks(axes.yaxis, 8)
    set_title(figure, title(data))
    add_legend(figure, axes)
    return figure


def title(data: ReportData) -> str:
    """Say which recipe ends lower, by the difference that the report claims."""
    pair = headline_pair(data)
    names = [short_names(data, pair)[recipe.name] for recipe in pair]
    change = claim(data).difference
    if len(pair) < 2 or change is None:
        return f"{names[0]} ends at {pair[0].mean_score:.4f}"
    side = "below" if change.mean < 0 else "above"
    return f"{names[1]} ends {abs(change.mean):.4f} {side} {names[0]}"
