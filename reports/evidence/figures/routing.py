"""Draw the selected shares, the accuracy of the students and the FLOPs of each layer of a routed run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mainrun.plan.cost import layer_flops
from reports.evidence.figures.axes import add_legend, format_ticks, panels
from reports.evidence.figures.style import COLOURS, GREY, MOST, line_style
from reports.evidence.load import ReportData, Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Left: the share of tokens that each routed layer selects when the model is scored. The dashed line is "
    "the capacity. Middle: the share of tokens for which the student predicts the selection of training, "
    "averaged over windows of steps. A student above the dashed line predicts better than a constant. "
    "Right: the forward FLOPs of each layer of the scored model, relative to a dense layer."
)
WINDOWS = 40  # the number of windows over which statistics of steps are averaged
LIMIT: dict[str, Any] = {"color": "black", "linewidth": 0.7, "linestyle": (0, (2, 2)), "zorder": 2}


def routed_runs(data: ReportData) -> list[Run]:
    """Return the first valid run of each recipe whose last model has routed blocks."""
    firsts = [recipe.valid_runs[0] for recipe in data.recipes if recipe.valid_runs]
    return [run for run in firsts if "routing" in run.summary]


def draw(run: Run) -> Figure:
    figure, (shares, accuracy, flops) = panels(2.5, 1, 3)
    draw_shares(shares, run)
    draw_accuracy(accuracy, run)
    draw_flops(flops, run)
    for axes in (shares, accuracy):
        axes.set_xlabel("step")
        format_ticks(axes.xaxis, 4)
        format_ticks(axes.yaxis)
    add_legend(figure, shares)
    return figure


def draw_shares(axes: Axes, run: Run) -> None:
    draw_layers(axes, run.evals, "selected")
    draw_limit(axes, run, lambda capacity: capacity)
    axes.set_title("selected when scored")
    axes.set_ylim(bottom=0)


def draw_accuracy(axes: Axes, run: Run) -> None:
    draw_layers(axes, run.steps, "student_accuracy")
    draw_limit(axes, run, lambda capacity: max(capacity, 1 - capacity))
    axes.set_title("student accuracy in training")


def draw_layers(axes: Axes, rows: Sequence[dict[str, Any]], name: str) -> None:
    """Draw one statistic of each routed layer. Many rows are averaged over windows."""
    series: dict[int, tuple[list[int], list[float]]] = {}
    for row in rows:
        for router in row.get("routers", ()):
            steps, numbers = series.setdefault(router["layer"], ([], []))
            steps.append(row["step"])
            numbers.append(router[name])
    for place, (layer, (steps, numbers)) in enumerate(sorted(series.items())):
        windows = min(WINDOWS, len(steps))
        x = [part.mean() for part in np.array_split(np.array(steps), windows)]
        y = [part.mean() for part in np.array_split(np.array(numbers), windows)]
        axes.plot(x, y, label=f"layer {layer}", **line_style(place % MOST))


def draw_limit(axes: Axes, run: Run, limit: Any) -> None:
    """Draw a function of the capacity, which growth ops may change during the run."""
    edges = []
    heights = []
    for segment in run.resolved.segments:
        edges.append(segment.first)
        heights.append(limit(segment.cfg.capacity))
    axes.step([*edges, run.summary["steps"]], [*heights, heights[-1]], where="post", **LIMIT)


def draw_flops(axes: Axes, run: Run) -> None:
    cfg = run.resolved.segments[-1].cfg
    dense = layer_flops(cfg.model_copy(update={"block_pattern": "D"}))[0]
    ratios = [flops / dense for flops in layer_flops(cfg, run.summary["routing"]["selected"])]
    colours = [GREY if letter == "D" else COLOURS[0] for letter in cfg.letters]
    axes.bar(range(len(ratios)), ratios, color=colours)
    axes.set(title="forward FLOPs, D = 1", xlabel="layer")
    format_ticks(axes.yaxis)
    shown = range(0, len(ratios), max(1, len(ratios) // 12))
    axes.set_xticks(shown, [f"{layer}\n{cfg.letters[layer]}" for layer in shown])
