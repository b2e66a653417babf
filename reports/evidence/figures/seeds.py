"""Draw the final score of every run, and the mean of each recipe with a confidence interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mainrun.stats import Mean
from reports.evidence.figures.axes import format_ticks, panels, set_row_names, set_title
from reports.evidence.figures.series import short_names
from reports.evidence.figures.style import COLOURS, WIDTH
from reports.evidence.load import Recipe, ReportData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS = 12  # the maximum number of recipes in the figure; only the best recipes are shown


def caption(_: ReportData) -> str:
    return (
        "Every run that passed its guards, and the mean of each recipe with its interval (Student's t). "
        "An interval without an end mark continues outside the frame. "
        "The interval of a recipe with only two seeds can be this wide."
    )


def draw(data: ReportData, height: float | None = None, width: float = WIDTH) -> Figure | None:
    counted = [recipe for recipe in data.recipes if recipe.valid_runs]
    ranked = sorted(counted, key=lambda recipe: recipe.mean_score)[:ROWS]
    if not ranked:
        return None
    figure, (axes,) = panels(height or 1.0 + 0.15 * len(ranked), width=width)
    scores: list[float] = []
    for y, recipe in enumerate(ranked):
        draw_row(axes, y, recipe)
        scores += recipe.scores.values()
    names = short_names(data, ranked, int(40 * width / WIDTH))
    set_row_names(axes, [names[recipe.name] for recipe in ranked])
    # Ignore the confidence intervals when setting the axis limits, because some intervals are very wide.
    room = 0.15 * (max(scores) - min(scores)) or 0.01
    axes.set_xlim(min(scores) - room, max(scores) + room)
    axes.set_xlabel("full, nats per character")
    format_ticks(axes.xaxis, max(4, int(8 * width / WIDTH)))
    set_title(figure, title(ranked, len(counted), names))
    handles, labels = axes.get_legend_handles_labels()
    distinct = dict(zip(labels, handles, strict=True))
    figure.legend(distinct.values(), distinct.keys(), loc="outside lower center", ncols=2)
    return figure


def title(ranked: list[Recipe], count: int, names: dict[str, str]) -> str:
    """Say which recipe scores lowest."""
    if count == 1:
        return f"Every run of {names[ranked[0].name]}"
    which = f"all {count} recipes"
    if count > len(ranked):
        which = f"the best {len(ranked)} of {count} recipes"
    return f"Every run of {which}: {names[ranked[0].name]} has the lowest mean"


def draw_row(axes: Axes, y: int, recipe: Recipe) -> None:
    scores = list(recipe.scores.values())
    axes.plot(scores, [y] * len(scores), "o", color=COLOURS[0], markerfacecolor="none", label="a run")
    score = Mean(tuple(scores))
    if score.half_width is None:
        return
    bar: dict[str, Any] = {"fmt": "|", "color": "black", "markersize": 6, "capsize": 2, "linewidth": 1}
    line = axes.errorbar(score.mean, y + 0.28, xerr=score.half_width, **bar)
    line.set_label("mean and 95% interval")
