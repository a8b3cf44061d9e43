"""Pictures of a graph: exact text and Mermaid, and an SVG in which nothing covers anything."""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import nemolet as nl
from nemolet import draw
from nemolet.draw import Arrow, Box, Picture, mermaid, svg, text_table, write
from nemolet.module import NeuralModule
from nemolet.types import HiddenBTD, LabelsBT, LogitsBTV, LossScalar, MaskBT, TokenIdsBT

NAME = "{http://www.w3.org/2000/svg}"


class Embed(NeuralModule):
    def __init__(self) -> None:
        super().__init__(D=256, V=65)
        self.weight = nn.Parameter(torch.zeros(65, 256))

    def forward(self, tokens: TokenIdsBT) -> HiddenBTD: ...


class Mix(NeuralModule):
    def forward(self, parts: list[HiddenBTD], mask: MaskBT) -> HiddenBTD: ...


class Head(NeuralModule):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(V=65)
        self.weight = weight

    def forward(self, hidden: HiddenBTD) -> LogitsBTV: ...


class Loss(NeuralModule):
    def forward(self, logits: LogitsBTV, labels: LabelsBT) -> LossScalar: ...


@pytest.fixture
def graph() -> nl.Graph:
    embed, first, second = Embed(), Mix(), Mix()
    mask = nl.Input(MaskBT, "mask")
    hidden = embed(nl.Input(TokenIdsBT))
    mixed = first([hidden], mask)
    mixed = second([hidden, mixed], mask)
    graph = nl.Graph(Loss()(Head(embed.weight)(mixed), nl.Input(LabelsBT)), hidden=mixed)
    graph.label = "a & b"
    return graph


def test_the_text_table(graph):
    assert graph.summary() == text_table(graph.picture())
    assert (
        graph.summary()
        == """\
module  kind    inputs                                          parameters
embed   Embed   tokens <- input tokens: B T TokenIds(vocab=65)      16,640
mix     Mix     parts <- embed: B T D=256 Hidden
                mask <- input mask: B T Mask
mix_2   Mix     parts <- embed: B T D=256 Hidden
                parts <- mix: B T D=256 Hidden
                mask <- input mask: B T Mask
head    Head    hidden <- mix_2: B T D=256 Hidden                   16,640
loss    Loss    logits <- head: B T V=65 Logits
                labels <- input labels: B T Labels(vocab=65)
output  output  output <- loss: scalar Loss
hidden  output  hidden <- mix_2: B T D=256 Hidden
total                                                               16,640"""
    )


def test_a_long_type_is_wrapped():
    long = "dict[str, list[B T C Spectrogram(bins=128, hop=0.0125)] of 12]"
    picture = Picture(
        "g", (Box("0", "module", "Kind", ""), Box("1", "other", "Kind", "")), (Arrow("0", "1", "features", long),)
    )
    assert max(map(len, text_table(picture).splitlines())) <= 100
    assert re.sub(r"\s+", " ", text_table(picture)).count(long) == 1


def test_mermaid(graph):
    assert graph.draw() == mermaid(graph.picture())
    assert (
        graph.draw()
        == """\
flowchart TB
    n0(["tokens"])
    n1(["mask"])
    n2(["labels"])
    n3["embed<br/>Embed, 16,640 parameters"]
    n4["mix<br/>Mix"]
    n5["mix_2<br/>Mix"]
    n6["head<br/>Head, 16,640 parameters"]
    n7["loss<br/>Loss"]
    n8(["output"])
    n9(["hidden"])
    n0 -->|"tokens: B T TokenIds(vocab=65)"| n3
    n3 -->|"parts: B T D=256 Hidden"| n4
    n1 -->|"mask: B T Mask"| n4
    n3 -->|"parts: B T D=256 Hidden"| n5
    n4 -->|"parts: B T D=256 Hidden"| n5
    n1 -->|"mask: B T Mask"| n5
    n5 -->|"hidden: B T D=256 Hidden"| n6
    n6 -->|"logits: B T V=65 Logits"| n7
    n2 -->|"labels: B T Labels(vocab=65)"| n7
    n7 -->|"output: scalar Loss"| n8
    n5 -->|"hidden: B T D=256 Hidden"| n9"""
    )


NASTY = '<b>"x" & #y; `z` | ]\n) end\x00'


