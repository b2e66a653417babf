"""Draw the importance of each config field that a study searched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.evidence.figures.axes import format_ticks, label_bar, panels, set_row_names, set_title
from reports.evidence.figures.style import COLOURS, WIDTH
from reports.evidence.load import Study
from reports.evidence.studies import FEWEST, by_importance, importance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "How strongly each field affects the value. If the export does not contain the importance, PED-ANOVA "
    "computes the importance. PED-ANOVA compares the settings of the best quarter of the trials with the "
    "settings of all trials that were trained to the end, and its shares sum to 1."
)
NEEDS = f"an exported importance, or {FEWEST} trials trained to the end whose values differ"
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
    set_title(figure, f"{ranked[0]} decides most: importance {shares[ranked[0]]:.3f}")
    axes.grid(axis="y", visible=False)
    format_ticks(axes.xaxis, max(4, int(8 * width / WIDTH)))
    return figure
