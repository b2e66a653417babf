"""Draw the results of `mainrun bench search`: regrets against tokens, and the ratios of the tokens."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reports.evidence.figures.axes import add_legend, format_ticks, label_bar, panels, set_row_names
from reports.evidence.figures.style import COLOURS, GREY, MOST, line_style, report_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW_HEIGHT = 0.16  # inches for each rival
THIRD = 1 / 3


def to_svg(report: Mapping[str, Any]) -> bytes:
    """Return the figure of a benchmark's report as SVG."""
    out = io.BytesIO()
    with report_style():
        draw(report).savefig(out, format="svg", metadata={"Date": None, "Creator": "mainrun bench search"})
    return out.getvalue()


def draw(report: Mapping[str, Any]) -> Figure:
    comparisons = report["comparisons"]
    columns = 2 if comparisons else 1
    height = max(2.4, 0.9 + ROW_HEIGHT * len(comparisons))
    figure, axes = panels(height, 1, columns)
    draw_regrets(axes[0], report)
    add_legend(figure, axes[0])
    if comparisons:
        draw_ratios(axes[1], comparisons)
    return figure


def draw_regrets(axes: Axes, report: Mapping[str, Any]) -> None:
    """Draw the median regret of each method. Our sampler and the best rivals have colours."""
    ours, *others = report["methods"]
    rivals = {row["rival"] for row in report["comparisons"]}
    ranked = sorted((row for row in others if row["method"] in rivals), key=lambda row: row["mean"])
    for place, row in enumerate([ours, *ranked]):
        points = [float(point) for point in row["regrets"]]
        medians = [median for _, median, _ in row["regrets"].values()]
        shown = place < MOST
        label = row["method"] if shown else None
        axes.plot(points, medians, label=label, **line_style(place if shown else None))
    if len(ranked) >= MOST:
        axes.plot([], [], label="other rivals", **line_style(None))
    axes.set(xlabel="tokens, in whole runs", ylabel="standard deviations over seeds")
    axes.set(title="Median regret of the recommended recipe")
    axes.set_ylim(bottom=0)
    format_ticks(axes.xaxis, 8)
    format_ticks(axes.yaxis)


def draw_ratios(axes: Axes, comparisons: list[dict[str, Any]]) -> None:
    """Draw the ratio of our tokens to those of each rival, with its interval."""
    rows = sorted(comparisons, key=lambda row: row["ratio"])
    for place, row in enumerate(rows):
        low, high = row["interval"]
        axes.plot([low, high], [place, place], color=COLOURS[0])
        axes.plot(row["ratio"], place, "o", color=COLOURS[0])
        label_bar(axes, high, place, f"{row['ratio']:.2f}")
    for value in (THIRD, 1.0):
        axes.axvline(value, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    set_row_names(axes, [row["rival"] for row in rows])
    axes.set(xlabel="our tokens divided by those of the rival", title="Tokens until the recipe is good")
    highest = max(row["interval"][1] for row in rows)
    axes.set_xlim(0, 1.15 * max(1.0, highest))
    format_ticks(axes.xaxis)