def nasty() -> Picture:
    boxes = Box("in", NASTY, "input", ""), Box(NASTY, NASTY, "Kind<T>", "1"), Box("out", "ü", "output", "")
    return Picture(NASTY, boxes, (Arrow("in", NASTY, "p|q", "list[B T]"), Arrow(NASTY, "out", "ü", NASTY)))


def test_mermaid_escapes_what_would_end_a_label():
    lines = mermaid(nasty()).splitlines()
    assert len(lines) == 1 + 3 + 2
    for line in lines[1:]:
        label = re.fullmatch(r'    n\d(?:\(\[|\[| -->\|)"([^"]*)"(?:\]\)|\]|\| n\d)', line)
        assert label, line
        text = re.sub(r"#\d+;", "", label[1].replace("<br/>", ""))
        assert not set(text) & set('<>"&#;`|[]')
    assert "#60;b#62;" in lines[1]
    assert "ü" in lines[3]


# --------------------------------------------------------------------------------------------------
# SVG
# --------------------------------------------------------------------------------------------------


def texts(drawing: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(drawing).iter(f"{NAME}text")]


def test_the_svg_shows_every_module_port_and_type(graph, tmp_path):
    path = tmp_path / "new" / "folder" / "graph.svg"
    drawing = graph.draw(str(path))
    assert path.read_text(encoding="utf-8") == drawing == svg(graph.picture())
    root = ElementTree.fromstring(drawing)
    assert root.tag == f"{NAME}svg"
    assert root[0].tag == f"{NAME}title"
    assert root[0].text == "a & b"
    shown = texts(drawing)
    for box in graph.picture().boxes:
        assert box.title in shown
    for arrow in graph.picture().arrows:
        assert arrow.type in shown
        assert arrow.port in shown


def test_the_svg_escapes_and_stands_alone():
    drawing = svg(nasty())
    root = ElementTree.fromstring(drawing)
    tags = {element.tag.removeprefix(NAME) for element in root.iter()}
    assert tags == {"svg", "title", "rect", "path", "text"}
    assert NASTY.replace("\x00", "\ufffd") in texts(drawing)
    assert not re.search(r"href|style|script|url\(|currentColor", drawing)


def test_inputs_modules_and_outputs_look_different(graph):
    rects = [r for r in ElementTree.fromstring(svg(graph.picture())).iter(f"{NAME}rect") if r.get("stroke")]
    looks = [(r.get("fill"), r.get("rx"), r.get("stroke-dasharray")) for r in rects]
    assert len(looks) == 10
    assert len(set(looks)) == 3


