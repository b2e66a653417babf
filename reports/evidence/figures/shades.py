"""Color trials by their value: the darker a mark or a line, the better the trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reports.evidence.figures.style import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STOPS = ("#0B2A5B", "#2F86C6", "#C4CBD6")  # from the best value to the worst; their grays differ, too
CLEAR = 0.85  # values above this quantile have the lightest shade
BEST = COLOURS[1]


def frame(values: Sequence[float]) -> tuple[float, float]:
    """Return the values that have the darkest and the lightest shade."""
    ordered = sorted(values)
    return ordered[0], ordered[min(len(ordered) - 1, int(CLEAR * len(ordered)))]


def shade(value: float, low: float, high: float) -> str:
    """Return the color of a value, if `low` has the darkest shade and `high` the lightest."""
    share = 0.0
    if high > low:
        share = min(1.0, max(0.0, (value - low) / (high - low)))
    half = min(1, int(2 * share))
    a, b = STOPS[half], STOPS[half + 1]
    part = 2 * share - half
    mixed = []
    for i in (1, 3, 5):
        first, second = int(a[i : i + 2], 16), int(b[i : i + 2], 16)
        mixed.append(round(first + part * (second - first)))
    return "#" + "".join(f"{number:02X}" for number in mixed)


def shades(values: Sequence[float]) -> list[str]:
    low, high = frame(values)
    return [shade(value, low, high) for value in values]


def add_key(axes: Axes, values: Sequence[float], **look: Any) -> None:
    """Add three marks to the legend: the darkest shade, a middle one and the lightest, with their values."""
    low, high = frame(values)
    middle = sorted(value for value in values if value <= high)
    median = middle[len(middle) // 2]
    places = {low: f"{low:.4f}", median: f"{median:.4f}", high: f"{high:.4f} or more"}
    if low == high:
        places = {low: f"{low:.4f}"}
    for value, label in places.items():
        axes.plot([], [], color=shade(value, low, high), label=label, **look)
