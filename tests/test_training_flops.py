"""Tests the figure of the scores against the FLOPs of training, and the places of the names in it."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from evidence import failing, make_data, make_recipe
from matplotlib.text import Text

from reports.evidence.figures import labels, style, training_flops
from reports.evidence.load import Recipe, ReportData


def drawn(data: ReportData) -> Any:
    with style.report_style():
        figure = training_flops.draw(data)
    assert figure is not None
    return figure


def points(axes: Any, label: str) -> list[tuple[float, float]]:
    lines = [line for line in axes.get_lines() if line.get_label() == label]
    return [(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)]


def names(axes: Any) -> set[str]:
    return {text.get_text() for text in axes.texts}


CHEAP = make_recipe("baseline", {1: 2.0, 2: 2.1}, flops=1e12)
WORSE = make_recipe("optimized", {1: 2.3}, flops=4e12)
BEST = make_recipe("best", {1: 1.5}, flops=9e12)
BAD = make_recipe("bad", {1: 0.1}, flops=2e12, guards=failing())


def test_runs_means_and_the_front() -> None:
    (axes,) = drawn(make_data(CHEAP, WORSE, BEST, BAD)).get_axes()
    assert axes.get_xscale() == "log"
    assert points(axes, "baseline") == [(1e12, 2.0), (1e12, 2.1)], "one mark for each run"
    assert points(axes, "optimized") == [(4e12, 2.3)]
    front = points(axes, training_flops.FRONT)
    end = axes.get_xlim()[1]
    assert front == [(1e12, 2.05), (9e12, 1.5), (end, 1.5)], "the dearer one is worse"
    assert names(axes) == {"baseline", "best"}, "the recipes on the line are named"
    assert (
        training_flops.title_of(["baseline", "best"], 3)
        == "No cheaper recipe scores better than baseline and best"
    )
    assert (
        training_flops.title_of(["a", "b", "c"], 9) == "3 of 9 recipes score better than every cheaper recipe"
    )
    assert points(axes, "bad") == [] and 2e12 not in [x for x, _ in front]
    (bar,) = axes.containers
    assert bar.lines[0].get_data() == ([1e12], [2.05]), "only a recipe with two seeds has a bar"
    (low, high) = bar.lines[2][0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 0.1 / 2**0.5), "one standard deviation to each side"
    markers = {line.get_label(): line.get_marker() for line in axes.get_lines()}
    assert len({markers[name] for name in ("baseline", "optimized", "best")}) == 3


def test_equal_costs_are_not_drawn() -> None:
    alike = make_recipe("other", {1: 1.9}, flops=1.0001e12)
    for recipes in ((), (CHEAP,), (CHEAP, alike), (CHEAP, BAD)):
        assert training_flops.draw(make_data(*recipes)) is None


def many() -> ReportData:
    recipes: list[Recipe] = [make_recipe("baseline", {1: 9.0}, flops=5e12)]
    for i in range(12):
        seeds = {1: 2 - 0.01 * i, 2: 2.001 - 0.01 * i} if i % 4 == 0 else {1: 2 - 0.004 * i}
        recipes.append(make_recipe(f"recipe-{i}", seeds, flops=(1 + 0.07 * i) * 1e12))
    return make_data(*recipes)


def test_a_bad_recipe_does_not_squeeze_the_others() -> None:
    data = many()
    (axes,) = drawn(data).get_axes()
    low, high = axes.get_ylim()
    scores = [run.full for recipe in data.recipes[1:] for run in recipe.valid_runs]
    assert low < min(scores) and max(scores) < high < 3
    assert "baseline 9.0000" in names(axes)
    assert training_flops.ARROW in [line.get_marker() for line in axes.get_lines()]
    assert training_flops.ARROW not in style.MARKERS
    assert "An arrow" in training_flops.caption(data) and "Gray marks" in training_flops.caption(data)
    few = make_data(CHEAP, WORSE, make_recipe("far", {1: 30.0}, flops=2e12))
    assert drawn(few).get_axes()[0].get_ylim()[1] > 30, "three recipes are all in the frame"
    assert "arrow" not in training_flops.caption(few) and "Grey" not in training_flops.caption(few)


def test_grey_recipes_with_several_seeds_are_named() -> None:
    (axes,) = drawn(many()).get_axes()
    assert {"recipe-4", "recipe-8"} <= names(axes)
    assert len(names(axes)) <= training_flops.MAX_NAMES + 1


def test_names_cover_neither_each_other_nor_marks() -> None:
    figure = drawn(many())
    (axes,) = figure.get_axes()
    figure.draw_without_rendering()
    renderer = figure._get_renderer()
    boxes = {text.get_text(): Text.get_window_extent(text, renderer) for text in axes.texts}
    assert len(boxes) > 5
    for (one, a), (two, b) in combinations(boxes.items(), 2):
        assert not a.overlaps(b), (one, two)
    frame = axes.get_window_extent(renderer)
    for recipe in many().recipes[1:]:
        for run in recipe.valid_runs:
            x, y = axes.transData.transform((run.summary["flops"], run.full))
            for name, box in boxes.items():
                assert not box.contains(x, y), (name, recipe.name)
    for name, box in boxes.items():
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, name


def boxes_of(points: list[tuple[float, float]], marks: list[tuple[float, float]]) -> tuple[Any, list[Any]]:
    """Return the panel, and the rectangle of the name of each point. The panel is one unit wide and high."""
    from reports.evidence.figures.axes import panels

    figure: Any
    with style.report_style():
        figure, (axes,) = panels(3.0)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.plot(*zip(*points, *marks, strict=True), "o")
        labels.place_labels(figure, axes, [(f"a long name {i}", point) for i, point in enumerate(points)])
        figure.draw_without_rendering()
        renderer = figure._get_renderer()
        return axes, [Text.get_window_extent(text, renderer) for text in axes.texts]  # without lines


def test_a_name_is_to_the_lower_left_of_its_mark_if_there_is_room() -> None:
    axes, (box,) = boxes_of([(0.5, 0.5)], [])
    x, y = axes.transData.transform((0.5, 0.5))
    assert box.x1 < x and box.y1 < y
    assert axes.texts[0].arrow_patch is None, "a near name needs no line"


@pytest.mark.parametrize("point", [(0.01, 0.5), (0.5, 0.01), (0.01, 0.01), (0.99, 0.99), (0.99, 0.01)])
def test_a_name_stays_in_the_frame(point: tuple[float, float]) -> None:
    axes, (box,) = boxes_of([point], [])
    frame = axes.get_window_extent()
    assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def test_a_name_avoids_the_marks_around_its_own() -> None:
    around = [(0.46, 0.46), (0.54, 0.46), (0.46, 0.5), (0.54, 0.5), (0.5, 0.46), (0.54, 0.54), (0.46, 0.54)]
    for marks in (around[:2], around[:4], around):
        axes, (box,) = boxes_of([(0.5, 0.5)], marks)
        for mark in marks:
            assert not box.contains(*axes.transData.transform(mark)), len(marks)


def test_names_of_close_points_do_not_overlap() -> None:
    points = [(0.5 + 0.02 * i, 0.5 - 0.03 * i) for i in range(5)]
    _, boxes = boxes_of(points, [])
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_the_overlap_of_boxes() -> None:
    box = labels.Box(0, 0, 4, 2)
    assert box.area == 8 and box.overlap(box) == 8
    assert box.overlap(labels.Box(3, 1, 9, 9)) == 1
    assert box.overlap(labels.Box(4, 0, 9, 9)) == box.overlap(labels.Box(9, 9, 10, 10)) == 0
    assert labels.Box(0, 0, 10, 10).shrunk(1) == labels.Box(1, 1, 9, 9)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1e12, 8e12, ["1T", "1.5T", "2T", "3T", "4T", "5T", "6T", "8T"]),
        (1e12, 2e14, ["1T", "2T", "5T", "10T", "20T", "50T", "100T", "200T"]),
        (1e12, 2e16, ["1T", "10T", "100T", "1P", "10P"]),
    ],
)
def test_the_ticks_of_costs_are_round_numbers(low: float, high: float, ticks: list[str]) -> None:
    from reports.evidence.figures.axes import format_cost_ticks, panels

    _, (axes,) = panels(2.0)
    axes.set_xscale("log")
    axes.set_xlim(low * 0.99, high * 1.01)
    format_cost_ticks(axes.xaxis)
    left, right = axes.get_xlim()
    shown = [axes.xaxis.get_major_formatter()(x) for x in axes.get_xticks() if left <= x <= right]
    assert shown == ticks