def brightness(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted([brightness(one), brightness(other)])
    return (light + 0.05) / (dark + 0.05)


def test_it_reads_on_light_and_dark_pages(graph):
    root = ElementTree.fromstring(svg(graph.picture()))
    fills = {r.get("fill") for r in root.iter(f"{NAME}rect")}
    for ink in {t.get("fill") for t in root.iter(f"{NAME}text")}:
        assert all(contrast(ink, fill) >= 4.5 for fill in fills)  # all text stands on a fill of its own
    for line in {p.get("stroke") for p in root.iter(f"{NAME}path")} - {None}:
        assert contrast(line, "#ffffff") >= 3
        assert contrast(line, "#0d1117") >= 3


def bezier(points: list[tuple[float, float]], t: float) -> tuple[float, float]:
    while len(points) > 1:
        points = [tuple(a + (b - a) * t for a, b in zip(p, q)) for p, q in pairwise(points)]
    return points[0]


def points_of(path: str) -> list[tuple[float, float]]:
    """Points along an SVG path of the commands M, C and V."""
    found: list[tuple[float, float]] = []
    for command, numbers in re.findall(r"([MCV])([^MCV]*)", path):
        values = [float(n) for n in numbers.split()]
        if command == "M":
            found.append((values[0], values[1]))
            continue
        end = [*zip(values[::2], values[1::2])] if command == "C" else [(found[-1][0], values[0])]
        start = found[-1]
        found += [bezier([start, *end], step / 20) for step in range(1, 21)]
    return found


def overlaps(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def dense(count: int) -> Picture:
    """A picture with wires that skip layers, several between one pair, and loose ends."""
    boxes = [Box(f"in:{i}", f"input_{i}", "input", "") for i in range(3)]
    boxes += [Box(str(i), "m" * (1 + 5 * i % 17), "Kind" * (1 + i % 4), "12,345") for i in range(count)]
    boxes.append(Box("out:end", "end", "output", ""))
    arrows = [Arrow(f"in:{i % 3}", str(i), "port", "B T TokenIds(vocab=65)") for i in range(count)]
    pairs = [(a, b) for b in range(count) for a in range(b) if a * b % 3 == 1]
    arrows += [Arrow(str(a), str(b), f"from_{a}", "B T D=256 Hidden") for a, b in pairs]
    arrows += [
        Arrow("0", "1", "again", "scalar Loss"),
        Arrow("0", "1", "again", "scalar Loss"),
        Arrow(str(count - 1), "out:end", "end", "B T"),
    ]
    return Picture("dense", tuple(boxes), tuple(arrows))


@pytest.mark.parametrize("picture", [dense(2), dense(5), dense(11)], ids=["small", "medium", "large"])
def test_nothing_covers_anything(picture):
    root = ElementTree.fromstring(svg(picture))
    width, height = (float(root.get(side)) for side in ("width", "height"))
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    rects = [
        (x, y, x + float(r.get("width")), y + float(r.get("height")), bool(r.get("stroke")))
        for r in root.iter(f"{NAME}rect")
        for x, y in [(float(r.get("x")), float(r.get("y")))]
    ]
    assert len(rects) == len(picture.boxes) + len(picture.arrows)
    assert all(x >= 0 and y >= 0 and right <= width and bottom <= height for x, y, right, bottom, _ in rects)
    assert not any(overlaps(one, other) for one, other in combinations(rects, 2))
    wires = [p.get("d") for p in root.iter(f"{NAME}path") if p.get("stroke")]
    assert len(wires) == len(picture.arrows)
    for wire in wires:
        crossed = {r for x, y in points_of(wire) for r in rects if overlaps(r, (x - 0.1, y, x + 0.1, y))}
        assert not any(is_box for *_, is_box in crossed)
        assert len(crossed) == 1  # its own label, and no other


def test_every_box_is_below_what_it_reads():
    picture = dense(11)
    root = ElementTree.fromstring(svg(picture))
    tops = [float(r.get("y")) for r in root.iter(f"{NAME}rect") if r.get("stroke")]
    top = {box.key: y for box, y in zip(picture.boxes, tops)}
    assert all(top[arrow.source] < top[arrow.target] for arrow in picture.arrows)


def test_titles_and_labels_fit_their_boxes():
    for box in ("i" * 30, "W" * 6, "decoder_of_the_second_stream"):
        picture = Picture("g", (Box("0", box, "TransformerDecoderLayer", "123,456,789"),), ())
        rect = next(ElementTree.fromstring(svg(picture)).iter(f"{NAME}rect"))
        assert float(rect.get("width")) >= 8 * len(box)


@pytest.mark.parametrize(
    "picture",
    [
        Picture("empty", (), ()),
        Picture("one", (Box("0", "a", "A", ""),), ()),
        Picture("loop", (Box("0", "a", "A", ""),), (Arrow("0", "0", "p", "B"),)),
        Picture(
            "cycle",
            (Box("0", "a", "A", ""), Box("1", "b", "B", "")),
            (Arrow("0", "1", "p", "B"), Arrow("1", "0", "p", "B")),
        ),
    ],
    ids=lambda picture: picture.title,
)
def test_odd_pictures_are_drawn_all_the_same(picture):
    ElementTree.fromstring(svg(picture))
    assert mermaid(picture).startswith("flowchart TB")
    assert text_table(picture).startswith("module")


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "graph.md"
    write(str(path), "first, and longer\n")
    write(str(path), "ü\n")
    assert path.read_bytes() == "ü\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["graph.md"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "graph.svg"
    write(str(path), "old")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(draw.Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(str(path), "new")
    with pytest.raises(UnicodeEncodeError):
        write(str(path), "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["graph.svg"]


def test_the_path_chooses_the_form(graph, tmp_path):
    assert graph.draw(str(tmp_path / "graph.mmd")).startswith("flowchart TB")
    assert graph.draw(str(tmp_path / "graph.svg")).startswith("<svg")
    assert (tmp_path / "graph.mmd").read_text() == graph.draw()
