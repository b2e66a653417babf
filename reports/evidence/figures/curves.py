"""Draw the full score of every recipe against the number of steps, tokens, seconds and FLOPs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.evidence.figures.axes import add_legend, format_ticks, panels, set_score_limits, set_title
from reports.evidence.figures.series import (
    Series,
    coloured,
    draw_recipe,
    flops,
    full,
    full_scores,
    seconds,
    short_names,
    steps,
    tokens,
)
from reports.evidence.load import ReportData

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS: dict[str, Series] = {
    "step": steps,
    "tokens trained": tokens,
    "seconds in steps and evaluations": seconds,
    "FLOPs": flops,
}


def caption(data: ReportData) -> str:
    text = (
        "Full score of val against step, tokens, time and FLOPs. Lines are means over the seeds. Bands reach "
        "from the lowest to the highest seed."
    )
    if any(place is None for _, place in coloured(data)):
        text += " Grey lines are the other recipes."
    if any(run.summary.get("ledger", {}).get("reused") for run in data.runs):
        text += " Steps from the store count with the time of their original training."
    return f"{text} The first evaluations, of untrained models, may lie above the frame."


def draw(data: ReportData) -> Figure | None:
    drawn = coloured(data)
    if not drawn:
        return None
    figure, panel = panels(4.6, 2, 2, sharey=True)
    names = short_names(data, [recipe for recipe, place in drawn if place is not None])
    for axes, (name, cost) in zip(panel, COSTS.items(), strict=True):
        for recipe, place in drawn:
            draw_recipe(axes, recipe, cost, full, place, names.get(recipe.name, ""))
        axes.set_xlabel(name)
        format_ticks(axes.xaxis)
    set_score_limits(panel[0], full_scores(data.recipes))
    for axes in panel[::2]:
        axes.set_ylabel("full, nats per character")
        format_ticks(axes.yaxis)
    best = min((recipe for recipe, _ in drawn), key=lambda recipe: recipe.mean_score)
    name = short_names(data, [recipe for recipe, _ in drawn])[best.name]
    set_title(figure, f"{name} ends lowest; how each recipe gets there by step, tokens, time and FLOPs")
    add_legend(figure, panel[0])
    return figure
