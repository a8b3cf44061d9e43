"""Pictures of numbers as SVG: a histogram, and a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from nemolet.speech.metrics import Confusion

_BLUE, _INK = "#4c78a8", "#1c2430"


def histogram(values: Sequence[float], path: str | Path, *, title: str, unit: str = "", bins: int = 30) -> None:
    """Draw how often values lie where.

    Args:
        values: any number of them, at least one.
        path: the SVG file to write.
        title: of the picture.
        unit: of the values.
        bins: number of bars.
    """
    counts, edges = np.histogram(np.asarray(values, float), bins=bins)
    width, height, left, bottom, top = 640, 320, 56, 44, 40
    bar = (width - left - 20) / bins
    parts = [opening(width, height), f'<text x="{left}" y="24" font-size="15">{escape(title)}</text>']
    for tick in range(5):
        value = counts.max() * tick / 4
        y = height - bottom - (height - bottom - top) * tick / 4
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - 20}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.4g}</text>')
        edge = edges[0] + (edges[-1] - edges[0]) * tick / 4
        x = left + (width - left - 20) * tick / 4
        parts.append(f'<text x="{x:.1f}" y="{height - 22}" text-anchor="middle">{edge:.3g} {escape(unit)}</text>')
    for index, count in enumerate(counts.tolist()):
        tall = (height - bottom - top) * count / max(1, counts.max())
        parts.append(
            f'<rect x="{left + index * bar:.1f}" y="{height - bottom - tall:.1f}" width="{bar - 1:.1f}" '
            f'height="{tall:.1f}" fill="{_BLUE}"><title>{count:,}</title></rect>'
        )
    Path(path).write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def confusion_matrix(confusion: Confusion, path: str | Path, *, title: str = "Confusion") -> None:
    """Draw which classes were taken for which; the darker a cell, the larger its share of the row.

    Args:
        confusion: the counts.
        path: the SVG file to write.
        title: of the picture.
    """
    names, counts = confusion.names, confusion.counts
    cell = 36 if len(names) <= 20 else 16
    left = 24 + round(7.5 * max(map(len, names)))
    top, size = 64 + left // 2, cell * len(names)
    width, height = left + size + 24, top + size + 34
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    accuracy = f"{escape(title)}: {100 * confusion.accuracy:.1f}% of {counts.sum():,} right"
    parts = [opening(width, height), f'<text x="12" y="24" font-size="15">{accuracy}</text>']
    for index, name in enumerate(map(escape, names)):
        middle = cell * (index + 0.5)
        parts.append(f'<text x="{left - 6}" y="{top + middle + 4:.0f}" text-anchor="end">{name}</text>')
        x = left + middle
        parts.append(f'<text x="{x:.0f}" y="{top - 8}" transform="rotate(-45 {x:.0f} {top - 8})">{name}</text>')
    for (row, column), share in np.ndenumerate(shares):
        x, y, count = left + cell * column, top + cell * row, int(counts[row, column])
        blue = "#" + "".join(f"{round(255 - (255 - full) * share):02x}" for full in (0x2F, 0x5F, 0x9E))
        parts.append(f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="{blue}"/>')
        if count and cell > 20:
            ink = "white" if share > 0.5 else _INK
            parts.append(
                f'<text x="{x + cell / 2:.0f}" y="{y + cell / 2 + 4:.0f}" text-anchor="middle" '
                f'fill="{ink}">{count}</text>'
            )
    parts.append(f'<text x="{left}" y="{height - 12}">rows: what it is; columns: what it was taken for</text>')
    Path(path).write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def opening(width: int, height: int) -> str:
    """How each of these pictures begins."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="{_INK}"><rect width="{width}" height="{height}" fill="white"/>'
    )
