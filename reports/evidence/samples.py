"""Show sample titles of two models side by side, with all characters that cannot be printed made visible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from reports.evidence.figures.style import FONT
from reports.evidence.tables import Column, Table, integer, text

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PICTURES = 0x2400  # the first of the signs that show control characters
DELETE = 0x7F
ESCAPE = "\\x"  # `mainrun sample` writes a control character as its code


def side_by_side(samples: Sequence[tuple[str, Sequence[str]]]) -> Table | None:
    """Make the table of samples, with one column per run and one row per sample."""
    if not samples:
        return None
    columns = [Column("#", integer), *(Column(run_id, text, 0.5) for run_id, _ in samples)]
    rows = []
    for number, titles in enumerate(zip_longest(*(titles for _, titles in samples)), 1):
        rows.append([number, *map(_cell, titles)])
    note = "Each model continues an empty prompt with the same random numbers."
    count = sum(title.count(REPLACEMENT) for _, titles in samples for title in titles)
    if count:
        note += f" {REPLACEMENT} stands for bytes that are no text ({count} times)."
    if any(visible(title) != title or ESCAPE in title for _, titles in samples for title in titles):
        note += " Control characters are shown by their code or by a sign such as ␊."
    return Table("samples", "Titles by both models", columns, rows, note)


def _cell(title: str | None) -> str:
    if title is None:
        return ""
    if not title.strip():
        return "(an empty title)"
    return visible(title)


def visible(title: str) -> str:
    """Replace each character that has no glyph in the report's font by a sign or by its code."""
    from reportlab.pdfbase.pdfmetrics import getFont

    from reports.evidence.pdf import register_fonts

    register_fonts()
    glyphs = getFont(FONT).face.charToGlyph
    shown = []
    for letter in title:
        code = ord(letter)
        if code < ord(" "):
            shown.append(chr(PICTURES + code))
        elif code == DELETE:
            shown.append("␡")
        elif code in glyphs and letter.isprintable():
            shown.append(letter)
        else:
            shown.append(f"⟨{code:04X}⟩")
    return "".join(shown)
