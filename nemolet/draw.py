"""A graph as text table, Mermaid and SVG; every form is made from one :class:`Picture`.

The SVG has a layout of its own. Each box stands in a row below everything it reads, with a row of labels in
between. A wire bends only in the gaps between rows, so no wire and no label ever covers a box.
"""

from __future__ import annotations

import itertools
import re
import secrets
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape


@dataclass(frozen=True)
class Box:
    """One module (or input, or output) of a picture; a module's detail is its number of parameters."""

    key: str
    title: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Arrow:
    """One wire of a picture, with the type that flows."""

    source: str
    target: str
    port: str
    type: str


@dataclass(frozen=True)
class Picture:
    """What is drawn; ``parameters`` counts a weight that several modules share once."""

    title: str
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    parameters: int = 0


_ENDS = ("input", "output")  # kinds of boxes that are no modules
_Rows = list[list["_Spot"]]
_BOX_HEIGHT, _LABEL_HEIGHT, _GAP, _SPACE, _MARGIN = 44.0, 28.0, 22.0, 22.0, 16.0
# Text stands on a light fill of its own, and the bare wires are mid-grey: both read on light and dark pages.
_COLOURS = {"input": ("#d9f2e3", "#2f8f5b"), "output": ("#fdebd0", "#c77a1a"), "": ("#e3ebfb", "#5b7fc7")}
_INK, _WIRE = "#1c2430", "#7c8694"


