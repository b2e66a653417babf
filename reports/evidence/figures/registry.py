"""List every figure of a report.

To add a figure, write a module with a function `draw` and a caption, and add a row to a table in this file.
`draw` returns a matplotlib figure, or None if the inputs have no data for the figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reports.evidence.figures import (
    curves,
    forward_flops,
    front,
    gap,
    grad_norms,
    growth,
    history,
    horizons,
    importance,
    ledger,
    parallel,
    routing,
    rungs,
    schedules,
    seeds,
    slices,
    study_page,
    training_flops,
    waterfall,
)
from reports.evidence.load import ReportData, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The headings of the sections that show figures of runs.
RESULT = "Result"
COST = "Loss against what it costs"
ABLATION = "Ablation"
TRAINING = "How they trained"
ROOM = 6.0  # the height of all figures of a study, in inches


@dataclass(frozen=True)
class RunFigure:
    """A figure that shows runs, and the section that contains the figure."""

    section: str  # the heading of the section that contains the figure
    draw: Callable[[ReportData], Figure | None]
    caption: Callable[[ReportData], str]
    title: str = ""  # the heading that is printed directly above the figure


@dataclass(frozen=True)
class StudyFigure:
    """A figure that shows the trials of a study."""

    draw: Callable[[Study], Figure | None]
    caption: str
    needs: str  # the data that `draw` needs, as described in the appendix


RUNS = {
    "curves": RunFigure(COST, curves.draw, curves.caption),
    "training-flops": RunFigure(COST, training_flops.draw, training_flops.caption),
    "forward-flops": RunFigure(COST, forward_flops.draw, forward_flops.caption),
    "seeds": RunFigure(COST, seeds.draw, seeds.caption),
    "waterfall": RunFigure(ABLATION, waterfall.draw, waterfall.caption),
    "gap": RunFigure(TRAINING, gap.draw, gap.caption, "Train and validation"),
    "grad-norms": RunFigure(
        TRAINING, grad_norms.draw, grad_norms.caption, "Gradient norms by layer at the first steps"
    ),
    "schedules": RunFigure(TRAINING, schedules.draw, schedules.caption, "Schedules"),
}
STUDY = {
    "history": StudyFigure(history.draw, history.CAPTION, history.NEEDS),
    "importance": StudyFigure(importance.draw, importance.CAPTION, importance.NEEDS),
    "forward-flops": StudyFigure(forward_flops.draw_study, forward_flops.STUDY_CAPTION, forward_flops.NEEDS),
    "ledger": StudyFigure(ledger.draw, ledger.CAPTION, ledger.NEEDS),
    "slices": StudyFigure(slices.draw, slices.CAPTION, slices.NEEDS),
    "parallel": StudyFigure(parallel.draw, parallel.CAPTION, parallel.NEEDS),
    "rungs": StudyFigure(rungs.draw, rungs.CAPTION, rungs.NEEDS),
    "horizons": StudyFigure(horizons.draw, horizons.CAPTION, horizons.NEEDS),
}


def draw_all(
    data: ReportData, room: float = 3.2, rooms: Mapping[int, float] | None = None
) -> dict[str, Figure]:
    """Draw every figure for which the inputs have data. Heights are in inches.

    `room` is the height of the figures of page 1. `rooms` maps the number of a study to the height of the
    figures on its page. Call this function inside the context manager `report_style`.
    """
    rooms = rooms or {}
    figures: dict[str, Figure | None] = front.draw(data, room)
    for name, row in RUNS.items():
        if name not in figures:
            figures[name] = row.draw(data)
    for i, run in enumerate(growth.grown_runs(data), 1):
        figures[f"growth-{i}"] = growth.draw(run)
    for i, run in enumerate(routing.routed_runs(data), 1):
        figures[f"routing-{i}"] = routing.draw(run)
    for i, study in enumerate(data.studies, 1):
        for name, figure in study_page.draw(study, rooms.get(i, ROOM)).items():
            figures[f"study-{i}-{name}"] = figure
    return {name: figure for name, figure in figures.items() if figure is not None}
