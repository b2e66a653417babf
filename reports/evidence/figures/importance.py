"""Draw the importance of each config field that a study searched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.evidence.figures.axes import format_ticks, label_bar, panels, set_row_names, set_title
from reports.evidence.figures.style import COLOURS, WIDTH
from reports.evidence.load import Study
from reports.evidence.studies import FEWEST, by_importance, comparable, importance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = "By PED-ANOVA, unless the study recorded it: how the best quarter's settings differ from all."
NEEDS = f"an exported importance, or {FEWEST} trials with different values at one rung"
ROWS = 16


def draw(study: Study, height: float | None = None, width: float = WIDTH) -> Figure | None:
    shares = importance(study)
    if not shares:
        return None
    ranked = by_importance(shares, shares)[:ROWS]
    figure, (axes,) = panels(height or 0.7 + 0.2 * len(ranked), width=width)
    for y, name in enumerate(ranked):
        axes.barh(y, shares[name], color=COLOURS[0], height=0.6)
        label_bar(axes, shares[name], y, f"{shares[name]:.3f}")
    set_row_names(axes, ranked)
    axes.set_xlim(0, 1.12 * shares[ranked[0]] or 1)
    axes.set_xlabel("importance, as a share of 1")
    set_title(figure, title(study, ranked[0]))
    axes.grid(axis="y", visible=False)
    format_ticks(axes.xaxis, max(4, int(8 * width / WIDTH)))
    return figure


def title(study: Study, field: str) -> str:
    """Say which field decides most, and from which values this follows."""
    text = f"{field} decides most"
    if isinstance(study.fact("importance"), dict):
        return text
    trials, rung = comparable(study)
    if rung is None:
        return f"{text}, by {len(trials)} trials trained to the end"
    return f"{text}, by the scores of {len(trials)} trials at rung {rung}"
