"""Draw the steps of an ablation as a waterfall chart.

Each bar starts at the score of the step that it changes, which is usually the previous step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mainrun.stats import Mean
from reports.evidence.figures.axes import format_ticks, label_bar, panels, set_row_names, set_title
from reports.evidence.figures.style import COLOURS, GREY, WIDTH
from reports.evidence.load import ReportData, base_indices, ladder_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def caption(_: ReportData) -> str:
    return (
        "Each step starts at the score of the step that it changes. Blue lowers the score, orange raises it, "
        "and grey is within noise."
    )


def draw(data: ReportData, height: float | None = None, width: float = WIDTH) -> Figure | None:
    ladder = data.ladder
    if not ladder:
        return None
    means = [Mean(tuple(scores.values())).mean for scores in ladder_scores(ladder)]
    floor = None
    whiskers = "one seed each"
    if data.noise is not None:
        floor = data.noise.floor
        whiskers = "whiskers: noise floor"
    figure, (axes,) = panels(height or 0.9 + 0.2 * len(ladder), width=width)
    draw_start(axes, means[0])
    last = list(range(len(means)))  # the last row whose bar starts at the score of each step
    for y, base in enumerate(base_indices(ladder), 1):
        draw_change(axes, y, means[base], means[y], floor)
        last[base] = y
    for y, mean in enumerate(means):
        axes.plot([mean, mean], [y - 0.31, last[y] + 0.31], color="black", linewidth=0.7)
    set_row_names(axes, [recipe.cfg.preset.split(":")[-1] for recipe in ladder])
    reach = floor or 0.0
    span = max(means) - min(means)
    room = 0.24 * WIDTH / width  # for the labels
    axes.set_xlim(min(means) - reach - 0.03 * span, max(means) + reach + room * (span + reach))
    axes.set_xlabel(f"full, nats per character; {whiskers}")
    axes.grid(axis="y", visible=False)
    format_ticks(axes.xaxis, max(4, int(8 * width / WIDTH)))
    lowest = min(range(len(means)), key=means.__getitem__)
    names = [recipe.cfg.preset.split(":")[-1] for recipe in ladder]
    set_title(
        figure, f"From {names[0]} at {means[0]:.4f} to {names[lowest]} at {means[lowest]:.4f}, step by step"
    )
    return figure


def draw_start(axes: Axes, mean: float) -> None:
    """Draw the first step of an ablation as a bar of zero width, because the first step changes nothing."""
    axes.barh(0, 0.0, left=mean, height=0.62, color=GREY, linewidth=0)
    label_bar(axes, mean, 0, f"{mean:.4f}")


def draw_change(axes: Axes, y: int, before: float, mean: float, floor: float | None) -> None:
    change = mean - before
    text = f"{change:+.4f}".replace("-", "\N{MINUS SIGN}")
    colour = COLOURS[1]
    if change < 0:
        colour = COLOURS[0]
    right = max(mean, before)
    if floor is not None:
        right = max(mean, before + floor)
        axes.errorbar(before, y, xerr=floor, fmt="none", ecolor="black", capsize=2, linewidth=0.8)
        if abs(change) <= floor:
            colour = GREY
            text += " (noise)"
    axes.barh(y, change, left=before, height=0.62, color=colour, linewidth=0)
    label_bar(axes, right, y, text)
