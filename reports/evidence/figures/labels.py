"""Place the names of points in a figure, so that no name covers a point, a line or another name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from reports.evidence.figures.style import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME_SIZE = 7.0  # the font size of a name, in points
LETTER = 0.62  # the mean width of a letter, relative to the font size
MARK = 3.0  # half the width of a mark, in points
GAP = 5.0  # the distance between a mark and the nearest place for its name, in points
CROSSING = 40.0  # the cost of a line that crosses something, compared with the area of a covered name
ON_NAME = 10.0  # the cost of covering or crossing a name, compared with covering or crossing a mark
DISTANCES = (GAP, 14.0, 26.0, 40.0)  # a name that is further away than GAP gets a line to its mark
SHARES = tuple(share / 10 for share in range(3, 11))  # the parts of a line that are checked for crossings
# The directions from a mark to its name. The lower left is first, because no point is to the lower left of a
# recipe on the line.
SIDES = ((-1, -1), (1, -1), (-1, 0), (1, 0), (0, -1), (1, 1), (-1, 1), (0, 1))


class Box(NamedTuple):
    """A rectangle of a figure, in points."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Return the area that two rectangles have in common."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    def shrunk(self, margin: float) -> Box:
        return Box(self.left + margin, self.bottom + margin, self.right - margin, self.top - margin)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.top - self.bottom)


class Place(NamedTuple):
    """A place for a name: the offset of the name from its mark, and the rectangle that the name fills."""

    dx: float
    dy: float
    side: tuple[int, int]
    box: Box
    line: tuple[Box, ...]  # small squares along the line from the mark to the name


def place_labels(figure: Figure, axes: Axes, names: Iterable[tuple[str, tuple[float, float]]]) -> None:
    """Write names next to their points. Call this function after everything else is drawn."""
    figure.draw_without_rendering()  # this call fixes the positions of the axes
    frame = _box(axes, axes.bbox.corners()).shrunk(MARK)
    taken = list(_obstacles(axes))
    names_at: list[Box] = []
    lines: list[Box] = []
    for name, point in names:
        x, y = _points(axes, axes.transData.transform([point]))[0]
        best = min(_places(name, x, y), key=lambda place: _cost(place, taken, names_at, lines, frame))
        names_at.append(best.box)
        lines += best.line
        _write(axes, name, point, best)


def _write(axes: Axes, text: str, point: tuple[float, float], place: Place) -> None:
    right, up = place.side
    line: dict[str, Any] | None = None
    if place.line:
        near = ((1 - right) / 2, (1 - up) / 2)  # the corner or the side of the name that is next to its mark
        line = {
            "arrowstyle": "-",
            "color": GREY,
            "linewidth": 0.5,
            "shrinkA": 0,
            "shrinkB": 3,
            "relpos": near,
        }
    label = axes.annotate(
        text,
        point,
        xytext=(place.dx, place.dy),
        textcoords="offset points",
        ha=("center", "left", "right")[right],
        va=("center", "bottom", "top")[up],
        fontsize=NAME_SIZE,
        arrowprops=line,
        zorder=4,
    )
    label.set_in_layout(False)


def _places(text: str, x: float, y: float) -> Iterator[Place]:
    """Yield the possible places for a name, from the best one to the worst one."""
    width = LETTER * NAME_SIZE * len(text)
    height = 1.05 * NAME_SIZE
    for distance in DISTANCES:
        for right, up in SIDES:
            dx = distance * right
            dy = distance * up
            left = x + dx + width * (right - 1) / 2
            bottom = y + dy + height * (up - 1) / 2
            box = Box(left, bottom, left + width, bottom + height)
            line: tuple[Box, ...] = ()
            if distance > GAP:
                line = tuple(_square(x + share * dx, y + share * dy, 1) for share in SHARES)
            yield Place(dx, dy, (right, up), box, line)


def _cost(place: Place, taken: list[Box], names: list[Box], lines: list[Box], frame: Box) -> float:
    """Return the cost of a place.

    The cost is the area that is covered or outside the frame, plus a penalty for each crossing.
    """
    outside = place.box.area - place.box.overlap(frame)
    covered = sum(map(place.box.overlap, taken)) + ON_NAME * sum(map(place.box.overlap, names))
    crossings = ON_NAME * sum(place.box.overlap(square) > 0 for square in lines)
    for square in place.line:
        crossings += any(square.overlap(box) for box in (*taken, *lines))
        crossings += ON_NAME * any(square.overlap(box) for box in names)
    return round(outside + covered + CROSSING * crossings, 3)


def _square(x: float, y: float, half: float) -> Box:
    return Box(x - half, y - half, x + half, y + half)


def _obstacles(axes: Axes) -> Iterator[Box]:
    """Yield the rectangles of all marks and of all horizontal and vertical lines of a panel."""
    for line in axes.get_lines():
        path = line.get_transform().transform_path(line.get_path())
        corners = _points(axes, np.asarray(path.vertices))
        for x, y in corners:
            yield _square(x, y, MARK)
        if line.get_linestyle() != "None":
            for (x1, y1), (x2, y2) in pairwise(corners):
                yield Box(min(x1, x2) - 1, min(y1, y2) - 1, max(x1, x2) + 1, max(y1, y2) + 1)


def _points(axes: Axes, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(pixels) * 72 / axes.figure.dpi


def _box(axes: Axes, corners: np.ndarray) -> Box:
    points = _points(axes, corners)
    return Box(*points.min(axis=0), *points.max(axis=0))
