"""The figures of a report: one module per figure, and a registry of all of them."""

from reports.evidence.figures.growth import grown_runs
from reports.evidence.figures.registry import STUDY, draw_all
from reports.evidence.figures.style import FONT, MOST, report_style

__all__ = ["FONT", "MOST", "STUDY", "draw_all", "grown_runs", "report_style"]
