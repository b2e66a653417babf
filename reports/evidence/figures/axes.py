"""Create the panels of figures, and set their ticks, labels, legends and axis limits."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reports.evidence.figures.style import COLOURS, WIDTH

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

LEGEND_WIDTH = 108  # the maximum number of characters in one row of the legend
TITLE_SIZE = 8.0  # the font size of the title of a figure, in points
TITLE_LETTER = 0.62  # the mean width of a bold letter, relative to the font size
ROUND = (1, 2, 2.5, 5, 10)  # the ticks of a linear axis are multiples of these numbers
LETTER = 4.2  # the mean width of a letter of the legend, in points
KEY = 31.0  # the width of a line of the legend with its gaps, in points
SUFFIXES = ("", "K", "M", "G", "T", "P", "E")


def panels(
    height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Return a figure, which is usually as wide as the page, and the axes of its panels, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes.ravel()


def set_title(figure: Figure, text: str) -> None:
    """Write a sentence above all panels of a figure, which says what the figure shows."""
    letters = int(figure.get_figwidth() * 72 / (TITLE_LETTER * TITLE_SIZE))
    lines = textwrap.wrap(text, letters)
    options = {"x": 0.002, "ha": "left", "fontsize": TITLE_SIZE, "fontweight": "bold"}
    figure.suptitle("\n".join(lines), **options)


def tick_text(value: float, _position: Any = None) -> str:
    """Format the label of a tick. Large numbers are shortened with a suffix, such as 1.5M for 1,500,000."""
    if value == 0 or not math.isfinite(value):
        return "0"
    if abs(value) >= 1e3:
        power = min(int(math.log10(abs(value)) / 3 + 1e-9), len(SUFFIXES) - 1)
        return f"{value / 1000**power:.4g}{SUFFIXES[power]}"
    if abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:.4g}"


def format_ticks(axis: Axis, most: int = 5) -> None:
    """Format the ticks of an axis. The ticks divide a linear axis into at most `most` intervals."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    if axis.get_scale() == "linear":
        axis.set_major_locator(MaxNLocator(most, steps=ROUND))
    axis.set_major_formatter(FuncFormatter(tick_text))
    axis.set_minor_formatter(NullFormatter())


def format_panel_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Set only a few ticks on an axis, so that the labels of the ticks fit into a narrow panel."""
    from matplotlib.ticker import FixedLocator, NullLocator

    if axis.get_scale() == "log":
        axis.set_major_locator(FixedLocator(log_ticks(min(values), max(values))))
        axis.set_minor_locator(NullLocator())
    format_ticks(axis, 3)


def log_ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Return round numbers for the ticks of a logarithmic axis.

    The ticks are decades. If the values span less than two decades, the ticks are 1, 2 and 5 times a decade.
    """
    digits: tuple[float, ...] = (1.0,)
    if high < 100 * low:
        digits = (1.0, 2.0, 5.0)
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high))
    slack = 1.1  # a tick just outside the values is inside the margin of the axis
    ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    ticks = [tick for tick in ticks if low / slack <= tick <= high * slack]
    return ticks[:: max(1, math.ceil(len(ticks) / most))]


def format_cost_ticks(axis: Axis) -> None:
    """Set about four to ten ticks on a logarithmic axis of costs, at round numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    digits: tuple[float, ...] = (1.0,)
    if decades < 1:
        digits = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    elif decades < 3:
        digits = (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(10, digits))
    axis.set_minor_locator(NullLocator())
    format_ticks(axis)


def set_row_names(axes: Axes, names: Sequence[str]) -> None:
    """Label the rows of a horizontal chart, with the first row at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def label_bar(axes: Axes, x: float, y: float, text: str) -> None:
    """Write a label to the right of a bar.

    The gap before the label is an offset in points, because SVG ignores leading spaces.
    """
    axes.annotate(text, (x, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)


def label_best(axes: Axes, point: tuple[float, float], text: str) -> None:
    """Draw a ring around the best trial, and write a text above the ring, inside the panel."""
    axes.plot(*point, "o", color=COLOURS[1], markersize=6.5, markerfacecolor="none", zorder=4)
    options: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "va": "bottom", "zorder": 5}
    axes.get_xlim()  # this call scales the axes
    x = axes.transAxes.inverted().transform(axes.transData.transform(point))[0]
    side = "center"
    if x > 0.8:
        side = "right"
    elif x < 0.2:
        side = "left"
    axes.annotate(text, point, xytext=(0, 5), ha=side, **options)


def shorten(text: str, width: int) -> str:
    """Shorten a text that has `width` or more characters. A shortened text ends with an ellipsis."""
    if len(text) < width:
        return text
    return text[: width - 1] + "…"


def add_legend(figure: Figure, axes: Axes) -> None:
    """Add a legend below the panels of a figure, so that the legend does not cover any line."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    longest = max(map(len, labels))
    width = int(LEGEND_WIDTH * figure.get_figwidth() / WIDTH)
    columns = max(1, min(len(labels), width // (longest + 8)))
    if sum(LETTER * len(label) + KEY for label in labels) <= 72 * figure.get_figwidth():
        columns = len(labels)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1
    )


def set_score_limits(axes: Axes, values: Sequence[float]) -> None:
    """Limit the y axis to the lowest 85% of the values, with a margin.

    Without this limit, the high scores of the untrained model would squeeze all later scores together.
    """
    if not values:
        return
    ordered = sorted(values)
    low = ordered[0]
    high = ordered[-1]
    late = ordered[: max(2, int(0.85 * len(values)))][-1]
    if low == high:
        return
    axes.set_ylim(low - 0.06 * (late - low), min(high, late + 0.35 * (late - low)) + 0.02 * (high - low))
