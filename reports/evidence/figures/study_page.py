"""Choose the figures of the page of a study, and the size of each, so that they fill the page."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from reports.evidence.figures import (
    forward_flops,
    history,
    horizons,
    importance,
    ledger,
    parallel,
    rungs,
    slices,
)
from reports.evidence.figures.style import WIDTH
from reports.evidence.load import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HIGHEST = 1.45  # a row is at most this many times as high as planned
GUTTER = 0.1  # the space between two figures, in inches


class Row(NamedTuple):
    """A row of the page: the names of its figures with their widths in inches, and its planned height."""

    height: float
    names: Mapping[str, float]


# Each row shows the first two of its figures that exist and are in no row above. They fill the row.
ROWS = (
    Row(2.0, {"history": 3.7, "importance": 2.9, "rungs": 2.9}),
    Row(1.8, {"slices": WIDTH}),
    Row(2.0, {"parallel": 3.9, "horizons": 2.7}),
    Row(1.5, {"ledger": 2.9, "rungs": 3.7, "forward-flops": 3.7}),
)
DRAW = {
    "history": history.draw,
    "importance": importance.draw,
    "slices": slices.draw,
    "parallel": parallel.draw,
    "horizons": horizons.draw,
    "ledger": ledger.draw,
    "rungs": rungs.draw,
    "forward-flops": forward_flops.draw_study,
}


def draw(study: Study, room: float) -> dict[str, Figure]:
    """Draw the figures of a study. `room` is the height of all rows together, in inches."""
    figures: dict[str, Figure] = {}
    for row in ROWS:
        for name, width in row.names.items():
            if name in figures:
                continue
            figure = DRAW[name](study, row.height, width)
            if figure is not None:
                figures[name] = figure
    rows = arrange(figures)
    planned = sum(row.height for row in rows)
    for row in rows:
        height = row.height * min(HIGHEST, room / planned)
        for name, width in row.names.items():
            figures[name].set_size_inches(width, height)
    return {name: figures[name] for row in rows for name in row.names}


def arrange(drawn: Collection[str]) -> list[Row]:
    """Return the rows of the figures that were drawn. The figures of each row fill the width of the page."""
    rows = []
    placed: set[str] = set()
    for row in ROWS:
        names = {name: width for name, width in row.names.items() if name in drawn and name not in placed}
        for extra in list(names)[2:]:
            del names[extra]
        placed.update(names)
        free = WIDTH - GUTTER * (len(names) - 1)
        if names:
            used = sum(names.values())
            rows.append(Row(row.height, {name: free * width / used for name, width in names.items()}))
    return rows