def text_table(picture: Picture) -> str:
    """Lay the picture out as a table: one line for each wire, under the module it enters.

    Args:
        picture: what ``Graph.picture()`` returns.

    Example:
        >>> boxes = Box("in:x", "x", "input", ""), Box("0", "head", "Linear", "1,024")
        >>> print(text_table(Picture("g", boxes, (Arrow("in:x", "0", "hidden", "B T D Hidden"),), 1024)))
        module  kind    inputs                           parameters
        head    Linear  hidden <- input x: B T D Hidden       1,024
        total                                                 1,024
    """
    titles = {box.key: f"input {box.title}" if box.kind == "input" else box.title for box in picture.boxes}
    rows = [("module", "kind", "inputs", "parameters")]
    for box in (box for box in picture.boxes if box.kind != "input"):
        wires = [f"{a.port} <- {titles[a.source]}: {a.type}" for a in picture.arrows if a.target == box.key]
        lines = [line for wire in wires for line in textwrap.wrap(wire, 64, subsequent_indent="    ")] or [""]
        rows += [(box.title, box.kind, lines[0], box.detail), *(("", "", line, "") for line in lines[1:])]
    rows.append(("total", "", "", f"{picture.parameters:,}"))
    width = [max(len(row[i]) for row in rows) for i in range(4)]
    cells = ([*(row[i].ljust(width[i]) for i in range(3)), row[3].rjust(width[3])] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def mermaid(picture: Picture) -> str:
    """Write the picture as a Mermaid flowchart, which Markdown pages of many hosts draw.

    Args:
        picture: what ``Graph.picture()`` returns.

    Example:
        >>> boxes = Box("in:x", "x", "input", ""), Box("0", "head", "Linear", "1,024")
        >>> print(mermaid(Picture("g", boxes, (Arrow("in:x", "0", "hidden", "B T D Hidden"),))))
        flowchart TB
            n0(["x"])
            n1["head<br/>Linear, 1,024 parameters"]
            n0 -->|"hidden: B T D Hidden"| n1
    """
    ids = {box.key: f"n{index}" for index, box in enumerate(picture.boxes)}
    lines = ["flowchart TB"]
    for box in picture.boxes:
        text = '"' + "<br/>".join(_mermaid_text(line) for line in _lines(box)) + '"'
        lines.append(f"    {ids[box.key]}" + (f"([{text}])" if box.kind in _ENDS else f"[{text}]"))
    for a in picture.arrows:
        lines.append(f'    {ids[a.source]} -->|"{_mermaid_text(a.port + ": " + a.type)}"| {ids[a.target]}')
    return "\n".join(lines)


def _mermaid_text(text: str) -> str:
    # Mermaid writes entities with '#'; letters, digits and harmless signs stay readable in the source.
    return re.sub(r"[^\w .,:=()/*+\-]", lambda match: f"#{ord(match[0])};", " ".join(text.split()))


def _lines(box: Box) -> list[str]:
    """The one or two lines written in a box."""
    below = box.kind + (f", {box.detail} parameters" if box.detail else "")
    return [box.title] if box.kind in _ENDS else [box.title, below]


@dataclass(eq=False)
class _Spot:
    """A place in a row: a box, the label of an arrow, or a point where a wire passes."""

    row: int
    width: float
    inset: float = 0.0  # how much lower than its row it begins, and higher it ends
    x: float = 0.0


def _layers(picture: Picture) -> dict[str, int]:
    """Put each box one layer below the last it reads, and each input right above the first that reads it."""
    layer = {box.key: 0 for box in picture.boxes}
    for _ in picture.boxes:  # as many rounds as the longest path can have, so a cycle ends as well
        for a in picture.arrows:
            layer[a.target] = max(layer[a.target], min(layer[a.source] + 1, len(picture.boxes)))
    for box in picture.boxes:
        readers = [layer[a.target] for a in picture.arrows if a.source == box.key]
        if readers and box.kind == "input":
            layer[box.key] = max(0, min(readers) - 1)
    return layer


def _layout(picture: Picture) -> tuple[_Rows, dict[object, _Spot], _Rows]:
    """Place everything: boxes in even rows, and in odd rows labels, each right above the box it is for."""
    layer = _layers(picture)
    spot_of: dict[object, _Spot] = {}  # by the key of a box, the index of an arrow, or source and row
    for box in picture.boxes:
        width = max(8.4 * len(_lines(box)[0]), 6.3 * len(_lines(box)[-1])) + 28
        spot_of[box.key] = _Spot(2 * layer[box.key], max(width, 72.0), 6.0 if box.kind in _ENDS else 0.0)
    paths: _Rows = []  # the spots each arrow runs through
    for index, arrow in enumerate(picture.arrows):
        first, last = spot_of[arrow.source], spot_of[arrow.target]
        # Wires of one source share their points, so that a mask read by twelve layers is one line.
        rows_between = range(first.row + 1, last.row - 1)
        way = [spot_of.setdefault((arrow.source, row), _Spot(row, 10.0)) for row in rows_between]
        width = max(6.3 * len(arrow.type), 6.0 * len(arrow.port)) + 8
        spot_of[index] = _Spot(max(last.row - 1, 0), width)
        paths.append([first, *way, spot_of[index], last])
    rows: _Rows = [[] for _ in range(2 * max(layer.values(), default=0) + 1)]
    for spot in spot_of.values():
        rows[spot.row].append(spot)
    near: dict[_Spot, list[_Spot]] = defaultdict(list)
    for upper, lower in itertools.chain(*map(itertools.pairwise, paths)):
        near[upper].append(lower)
        near[lower].append(upper)
    _arrange(rows, near)
    return rows, spot_of, paths


def _arrange(rows: _Rows, near: Mapping[_Spot, list[_Spot]]) -> None:
    """Order each row and choose x: every spot goes as near to its neighbours as its row allows."""
    for row in rows:
        _settle(row, [0.0] * len(row))
    sweep = [*((i, -1) for i in range(1, len(rows))), *((i, 1) for i in range(len(rows) - 2, -1, -1))]
    for turn in range(16):  # at first rows are reordered, then only moved, at last with a look to both sides
        for index, side in sweep:
            wished: dict[_Spot, float] = {}
            for spot in rows[index]:
                beside = [other.x for other in near[spot] if (other.row - index) * side > 0 or turn > 12]
                wished[spot] = sum(beside) / len(beside) if beside else spot.x
            if turn < 5:
                rows[index].sort(key=wished.__getitem__)
            _settle(rows[index], [wished[spot] for spot in rows[index]])
    left = min((spot.x - spot.width / 2 for spot in itertools.chain(*rows)), default=0.0)
    for spot in itertools.chain(*rows):
        spot.x += _MARGIN - left


def _settle(row: Sequence[_Spot], wished: Sequence[float]) -> None:
    """Take the wished positions, changed as little as keeps the order and the distances (least squares)."""
    apart = [(left.width + right.width) / 2 + _SPACE for left, right in itertools.pairwise(row)]
    offsets = list(itertools.accumulate(apart, initial=0.0))
    groups: list[list[float]] = []  # sum and number of spots that touch and so move together
    for want, shift in zip(wished, offsets):
        groups.append([want - shift, 1.0])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + count]
    bases = [total / count for total, count in groups for _ in range(int(count))]
    for spot, base, shift in zip(row, bases, offsets):
        spot.x = base + shift


