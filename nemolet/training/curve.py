"""The loss curve of a run as an SVG picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 360, 56, 40


def draw_curve(metrics: Path, picture: Path, *, title: str) -> None:
    """Draw training and validation loss over steps.

    Args:
        metrics: the CSV file of a run.
        picture: the SVG file to write.
        title: of the picture.
    """
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = {
        name: [(int(r["step"]), float(r[name])) for r in rows if r[name] and math.isfinite(float(r[name]))]
        for name in ("train_loss", "valid_loss")
    }
    points = [point for line in lines.values() for point in line]
    if not points:
        return
    last = max(step for step, _ in points) or 1
    low, high = min(v for _, v in points), max(v for _, v in points)
    low, high = (low, high) if high > low else (low - 1, high + 1)

    def place(step: int, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - 20) * step / last
        y = 40 + (_HEIGHT - 40 - _BOTTOM) * (high - value) / (high - low)
        return x, y

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="15">{title}</text>',
    ]
    for tick in range(5):
        value, step = low + (high - low) * tick / 4, last * tick // 4
        x, y = place(step, value)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - 20}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{step:,}</text>')
    for index, (name, line) in enumerate(lines.items()):
        color = ("#4c78a8", "#e45756")[index]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in (place(*p) for p in line) if index
        ]
        parts.append(
            f'<text x="{_WIDTH - 24}" y="{56 + 16 * index}" text-anchor="end" fill="{color}">'
            f"{name.replace('_', ' ')}</text>"
        )
    picture.write_text(
        "\n".join([*parts, f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>', "</svg>\n"])
    )
