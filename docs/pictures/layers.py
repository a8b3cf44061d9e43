"""Draw the layers of the package from the import contract in ``setup.cfg``: ``python docs/pictures/layers.py``."""

import configparser
import re
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
WORDS = {
    "cli": "nemolet <verb>: one module for each verb",
    "training": "Lightning: steps, checkpoints, experiment folders",
    "parallel": "plans from declared axes, and their application",
    "archive": ".nemolet files: save, load, verify",
    "convert": "Hugging Face folders, both ways",
    "container": "the tar of a .nemolet file, read without trust",
    "tensor_files": "safetensors, a tensor at a time",
    "metrics": "metrics as typed modules",
    "naming": "names of parts",
    "speech": "what is special to audio",
    "language": "task models, losses, sampling, decoding",
    "data": "token files, packing, blends, loaders",
    "nn": "layers that declare parameter axes",
    "tokenizers": "text to ids and back",
    "graph": "modules snapped together by their ports",
    "addresses": "the YAML form",
    "draw": "text, Mermaid, SVG",
    "module": "NeuralModule: typed calls and configs",
    "wiring": "unification of axes, before a tensor exists",
    "symbols": "symbols and nodes",
    "steps": "a sequence of calls",
    "comparison": "what may flow where",
    "ports": "ports from annotations",
    "types": "axes, elements, types of ports",
    "rules": "what settings must obey",
    "errors": "what, where, expected, found, fix",
}
WIDTH, SIDE, HEIGHT, GAP, LEFT = 560, 150, 40, 10, 16


def box(x: float, y: float, width: float, height: float, title: str, words: str, fill: str, line: str) -> str:
    """A rectangle with a title and a line of words."""
    middle = y + height / 2
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="{line}"/>'
        f'<text x="{x + width / 2}" y="{middle - 3}" font-size="13" font-weight="600">{escape(title)}</text>'
        f'<text x="{x + width / 2}" y="{middle + 13}" font-size="11">{escape(words)}</text>'
    )


def main() -> None:
    """Read the contract and write the picture beside this script."""
    contract = configparser.ConfigParser()
    contract.read(HERE.parents[1] / "setup.cfg")
    text = contract["importlinter:contract:layers"]["layers"].replace("nemolet.", "")
    rows = [[name.strip() for name in re.split("[|:]", line)] for line in text.split("\n") if line.strip()]
    parts = []
    for index, row in enumerate(rows):
        width = (WIDTH - GAP * (len(row) - 1)) / len(row)
        for place, name in enumerate(row):
            x, y = LEFT + place * (width + GAP), 16 + index * (HEIGHT + GAP)
            parts.append(box(x, y, width, HEIGHT, name, WORDS[name], "#e3ebfb", "#5b7fc7"))
    top = 16 + (HEIGHT + GAP)
    side = box(
        LEFT + WIDTH + GAP, top, SIDE, (len(rows) - 2) * (HEIGHT + GAP) - GAP, "config", "", "#fdebd0", "#c77a1a"
    )
    lines = ("groups, validation,", "allowlist, build;", "imports errors only,", "used by archive and cli")
    x, y = LEFT + WIDTH + GAP + SIDE / 2, top + (len(rows) - 2) * (HEIGHT + GAP) / 2
    for index, words in enumerate(lines):
        side += f'<text x="{x}" y="{y + 16 + 15 * index}" font-size="11">{words}</text>'
    width, height = LEFT + WIDTH + GAP + SIDE + 16, 16 + len(rows) * (HEIGHT + GAP) + 6
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" font-family="sans-serif" text-anchor="middle" '
        f'fill="#1c2430" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    )
    picture = "\n".join([head, "<title>A box may import the boxes below it</title>", *parts, side, "</svg>"]) + "\n"
    (HERE / "layers.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
