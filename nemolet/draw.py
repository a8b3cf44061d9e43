"""A graph as text table, Mermaid and SVG; every form is made from one :class:`Picture`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Box:
    """One module (or input, or output) of a picture."""

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
    """What is drawn."""

    title: str
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


def text_table(picture: Picture) -> str:
    raise NotImplementedError


def mermaid(picture: Picture) -> str:
    raise NotImplementedError


def svg(picture: Picture) -> str:
    raise NotImplementedError


def write(path: str, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")
