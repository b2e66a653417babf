"""Define the common style of all figures.

Lines have different dash patterns, so that they can be distinguished in a grayscale print. In SVG files,
text is stored as text instead of outlines. Readers can therefore search the text, and the PDF can show the
text in its own font. SVG files contain no dates, so that the same data always gives the same file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WIDTH = 6.7  # the width of a figure in inches
HALF = 3.3  # the width of each of two figures side by side, in inches
FONT = "DejaVu Sans"
# Color-blind readers can distinguish these colors, which are the palette of Okabe and Ito without yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1.2)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (8, 2)),
)
MARKERS = "osD^vP"
GREY = "#8A8A8A"
MOST = len(COLOURS)  # the maximum number of recipes that are drawn in color

STYLE: dict[Any, Any] = {
    "font.family": FONT,
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "mainrun",
    "figure.dpi": 200,
}


@contextmanager
def report_style() -> Iterator[None]:
    """Use the report's style in matplotlib, and ignore the user's matplotlib settings."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def line_style(place: int | None) -> dict[str, Any]:
    """Return arguments for `plot` that set the color and dashes of a line.

    `place` is an index into the color palette. If `place` is None, the line is thin and gray.
    """
    if place is None:
        return {"color": GREY, "linewidth": 0.6, "zorder": 1}
    return {"color": COLOURS[place], "linestyle": DASHES[place], "zorder": 3}
