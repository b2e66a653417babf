"""Lay out the PDF with reportlab, and insert SVG figures into the PDF as vector graphics.

The PDF is reproducible, which means that the same input always gives the same bytes. `pages.py` defines the
content of the pages.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from mainrun import __version__
from mainrun.store.rundir import disk_errors
from reports.evidence.figures.registry import draw_all
from reports.evidence.figures.style import FONT, report_style
from reports.evidence.load import ReportData
from reports.evidence.tables import Column, Table

if TYPE_CHECKING:
    from reportlab.graphics.shapes import Drawing
    from reportlab.platypus import Flowable

BOLD = f"{FONT}-Bold"
RED = "#B00020"
GREY = "#444444"
CREATOR = "mainrun report"
COLUMN = 487.0  # the width of the text in points, which is slightly more than the width of a figure
MARGIN = 54.0
GAP = 6.0  # the gap between two columns of a table, in points
CELL_SIZE = 7  # the font size of table cells, in points
LONGEST_TITLE = 90  # the maximum number of characters of the title in the footer


@cache
def register_fonts() -> None:
    """Register the fonts for the text and the figures of the report. The font files come with matplotlib."""
    import matplotlib
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFont
    from svglib import fonts as svg

    for name, file in ((FONT, "DejaVuSans.ttf"), (BOLD, "DejaVuSans-Bold.ttf")):
        path = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / file)
        pdfmetrics.registerFont(TTFont(name, path))
        svg.register_font(name, path, rlgFontName=name)
    # `path` is that of the bold font
    for weight in ("bold", "700"):  # both words are used for bold text in SVG
        svg.register_font(FONT, path, weight, rlgFontName=BOLD)
    pdfmetrics.registerFontFamily(FONT, normal=FONT, bold=BOLD, italic=FONT, boldItalic=BOLD)


def to_drawing(svg: bytes) -> Drawing:
    """Convert an SVG image to a reportlab drawing."""
    register_fonts()
    from svglib.svglib import svg2rlg

    drawing = svg2rlg(io.BytesIO(svg))
    assert drawing is not None, "matplotlib wrote an invalid SVG"
    drawing.hAlign = "LEFT"
    return drawing


def render_figures(
    data: ReportData, folder: Path | None, room: float = 3.2, rooms: Mapping[int, float] | None = None
) -> dict[str, bytes]:
    """Return each figure as SVG. If `folder` is given, also write SVG and PNG files to the folder.

    `room` and `rooms` are the heights that `draw_all` takes.
    """
    svgs = {}
    with report_style():
        for name, figure in draw_all(data, room, rooms).items():
            out = io.BytesIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": CREATOR})
            svgs[name] = out.getvalue()
            if folder:
                with disk_errors(folder, "--figures"):
                    (folder / f"{name}.svg").write_bytes(svgs[name])
                    figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": CREATOR})
    return svgs


# -- blocks of a page


def paragraph(text: str, style: str = "body") -> Flowable:
    from reportlab.platypus import Paragraph

    return Paragraph(escape(text), styles()[style])


def figure(
    drawings: Mapping[str, Drawing], name: str, caption: str, title: str = "", section: str = ""
) -> list[Flowable]:
    """Return a figure with its title and caption, which stay together on one page.

    If the figure is the first one of a section, the heading of the section stays with it. If the figure was
    not drawn, return an empty list.
    """
    from reportlab.platypus import KeepTogether, Spacer

    if name not in drawings:
        return []
    block = [drawings[name], paragraph(caption, "caption"), Spacer(1, 6)]
    if title:
        block.insert(0, heading(title, 1))
    if section:
        block.insert(0, heading(section, 0))
    return [KeepTogether(block)]


def big_numbers(cells: Sequence[tuple[str, str, str]], note: str) -> list[Flowable]:
    """Return numbers in large type, side by side, each with a line above and a line below it."""
    from reportlab.platypus import Table as PdfTable

    rows = [
        [paragraph(above, "small") for above, _, _ in cells],
        [paragraph(number, "number") for _, number, _ in cells],
        [paragraph(below, "small") for _, _, below in cells],
    ]
    style = [
        ("LEFTPADDING", (0, 0), (-1, -1), 0),
        ("RIGHTPADDING", (0, 0), (-1, -1), GAP),
        ("TOPPADDING", (0, 0), (-1, -1), 0),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 0),
        ("VALIGN", (0, 0), (-1, 0), "BOTTOM"),
        ("VALIGN", (0, 1), (-1, -1), "TOP"),
    ]
    pdf_table = PdfTable(rows, colWidths=[COLUMN / len(cells)] * len(cells), style=style, hAlign="LEFT")
    return [pdf_table, paragraph(note, "caption")]


def side_by_side(figures: Sequence[tuple[Drawing, str]]) -> list[Flowable]:
    """Return figures next to each other, each with its caption below it."""
    from reportlab.platypus import Table as PdfTable

    if not figures:
        return []
    rows = [[drawing for drawing, _ in figures], [paragraph(caption, "caption") for _, caption in figures]]
    style = [
        ("LEFTPADDING", (0, 0), (-1, -1), 0),
        ("RIGHTPADDING", (0, 0), (-1, -1), GAP),
        ("TOPPADDING", (0, 0), (-1, -1), 0),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 0),
        ("VALIGN", (0, 0), (-1, -1), "TOP"),
    ]
    widths = [COLUMN * drawing.width / sum(each.width for each, _ in figures) for drawing, _ in figures]
    return [PdfTable(rows, colWidths=widths, style=style, hAlign="LEFT")]


def heights(flowables: Iterable[Flowable], share: float = 1.0) -> float:
    """Return the height of flowables in points, if they start a page and are as wide as a share of it."""
    register_fonts()
    total = 0.0
    after = 0.0
    for flowable in flowables:
        _, height = flowable.wrap(share * COLUMN, 10_000)
        if not height:  # a page break
            continue
        if total:
            total += max(0.0, flowable.getSpaceBefore() - after)
        after = flowable.getSpaceAfter()
        total += height + after
    return total


def new_page() -> Flowable:
    from reportlab.platypus import PageBreak

    return PageBreak()


def page_break(room: float = 130.0) -> Flowable:
    """Return a page break that takes effect only if less than `room` points are left on the page."""
    from reportlab.platypus import CondPageBreak

    return CondPageBreak(room)


@cache
def styles() -> dict[str, Any]:
    from reportlab.lib.styles import ParagraphStyle

    body = ParagraphStyle("body", fontName=FONT, fontSize=8.5, leading=12.5, spaceAfter=5)
    cell = ParagraphStyle("cell", body, fontSize=CELL_SIZE, leading=9, spaceAfter=0)
    title = ParagraphStyle("title", body, fontName=BOLD, fontSize=17, leading=21, spaceAfter=2)
    h0 = ParagraphStyle("h0", body, fontName=BOLD, fontSize=12.5, leading=16, spaceBefore=14, spaceAfter=5)
    h1 = ParagraphStyle("h1", body, fontName=BOLD, fontSize=9, leading=12, spaceBefore=8, spaceAfter=3)
    caption = ParagraphStyle("caption", body, fontSize=7.5, leading=10, textColor=GREY, spaceAfter=3)
    note = ParagraphStyle("note", body, fontSize=7, leading=9.5, textColor=GREY, spaceBefore=2, spaceAfter=8)
    bad = ParagraphStyle("bad", cell, textColor=RED)
    finding = ParagraphStyle("finding", body, leftIndent=13, bulletIndent=0, spaceAfter=4)
    big = ParagraphStyle("big", body, fontName=BOLD, fontSize=15, leading=19, spaceAfter=0)
    claim = ParagraphStyle("claim", body, fontName=BOLD, fontSize=9.5, leading=13.5, spaceAfter=6)
    number = ParagraphStyle("number", body, fontName=BOLD, fontSize=24, leading=29, spaceAfter=0)
    small = ParagraphStyle("small", body, fontSize=7, leading=9, textColor=GREY, spaceAfter=2)
    facts = ParagraphStyle("facts", body, fontSize=7.5, leading=10.5)
    made = (body, cell, title, h0, h1, caption, note, bad, finding, big, claim, facts, number, small)
    return {style.name: style for style in made}


def heading(text: str, level: int) -> Flowable:
    from reportlab.platypus import Paragraph

    class Heading(Paragraph):  # type: ignore[misc]
        """A heading that is also an entry in the outline of the PDF."""

        def draw(self) -> None:
            key = f"{self.canv.getPageNumber()} {text}"
            self.canv.bookmarkPage(key)
            self.canv.addOutlineEntry(text, key, level, closed=level == 0)
            super().draw()

    return Heading(escape(text), styles()[f"h{level}"])


# -- tables


def table(content: Table | None, width: float = COLUMN) -> list[Flowable]:
    """Return a table with its title and its note.

    A long table is split between rows, and the header of the table is repeated on every page.
    """
    if content is None or not content.rows:
        return []
    from reportlab.platypus import Spacer
    from reportlab.platypus import Table as PdfTable

    register_fonts()
    lines = [content.heads, *content.cells()]
    columns = list(zip(*lines, strict=True))
    longest = list(map(_longest, columns))
    widths = _column_widths(content.columns, longest, width)
    for i, column in enumerate(content.columns):
        if not column.right and widths[i] < longest[i]:
            columns[i] = tuple(_wrapped(columns[i], widths[i], content.red))
    note = Spacer(1, 6)
    if content.note:
        note = paragraph(content.note, "note")
    rows = list(zip(*columns, strict=True))
    pdf_table = PdfTable(rows, colWidths=widths, repeatRows=1, style=_table_style(content), hAlign="LEFT")
    return [page_break(90), heading(content.title, 1), pdf_table, note]


def _longest(cells: Sequence[str]) -> float:
    """Return the width of the widest cell of a column, in points."""
    from reportlab.pdfbase.pdfmetrics import stringWidth

    lines = (line for text in cells for line in text.split("\n"))
    return max(stringWidth(line, BOLD, CELL_SIZE) for line in lines) + GAP + 1


def _column_widths(columns: Sequence[Column], longest: Sequence[float], width: float) -> list[float]:
    """Return the width of each column of a table, in points.

    A column without a share is as wide as its widest cell, but a text column is limited to 30% of the table.
    The remaining width is divided among the columns with a share, in proportion to their shares. If no column
    has a share and the table is too wide, all columns are scaled down.
    """
    natural = list(longest)
    used = 0.0
    shares = 0.0
    for i, column in enumerate(columns):
        if not column.right:
            natural[i] = min(natural[i], 0.3 * width)
        if not column.share:
            used += natural[i]
        shares += column.share
    if not shares and used > width:
        return [column_width * width / used for column_width in natural]
    for i, column in enumerate(columns):
        if column.share:
            natural[i] = (width - used) * column.share / shares
    return natural


def _wrapped(cells: Sequence[str], width: float, red: set[int]) -> Iterator[Flowable]:
    """Yield the cells of a column as paragraphs with line breaks. The first cell is the column header."""
    from reportlab.platypus import Paragraph

    head, *body = cells
    yield Paragraph(f"<b>{escape(head)}</b>", styles()["cell"])
    for row, text in enumerate(body):
        style = styles()["bad"] if row in red else styles()["cell"]
        yield Paragraph(_breakable(text, width - GAP - 1), style)


def _table_style(content: Table) -> list[Any]:
    style: list[Any] = [
        ("FONT", (0, 0), (-1, 0), BOLD, CELL_SIZE),
        ("FONT", (0, 1), (-1, -1), FONT, CELL_SIZE),
        ("LEADING", (0, 0), (-1, -1), 9),
        ("VALIGN", (0, 0), (-1, 0), "BOTTOM"),
        ("VALIGN", (0, 1), (-1, -1), "TOP"),
        ("LINEBELOW", (0, 0), (-1, 0), 0.6, "#000000"),
        ("LINEBELOW", (0, -1), (-1, -1), 0.4, "#888888"),
        ("LEFTPADDING", (0, 0), (-1, -1), 0),
        ("RIGHTPADDING", (0, 0), (-1, -1), GAP),
        ("TOPPADDING", (0, 0), (-1, -1), 1.6),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 1.6),
    ]
    for i, column in enumerate(content.columns):
        if column.right:
            style.append(("ALIGN", (i, 0), (i, -1), "RIGHT"))
    for row in sorted(content.red):
        style.append(("TEXTCOLOR", (0, row + 1), (-1, row + 1), RED))
    return style


def _breakable(text: str, width: float) -> str:
    """Escape a text, and split words that are wider than the column, such as hashes and paths."""
    words = []
    for word in text.split(" "):
        rest = word
        while not _fits(rest, width):
            cut = _break_position(rest, width)
            words.append(rest[:cut])
            rest = rest[cut:]
        words.append(rest)
    return escape(" ".join(words))


def _break_position(word: str, width: float) -> int:
    """Return the position at which a word must be split to fit `width`, if possible after punctuation."""
    fitting = len(word)
    while fitting > 1 and not _fits(word[:fitting], width):
        fitting -= 1
    after_punctuation = max(word.rfind(mark, 1, fitting) + 1 for mark in "/-_,=.")
    return after_punctuation or fitting


def _fits(text: str, width: float) -> bool:
    from reportlab.pdfbase.pdfmetrics import stringWidth

    return bool(stringWidth(text, FONT, CELL_SIZE) <= width)


# -- the file


def write(path: Path, story: Callable[[], list[Flowable]], title: str, properties: Mapping[str, str]) -> int:
    """Write the PDF to a file, and return the number of pages.

    `story` is a function that creates the content of the PDF. The content is created and laid out twice,
    because the footer of each page shows the total number of pages.
    """
    register_fonts()
    _, total = _build(story(), title, properties, 0)
    data, pages = _build(story(), title, properties, total)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f".{path.name}.tmp")
        try:
            temp.write_bytes(data)
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)
    return pages


def _build(story: list[Flowable], title: str, properties: Mapping[str, str], total: int) -> tuple[bytes, int]:
    """Lay out the content of the PDF, and return the bytes of the PDF and the number of pages."""
    from reportlab.lib.pagesizes import A4
    from reportlab.platypus import BaseDocTemplate, Frame, PageTemplate

    width, height = A4
    footer_title = title
    if len(title) >= LONGEST_TITLE:
        footer_title = title[: LONGEST_TITLE - 2] + "…"

    def footer(canvas: Any, doc: Any) -> None:
        canvas.setFont(FONT, 7)
        canvas.setFillColor(GREY)
        canvas.drawString(MARGIN, 30, footer_title)
        canvas.drawRightString(width - MARGIN, 30, f"page {doc.page} of {total}")

    out = io.BytesIO()
    doc = BaseDocTemplate(
        out,
        pagesize=A4,
        invariant=1,
        lang="en",
        title=title,
        creator=CREATOR,
        author=f"mainrun {__version__}",
        **properties,
    )
    frame = Frame(MARGIN, 46, COLUMN, height - 46 - 44, 0, 0, 0, 0)
    doc.addPageTemplates(PageTemplate("page", [frame], onPage=footer))
    doc.build(story)
    return out.getvalue(), doc.page
