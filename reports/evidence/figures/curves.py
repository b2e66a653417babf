"""The full score of every recipe against its cost: steps, tokens, seconds and FLOPs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.evidence.figures.axes import add_legend, format_ticks, panels, set_score_limits
from reports.evidence.figures.series import (
    Series,
    coloured,
    draw_recipe,
    flops,
    full,
    full_scores,
    seconds,
    steps,
    tokens,
)
from reports.evidence.load import Evidence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS: dict[str, Series] = {
    "step": steps,
    "tokens trained": tokens,
    "seconds in steps and evaluations": seconds,
    "FLOPs": flops,
}


def draw(e: Evidence) -> Figure | None:
    drawn = coloured(e)
    if not drawn:
        return None
    figure, panel = panels(4.9, 2, 2, sharey=True)
    for axes, (name, cost) in zip(panel, COSTS.items(), strict=True):
        for recipe, place in drawn:
            draw_recipe(axes, recipe, cost, full, place)
        axes.set_xlabel(name)
        format_ticks(axes.xaxis)
    set_score_limits(panel[0], full_scores(e.recipes))
    for axes in panel[::2]:
        axes.set_ylabel("full, nats per character")
        format_ticks(axes.yaxis)
    add_legend(figure, panel[0])
    return figure
