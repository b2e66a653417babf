"""Draw the training loss and the validation loss of each recipe.

Each recipe has a separate panel, because losses per token cannot be compared across different tokenizers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.evidence.figures.axes import add_legend, format_ticks, panels, set_score_limits
from reports.evidence.figures.series import headline_pair, short_names
from reports.evidence.figures.style import COLOURS, DASHES
from reports.evidence.load import Recipe, ReportData, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def caption(_: ReportData) -> str:
    return (
        "Loss in nats per token, one line per seed. Training losses include dropout and are averaged over "
        "the steps before the evaluation, so they may be above the validation losses. The panels cannot "
        "be compared with each other, because the recipes may use different tokenizers."
    )


def draw(data: ReportData) -> Figure | None:
    pair = headline_pair(data)
    if not pair:
        return None
    figure, panel = panels(2.3, 1, len(pair))
    names = short_names(data, pair)
    for axes, recipe, colour in zip(panel, pair, COLOURS, strict=False):
        draw_losses(axes, recipe, colour)
        axes.set(title=names[recipe.name], xlabel="step")
        format_ticks(axes.xaxis)
        format_ticks(axes.yaxis)
    panel[0].set_ylabel("nats per token")
    add_legend(figure, panel[0])
    for handle in figure.legends[0].get_lines():
        handle.set_color("black")
    return figure


def draw_losses(axes: Axes, recipe: Recipe, colour: str) -> None:
    """Draw the training loss and the validation loss of each valid run of a recipe."""
    labels = ["train, mean since the last evaluation", "validation"]
    losses: list[float] = []
    for run in recipe.valid_runs:
        steps, train = training_loss(run)
        val = [row["loss"] for row in run.evals if row["step"] in steps]
        axes.plot(steps, train, color=colour, linestyle=DASHES[1], label=labels[0])
        axes.plot(steps, val, color=colour, linestyle=DASHES[0], label=labels[1])
        labels = ["", ""]
        losses += [*train, *val]
    set_score_limits(axes, losses)


def training_loss(run: Run) -> tuple[list[int], list[float]]:
    """Return the step of each evaluation, and the mean training loss since the previous evaluation."""
    import numpy as np

    steps = []
    means = []
    since: list[float] = []
    for row in run.rows:
        if row["event"] == "step":
            since.append(row["loss"])
        elif row["split"] == "val" and since:
            steps.append(row["step"])
            means.append(float(np.mean(since)))
            since = []
    return steps, means
