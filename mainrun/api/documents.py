"""Write the PDF report from Python."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from mainrun.api import html
from mainrun.api.calls import Place, path_of, plain_errors
from mainrun.api.runs import Run
from mainrun.api.studies import Study
from mainrun.errors import UsageError


@dataclass(frozen=True)
class Report:
    """A report that was written to `path`."""

    path: Path
    claim: str
    findings: list[str]
    pages: int

    def _repr_html_(self) -> str:
        facts = [("claim", self.claim), ("pages", str(self.pages)), *(("", text) for text in self.findings)]
        link = f'<a href="{escape(str(self.path))}">{escape(str(self.path))}</a>'
        return html.card("Report", facts, link)


def report(
    *places: Run | Study | Place,
    out: Place = "report.pdf",
    title: str = "Mainrun report",
    figures: Place | None = None,
    tables: Place | None = None,
    samples: int = 8,
    compare: str | None = None,
) -> Report:
    """Write a PDF of runs and studies, as `mainrun report` does.

    places: runs, studies, or folders that contain them. By default, the folder "runs".
    out: the path of the PDF.
    figures, tables: folders to which each figure and each table is also written.
    samples: the number of titles to generate with each of the two main recipes.
    compare: the names of these two recipes, such as "record,optimized".
    """
    from mainrun.ui.console import check_regular_file
    from reports import cli
    from reports.evidence import load

    file = path_of(out, "out")
    check_regular_file(file, "out", b"%PDF", "PDF")
    if not title.strip() or not title.isprintable():
        raise UsageError(f"got title={title!r}, which cannot be printed; give one line of printable text")
    drawn = None if figures is None else path_of(figures, "figures")
    listed = None if tables is None else path_of(tables, "tables")
    with plain_errors():
        data = load.gather([_place(place) for place in places])
        if compare is not None:
            data = load.choose_pair(data, compare, "compare")
        made = cli.write(data, file, title, drawn, listed, samples=samples)
    findings = made["findings"]
    assert isinstance(findings, list)
    return Report(
        file.absolute(), str(made["claim"]), [str(each) for each in findings], int(str(made["pages"]))
    )


def _place(place: Run | Study | Place) -> str:
    if isinstance(place, Study):
        return str(place.path / "export")
    return str(place.path if isinstance(place, Run) else path_of(place, "place"))
