"""How a page is set: reportlab lays out words and tables, figures come in as vectors by way of SVG. The same input gives the same bytes.

Nothing in here computes or knows what a run is: what stands on the pages is pages.py's.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from mainrun import __version__
from mainrun.store.rundir import disk_errors
from reports.evidence import tables
from reports.evidence.figures.registry import draw_all
from reports.evidence.figures.style import FONT, report_style
from reports.evidence.load import Evidence

if TYPE_CHECKING:
    from reportlab.graphics.shapes import Drawing
    from reportlab.platypus import Flowable

BOLD = f"{FONT}-Bold"
RED = "#B00020"
CREATOR = "mainrun report"
COLUMN = 487.0  # points: an A4 page without its margins, a little more than the WIDTH of figures
MARGIN = 54.0
GAP = 6.0  # between the columns of a table


@cache
def fonts() -> None:
    """One family for text and figures: the one that matplotlib brings, so that none needs to be installed."""
    import matplotlib
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFont
    from svglib import fonts as svg

    for name, file in ((FONT, "DejaVuSans.ttf"), (BOLD, "DejaVuSans-Bold.ttf")):
        path = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / file)
        pdfmetrics.registerFont(TTFont(name, path))
        svg.register_font(name, path, rlgFontName=name)
    svg.register_font(FONT, weight="bold", rlgFontName=BOLD)
    pdfmetrics.registerFontFamily(FONT, normal=FONT, bold=BOLD, italic=FONT, boldItalic=BOLD)


def drawing(svg: bytes) -> Drawing:
    fonts()
    from svglib.svglib import svg2rlg

    found = svg2rlg(io.BytesIO(svg))
    assert found is not None, "a figure of ours is no SVG"
    found.hAlign = "LEFT"
    return found


def svgs(e: Evidence, folder: Path | None) -> dict[str, bytes]:
    """Every figure; with a folder they are also kept there, as SVG and PNG."""
    found = {}
    with report_style():
        for name, figure in draw_all(e).items():
            out = io.BytesIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": CREATOR})
            found[name] = out.getvalue()
            if folder:
                with disk_errors(folder, "--figures"):
                    (folder / f"{name}.svg").write_bytes(found[name])
                    figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": CREATOR})
    return found


def words(text: str, style: str = "body") -> Flowable:
    from reportlab.platypus import Paragraph

    return Paragraph(escape(text), styles()[style])


def figure(drawn: Mapping[str, Drawing], name: str, caption: str, title: str = "") -> list[Flowable]:
    """With what it shows below it, all on one page; nothing where there is no such figure."""
    from reportlab.platypus import KeepTogether, Spacer

    if name not in drawn:
        return []
    above = [heading(title, 1)] if title else []
    return [KeepTogether([*above, drawn[name], words(caption, "caption"), Spacer(1, 6)])]


def section(least: float = 330.0) -> Flowable:
    """A new page, unless this one has room for the beginning of what comes."""
    from reportlab.platypus import CondPageBreak

    return CondPageBreak(least)


@cache
def styles() -> dict[str, Any]:
    from reportlab.lib.styles import ParagraphStyle

    body = ParagraphStyle("body", fontName=FONT, fontSize=8.5, leading=12.5, spaceAfter=5)
    return {
        "body": body,
        "title": ParagraphStyle("title", body, fontName=BOLD, fontSize=17, leading=21, spaceAfter=2),
        "h0": ParagraphStyle(
            "h0", body, fontName=BOLD, fontSize=12.5, leading=16, spaceBefore=14, spaceAfter=5
        ),
        "h1": ParagraphStyle("h1", body, fontName=BOLD, fontSize=9, leading=12, spaceBefore=8, spaceAfter=3),
        "caption": ParagraphStyle(
            "caption", body, fontSize=7.5, leading=10, textColor="#444444", spaceAfter=3
        ),
        "note": ParagraphStyle(
            "note", body, fontSize=7, leading=9.5, textColor="#444444", spaceBefore=2, spaceAfter=8
        ),
        "cell": ParagraphStyle("cell", body, fontSize=7, leading=9, spaceAfter=0),
        "bad": ParagraphStyle("bad", body, fontSize=7, leading=9, spaceAfter=0, textColor=RED),
        "finding": ParagraphStyle("finding", body, leftIndent=13, bulletIndent=0, spaceAfter=4),
        "big": ParagraphStyle("big", body, fontName=BOLD, fontSize=15, leading=19, spaceAfter=0),
        "small": ParagraphStyle("small", body, fontSize=7, leading=9, textColor="#444444", spaceAfter=2),
    }


def heading(text: str, level: int) -> Flowable:
    from reportlab.platypus import Paragraph

    class Heading(Paragraph):  # type: ignore[misc]
        """Says to the outline where it stands."""

        def draw(self) -> None:
            key = f"{self.canv.getPageNumber()} {text}"
            self.canv.bookmarkPage(key)
            self.canv.addOutlineEntry(text, key, level, closed=level == 0)
            super().draw()

    return Heading(escape(text), styles()[f"h{level}"])


def table(found: tables.Table | None, width: float = COLUMN) -> list[Flowable]:
    """A heading, the rows with aligned decimals, and what its columns mean. It breaks between rows, with its head on every page."""
    if found is None or not found.rows:
        return []
    from reportlab.pdfbase.pdfmetrics import stringWidth
    from reportlab.platypus import Paragraph, Spacer, Table

    cells = list(found.cells())
    columns = found.columns
    longest = [
        max(stringWidth(text, BOLD, 7) for text in (c.head, *(row[i] for row in cells))) + GAP + 1
        for i, c in enumerate(columns)
    ]
    natural = [w if c.right else min(w, 0.3 * width) for w, c in zip(longest, columns, strict=True)]
    fixed = sum(w for w, c in zip(natural, columns, strict=True) if not c.share)
    shares = sum(c.share for c in columns)
    widths = [
        (width - fixed) * c.share / shares if c.share else w for w, c in zip(natural, columns, strict=True)
    ]
    if not shares and fixed > width:
        widths = [w * width / fixed for w in widths]
    wraps = [not c.right and w < long for c, w, long in zip(columns, widths, longest, strict=True)]

    def cell(text: str, i: int, red: bool) -> Any:
        if wraps[i]:
            return Paragraph(_breakable(text, widths[i] - GAP - 1), styles()["bad" if red else "cell"])
        return text

    head = [c.head for c in columns]
    rows = [[cell(text, i, n in found.red) for i, text in enumerate(row)] for n, row in enumerate(cells)]
    look: list[Any] = [
        ("FONT", (0, 0), (-1, 0), BOLD, 7), ("FONT", (0, 1), (-1, -1), FONT, 7), ("LEADING", (0, 0), (-1, -1), 9),
        ("VALIGN", (0, 0), (-1, -1), "TOP"), ("LINEBELOW", (0, 0), (-1, 0), 0.6, "#000000"),
        ("LINEBELOW", (0, -1), (-1, -1), 0.4, "#888888"),
        ("LEFTPADDING", (0, 0), (-1, -1), 0), ("RIGHTPADDING", (0, 0), (-1, -1), GAP), ("TOPPADDING", (0, 0), (-1, -1), 1.6),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 1.6),
    ]  # fmt: skip
    look += [("ALIGN", (i, 0), (i, -1), "RIGHT") for i, c in enumerate(columns) if c.right]
    look += [("TEXTCOLOR", (0, n + 1), (-1, n + 1), RED) for n in sorted(found.red)]
    head = [Paragraph(f"<b>{escape(h)}</b>", styles()["cell"]) if wraps[i] else h for i, h in enumerate(head)]
    drawn = Table([head, *rows], colWidths=widths, repeatRows=1, style=look, hAlign="LEFT")
    note = [Paragraph(escape(found.note), styles()["note"])] if found.note else [Spacer(1, 6)]
    return [section(90), heading(found.title, 1), drawn, *note]


def _breakable(text: str, width: float) -> str:
    """Escaped, and words that are wider than their column (hashes, paths, configs) may break in it."""
    from reportlab.pdfbase.pdfmetrics import stringWidth

    found = []
    for word in text.split(" "):
        while stringWidth(word, FONT, 7) > width:
            n = next(n for n in range(len(word), 0, -1) if n == 1 or stringWidth(word[:n], FONT, 7) <= width)
            n = max((word.rfind(c, 1, n) + 1 for c in "/-_,=."), default=0) or n
            found.append(word[:n])
            word = word[n:]
        found.append(word)
    return escape(" ".join(found))


def write(path: Path, story: Callable[[], list[Flowable]], title: str, told: Mapping[str, str]) -> int:
    """story: the pages, anew at each call. They are laid out twice: the first time tells how many there are, which is returned."""
    fonts()
    pages, data = 0, b""
    for _ in range(2):
        data, pages = _build(story(), title, told, pages)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f".{path.name}.tmp")
        try:
            temp.write_bytes(data)
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)
    return pages


def _build(story: list[Flowable], title: str, told: Mapping[str, str], total: int) -> tuple[bytes, int]:
    from reportlab.lib.pagesizes import A4
    from reportlab.platypus import BaseDocTemplate, Frame, PageTemplate

    def footer(canvas: Any, doc: Any) -> None:
        canvas.setFont(FONT, 7)
        canvas.setFillColor("#444444")
        canvas.drawString(MARGIN, 30, title if len(title) < 90 else title[:88] + "…")
        canvas.drawRightString(A4[0] - MARGIN, 30, f"page {doc.page} of {total}")

    out = io.BytesIO()
    doc = BaseDocTemplate(
        out,
        pagesize=A4,
        invariant=1,
        lang="en",
        title=title,
        creator=CREATOR,
        author=f"mainrun {__version__}",
        **told,
    )
    frame = Frame(MARGIN, 46, COLUMN, A4[1] - 46 - 44, 0, 0, 0, 0)
    doc.addPageTemplates(PageTemplate("page", [frame], onPage=footer))
    doc.build(story)
    return out.getvalue(), doc.page