def svg(picture: Picture) -> str:
    """Draw the picture as SVG that stands alone: no style sheet, no script, no font is loaded.

    Args:
        picture: what ``Graph.picture()`` returns.

    Example:
        >>> svg(Picture("g", (Box("0", "head", "Linear", "1,024"),), ()))[:50]
        '<svg xmlns="http://www.w3.org/2000/svg" role="img"'
    """
    rows, spot_of, paths = _layout(picture)
    heights = [_LABEL_HEIGHT if index % 2 else _BOX_HEIGHT for index in range(len(rows))]
    tops = [_MARGIN + sum(heights[:index]) + _GAP * index for index in range(len(heights))]
    width = _MARGIN + max((spot.x + spot.width / 2 for spot in itertools.chain(*rows)), default=_MARGIN)
    height = tops[-1] + heights[-1] + _MARGIN
    head = '<svg xmlns="http://www.w3.org/2000/svg" role="img" font-family="sans-serif" text-anchor='
    head += f'"middle" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">'
    drawn = _wires(picture, spot_of, paths, tops, heights)
    drawn += [line for box in picture.boxes for line in _box(box, spot_of[box.key], tops)]
    return "\n".join([head, f"<title>{_xml(picture.title)}</title>", *drawn, "</svg>"]) + "\n"


def _box(box: Box, spot: _Spot, tops: Sequence[float]) -> list[str]:
    fill, border = _COLOURS.get(box.kind, _COLOURS[""])
    end, middle = box.kind in _ENDS, tops[spot.row] + _BOX_HEIGHT / 2
    first, *rest = _lines(box)
    dashes = ' stroke-dasharray="5 3"' if box.kind == "input" else ""
    return [
        _rect(spot, tops, _BOX_HEIGHT, 16 if end else 8, fill, f' stroke="{border}"{dashes}'),
        _text(spot.x, middle + (5 if end else -3), 14, first, _INK, ' font-weight="600"'),
        *(_text(spot.x, middle + 14, 11, line, _INK) for line in rest),
    ]


def _rect(spot: _Spot, tops: Sequence[float], height: float, radius: int, fill: str, more: str = "") -> str:
    x, y = spot.x - spot.width / 2, tops[spot.row] + spot.inset
    size = f'width="{spot.width:.1f}" height="{height - 2 * spot.inset:.1f}" rx="{radius}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{fill}"{more}/>'


def _text(x: float, y: float, size: int, text: str, colour: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}"{more}>{_xml(text)}</text>'


def _wires(
    picture: Picture, spot_of: Mapping[object, _Spot], paths: _Rows, tops: Sequence[float], heights: Sequence[float]
) -> list[str]:
    """All lines first, then all labels, so that a label covers the line it sits on."""
    lines, labels = [], []
    for index, arrow in enumerate(picture.arrows):
        path, label, target = paths[index], spot_of[index], spot_of[arrow.target]
        beside = [spot_of[i] for i, other in enumerate(picture.arrows) if other.target == arrow.target]
        share = (sum(spot.x < label.x for spot in beside) + 1) / (len(beside) + 1) - 0.5
        end_x, end_y = target.x + share * target.width, tops[target.row] + target.inset
        x, y = path[0].x, tops[path[0].row] + heights[path[0].row] - path[0].inset
        way = f"M{x:.1f} {y:.1f}"
        for spot in path[1:-1]:
            below = tops[spot.row] + heights[spot.row]
            way += f"{_curve(x, y, spot.x, tops[spot.row])} V{below:.1f}"
            x, y = spot.x, below
        way += _curve(x, y, end_x, end_y - 5)
        lines += [
            f'<path d="{way}" fill="none" stroke="{_WIRE}" stroke-width="1.4"/>',
            f'<path d="M{end_x - 4:.1f} {end_y - 8:.1f}h8l-4 8z" fill="{_WIRE}"/>',
        ]
        labels += [
            _rect(label, tops, _LABEL_HEIGHT, 4, "#f4f6f9"),
            _text(label.x, tops[label.row] + 11, 10, arrow.port, "#5a6573"),
            _text(label.x, tops[label.row] + 23, 11, arrow.type, _INK),
        ]
    return lines + labels


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    middle = (y + to_y) / 2
    return f" C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"


def _xml(text: str) -> str:
    return escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def write(path: str, text: str) -> None:
    """Write a text file whole or not at all, as UTF-8.

    Args:
        path: where it goes; missing folders are made, and a file that is there is replaced in one step.
        text: what it holds.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> write(f"{folder}/pictures/graph.txt", "tokens")
        >>> (folder / "pictures" / "graph.txt").read_text()
        'tokens'
    """
    final = Path(path)
    part = final.with_name(f".{final.name}.{secrets.token_hex(4)}")  # same folder: replacing is one step
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(final)
    finally:
        part.unlink(missing_ok=True)
