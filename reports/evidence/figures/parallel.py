"""Draw a parallel coordinate plot, in which each trial is a line through the values of its fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reports.evidence.figures.axes import add_legend, panels, set_title, shorten
from reports.evidence.figures.shades import BEST, add_key, shades
from reports.evidence.figures.style import WIDTH
from reports.evidence.load import Study
from reports.evidence.studies import Scale, by_importance, importance, settings, values, with_field

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Each line is a trial that was trained to the end and has all of these fields. Darker lines are better."
)
NEEDS = "three trials trained to the end, and two fields with more than one setting"
FIELDS = 8


def draw(study: Study, height: float = 2.4, width: float = WIDTH) -> Figure | None:
    most = max(4, int(FIELDS * width / WIDTH))
    fields = by_importance(study.searched_fields, importance(study))[:most]
    trials = study.completed
    for field in fields:
        trials = with_field(trials, field)
    if len(fields) < 2 or len(trials) < 3:
        return None
    figure, (axes,) = panels(height, width=width)
    heights = []
    for x, field in enumerate(fields):
        scale = Scale.of_field(study, field, settings(trials, field))
        heights.append(scale.unit())
        draw_field(axes, x, scale)
    scores = values(trials)
    lines = np.stack(heights, axis=1)  # array of shape (trials, fields)
    draw_lines(axes, lines, scores)
    best = int(np.argmin(scores))
    label = f"best: {trials[best]['trial']}"
    axes.plot(range(len(fields)), lines[best], color=BEST, linewidth=1.8, marker="s", zorder=4, label=label)
    add_key(axes, scores)
    set_field_names(axes, fields)
    set_title(figure, f"The settings of {len(trials)} trials, and those of the best one")
    add_legend(figure, axes)
    return figure


def draw_field(axes: Axes, x: int, scale: Scale) -> None:
    """Draw the vertical axis of a field, and label the ends with the lowest and the highest value."""
    if scale.names:
        low = scale.names[0]
        high = scale.names[-1]
    else:
        low = f"{min(scale.places):.3g}"
        high = f"{max(scale.places):.3g}"
    axes.text(x, -0.03, shorten(low, 14), ha="center", va="top", fontsize=7)
    axes.text(x, 1.03, shorten(high, 14), ha="center", va="bottom", fontsize=7)
    axes.plot([x, x], [0, 1], color="black", linewidth=0.6)


def draw_lines(axes: Axes, lines: np.ndarray, scores: Sequence[float]) -> None:
    """Draw a line for each trial in the shade of its value. Better trials are drawn on top."""
    colors = shades(scores)
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        axes.plot(range(lines.shape[1]), lines[i], color=colors[i], linewidth=0.7)


def set_field_names(axes: Axes, fields: list[str]) -> None:
    names = []
    for field in fields:
        if len(field) < 16:
            names.append(field)
        else:
            names.append("…" + field[-15:])
    axes.set_xticks(range(len(fields)), names)
    axes.tick_params(axis="x", length=0, pad=12)
    axes.set_yticks([])
    axes.set_ylim(-0.04, 1.06)
    axes.set_xlim(-0.4, len(fields) - 0.6)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
