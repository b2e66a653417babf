"""Small pieces of HTML with which runs and studies show themselves in a notebook."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

WIDTH = 240  # of a sparkline, in pixels
HEIGHT = 40
MOST_POINTS = 240


def card(title: str, rows: Iterable[tuple[str, str]], drawing: str = "") -> str:
    """Return a table with one line per fact, and a drawing below it."""
    lines = []
    for name, value in rows:
        cell = '<td style="text-align:left">'
        lines.append(f"<tr>{cell}{escape(name)}</td>{cell}{escape(value)}</td></tr>")
    return f"<div><b>{escape(title)}</b><table>{''.join(lines)}</table>{drawing}</div>"


def sparkline(values: Sequence[float], label: str) -> str:
    """Return a small curve as SVG, in the colour of the text. Values that are not finite are left out."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    stride = -(-len(finite) // MOST_POINTS)
    shown = [*finite[:-1:stride], finite[-1]]
    low = min(shown)
    span = max(shown) - low or 1.0
    points = []
    for place, value in enumerate(shown):
        x = 1 + (WIDTH - 2) * place / (len(shown) - 1)
        y = 1 + (HEIGHT - 2) * (1 - (value - low) / span)
        points.append(f"{x:.1f},{y:.1f}")
    return (
        f'<svg role="img" aria-label="{escape(label)}" width="{WIDTH}" height="{HEIGHT}">'
        f"<title>{escape(label)}</title>"
        f'<polyline points="{" ".join(points)}" fill="none" stroke="currentColor"/></svg>'
    )
