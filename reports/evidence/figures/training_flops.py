"""Draw the score of every run against the FLOPs of its training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mainrun.stats import Mean, frontier
from reports.evidence.figures.axes import add_legend, format_cost_ticks, format_ticks, panels, set_title
from reports.evidence.figures.forward_flops import differ
from reports.evidence.figures.labels import NAME_SIZE, place_labels
from reports.evidence.figures.series import coloured, short_names
from reports.evidence.figures.style import COLOURS, GREY, MARKERS
from reports.evidence.load import Recipe, ReportData
from reports.evidence.tables import get_flops, mean_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

FRONT = "no cheaper recipe is better"
MAX_SPREAD = (
    2.5  # the frame shows scores up to this many times the distance from the best score to the quartile
)
MIN_RECIPES = 4  # with fewer recipes, the frame shows all scores
MAX_NAMES = 12
MAX_TITLE_NAMES = 2
LEVELS = (0.96, 0.9, 0.84)  # the heights of marks above the frame, so that their scores do not overlap
ARROW = r"$\uparrow$"  # the mark of no recipe
BAR_SHIFT = 6.0  # the distance between the marks of runs and the bar of their recipe, in points


class Point(NamedTuple):
    """A recipe with the index of its color in the palette, and its mean FLOPs and score."""

    recipe: Recipe
    color: int | None
    cost: float
    mean: float


def points_of(data: ReportData) -> list[Point]:
    points = []
    for recipe, index in coloured(data):
        cost = mean_of(recipe.valid_runs, get_flops)
        assert cost, "a report refuses a run without FLOPs"
        points.append(Point(recipe, index, cost, recipe.mean_score))
    return points


def caption(data: ReportData) -> str:
    points = points_of(data)
    text = (
        "Full score of val at the last step against the FLOPs of the whole training. Each mark is a run that "
        "passed its guards. A bar beside the marks shows the mean of several seeds and one standard "
        "deviation. The line joins the recipes whose mean is better than the means of all cheaper recipes."
    )
    if any(point.color is None for point in points):
        text += " Gray marks are the other recipes. Those on the line or with several seeds are named."
    if len(in_frame(points)) < len(points):
        text += " An arrow at the top with a score stands for a recipe above the frame."
    return text


def draw(data: ReportData) -> Figure | None:
    points = points_of(data)
    if not differ([point.cost for point in points]):
        return None
    figure, (axes,) = panels(2.8)
    names = short_names(data, [point.recipe for point in points], 30)
    axes.set_xscale("log")
    for point in points:
        draw_recipe(axes, point, names[point.recipe.name])
    costs = [point.cost for point in points]
    axes.set_xlim(min(costs) / 1.4, max(costs) * 1.4)
    front = [points[i] for i in frontier(costs, [point.mean for point in points])]
    draw_front(axes, front)
    shown = in_frame(points)
    if len(shown) < len(points):
        limit_frame(axes, shown)
        above = sorted((point for point in points if point not in shown), key=lambda point: point.cost)
        for level, point in enumerate(above):
            mark_above_frame(axes, point, names[point.recipe.name], LEVELS[level % len(LEVELS)])
    axes.set(xlabel="FLOPs of the training", ylabel="full, nats per character")
    format_cost_ticks(axes.xaxis)
    format_ticks(axes.yaxis)
    set_title(figure, title_of([names[point.recipe.name] for point in front], len(points)))
    add_legend(figure, axes)
    named = front + [p for p in points if p.color is None and len(p.recipe.scores) > 1 and p not in front]
    named = [point for point in named if point in shown][:MAX_NAMES]
    place_labels(figure, axes, [(names[point.recipe.name], (point.cost, point.mean)) for point in named])
    return figure


def title_of(best: Sequence[str], count: int) -> str:
    """Return the title of the figure for the names of the recipes on the line."""
    if len(best) > MAX_TITLE_NAMES:
        return f"{len(best)} of {count} recipes score better than every cheaper recipe"
    *others, last = best
    names = f"{', '.join(others)} and {last}" if others else last
    return f"No cheaper recipe scores better than {names}"


def in_frame(points: Sequence[Point]) -> list[Point]:
    """Return the recipes that the frame shows.

    A few bad recipes would squeeze all other recipes together, so they are above the frame.
    """
    means = sorted(point.mean for point in points)
    if len(means) < MIN_RECIPES:
        return list(points)
    best = means[0]
    quartile = means[3 * (len(means) - 1) // 4]
    return [point for point in points if point.mean <= best + MAX_SPREAD * (quartile - best)]


def limit_frame(axes: Axes, shown: Sequence[Point]) -> None:
    """Limit the y axis to the runs of some recipes, with room at the top for marks of the other recipes."""
    scores = [score for point in shown for score in point.recipe.scores.values()]
    height = max(scores) - min(scores) or 0.01
    axes.set_ylim(min(scores) - 0.08 * height, max(scores) + 0.2 * height)


def look_of(index: int | None) -> dict[str, Any]:
    if index is None:
        return {"color": GREY, "marker": "o", "zorder": 2}
    return {"color": COLOURS[index], "marker": MARKERS[index], "zorder": 3}


def draw_recipe(axes: Axes, point: Point, name: str) -> None:
    """Draw a mark for each run of a recipe, and a bar if the recipe has several seeds."""
    recipe = point.recipe
    look = look_of(point.color)
    label = "" if point.color is None else name
    flops = [get_flops(run) for run in recipe.valid_runs]
    scores = [run.full for run in recipe.valid_runs]
    axes.plot(flops, scores, linestyle="", markerfacecolor="none", label=label, **look)
    spread = Mean(tuple(scores)).sd
    if spread is None:
        return
    mark = {"fmt": "o", "markersize": 2, "capsize": 1.5, "elinewidth": 0.8, "zorder": look["zorder"]}
    bar = axes.errorbar(point.cost, point.mean, spread, color=look["color"], **mark)
    for artist in bar.get_children():
        artist.set_transform(axes.transData + shift(axes, BAR_SHIFT))


def shift(axes: Axes, points: float) -> Transform:
    """Return a transform that moves a mark to the right by a number of points."""
    from matplotlib.transforms import ScaledTranslation

    return ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)


def draw_front(axes: Axes, front: Sequence[Point]) -> None:
    """Join the best recipes with a step line, which goes on to the right end of the axis."""
    x = [point.cost for point in front] + [axes.get_xlim()[1]]
    y = [point.mean for point in front] + [front[-1].mean]
    axes.step(x, y, where="post", color=GREY, linewidth=0.8, zorder=1, label=FRONT)


def mark_above_frame(axes: Axes, point: Point, name: str, level: float) -> None:
    """Draw an arrow at the top of the frame, with the score of a recipe that lies above the frame."""
    color = look_of(point.color)["color"]
    top = axes.get_xaxis_transform()  # the y coordinate 1 of this transform is the top of the frame
    look = {"marker": ARROW, "markersize": 7, "color": color, "zorder": 3}
    axes.plot([point.cost], [level], linestyle="", transform=top, **look)
    text = f"{point.mean:.4f}"
    if point.color is not None:
        text = f"{name} {text}"
    left, right = axes.get_xlim()
    in_left_half = point.cost**2 < left * right  # the axis is logarithmic
    axes.annotate(
        text,
        (point.cost, level),
        xycoords=top,
        xytext=(5 if in_left_half else -5, 0),
        textcoords="offset points",
        ha="left" if in_left_half else "right",
        va="center",
        fontsize=NAME_SIZE,
    )
