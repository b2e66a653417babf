"""Draw the score, the model size, the cost and the training loss of a run with growth ops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reports.evidence.figures.axes import format_ticks, panels, set_score_limits
from reports.evidence.figures.series import column, full, steps
from reports.evidence.figures.style import COLOURS, MOST, line_style
from reports.evidence.load import ReportData, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Dashed lines mark the growth ops, which are numbered as in the table. The first scores may lie above "
    "the frame."
)
AROUND = 40  # the number of steps to draw before and after each growth op
SIZES = (("params", "params"), ("flops_per_token", "FLOPs per token"))
MARK: dict[str, Any] = {"color": "black", "linewidth": 0.7, "linestyle": (0, (2, 2))}


def grown_runs(data: ReportData) -> list[Run]:
    """Return the first valid run of each recipe that has growth ops."""
    return [recipe.valid_runs[0] for recipe in data.recipes if recipe.valid_runs and recipe.valid_runs[0].ops]


def draw(run: Run) -> Figure:
    sized = [op for op in run.ops if "params" in op]
    columns = 2
    if sized:
        columns = 3
    figure, panel = panels(1.9 + 0.13 * max(2, min(len(run.ops), MOST)), 1, columns)
    draw_score(panel[0], run)
    if sized:
        draw_size(panel[1], run, sized)
    draw_loss(panel[-1], run)
    for axes in panel:
        format_ticks(axes.xaxis)
        format_ticks(axes.yaxis)
    return figure


def draw_score(axes: Axes, run: Run) -> None:
    axes.plot(steps(run), full(run), color=COLOURS[0])
    set_score_limits(axes, full(run))
    axes.set(title="full score of val", xlabel="step", ylabel="nats per character")
    for number, op in enumerate(run.ops, 1):
        axes.axvline(op["step"], **MARK)
        axes.annotate(
            str(number),
            (op["step"], 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(3, -1),
            textcoords="offset points",
            va="top",
            fontsize=7,
        )


def draw_size(axes: Axes, run: Run, ops: list[dict[str, Any]]) -> None:
    """Draw the number of parameters and the FLOPs per token after each growth op."""
    start = next(row for row in run.journal if str(row["event"]).endswith("START"))
    edges = [0, *column(ops, "step"), run.summary["steps"]]
    for place, (name, label) in enumerate(SIZES):
        sizes = [start[name], *column(ops, name)]
        axes.step(edges, [*sizes, sizes[-1]], where="post", label=label, **line_style(place))
    axes.set(title="size and cost", xlabel="step")
    axes.set_ylim(bottom=0)
    add_legend_below(axes)


def draw_loss(axes: Axes, run: Run) -> None:
    losses = dict(zip(column(run.steps, "step"), column(run.steps, "loss"), strict=True))
    for place, op in enumerate(run.ops[:MOST]):
        distances = []
        near = []
        for distance in range(-AROUND, AROUND + 1):
            if op["step"] + distance in losses:
                distances.append(distance)
                near.append(losses[op["step"] + distance])
        axes.plot(distances, near, label=f"{place + 1} {op['name']}", **line_style(place))
    axes.axvline(0, **MARK)
    axes.set(title="training loss around each op", xlabel="steps since the op", ylabel="nats per token")
    add_legend_below(axes)


def add_legend_below(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=1)
