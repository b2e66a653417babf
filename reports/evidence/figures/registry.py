"""Every figure of a report. To add one, write a module with a function `draw` and add a row here.

`draw` returns a matplotlib figure, or None if the inputs have no data for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from reports.evidence.figures import (
    curves,
    gap,
    growth,
    headline,
    history,
    importance,
    ledger,
    parallel,
    rungs,
    schedules,
    seeds,
    slices,
    waterfall,
)
from reports.evidence.figures.growth import grown_runs
from reports.evidence.load import Evidence, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUNS: dict[str, Callable[[Evidence], Figure | None]] = {
    "headline": headline.draw,
    "curves": curves.draw,
    "seeds": seeds.draw,
    "gap": gap.draw,
    "schedules": schedules.draw,
    "waterfall": waterfall.draw,
}
STUDY: dict[str, Callable[[Study], Figure | None]] = {
    "history": history.draw,
    "importance": importance.draw,
    "slices": slices.draw,
    "parallel": parallel.draw,
    "rungs": rungs.draw,
    "ledger": ledger.draw,
}


def draw_all(e: Evidence) -> dict[str, Figure]:
    """Draw every figure that the inputs have data for, by name. Call it inside `report_style`."""
    figures: dict[str, Figure | None] = {}
    for name, draw in RUNS.items():
        figures[name] = draw(e)
    for i, run in enumerate(grown_runs(e), 1):
        figures[f"growth-{i}"] = growth.draw(run)
    for i, study in enumerate(e.studies, 1):
        for name, draw_study in STUDY.items():
            figures[f"study-{i}-{name}"] = draw_study(study)
    return {name: figure for name, figure in figures.items() if figure is not None}
