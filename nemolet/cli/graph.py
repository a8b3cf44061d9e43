"""``nemolet graph``: a picture of a training graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nemolet.cli import train
from nemolet.errors import ConfigError


@dataclass(frozen=True)
class Settings(train.Settings):
    """A training config, and what to draw.

    Args:
        out: a ``.svg`` or ``.md`` file; null prints a table.
        inside: draw the inside of the model instead of the model and its loss.
    """

    out: str | None = None
    inside: bool = False

    CONFIG_RULES: ClassVar[tuple[tuple[str, str], ...]] = ()  # no data flows through a picture


def run(settings: Settings) -> None:
    """Print a table, or write a picture."""
    if settings.out is not None and not settings.out.endswith((".svg", ".md")):
        raise ConfigError(
            "this kind of picture is unknown",
            where="out",
            found=settings.out,
            expected="a name that ends in .svg or .md",
        )
    graph = train.wired(settings)
    if settings.inside:
        graph = getattr(graph.model, "graph", None)
        if graph is None:
            raise ConfigError("this model has no graph inside", where="inside", fix="leave inside=true out")
    if settings.out is None:
        print(graph.summary())
        return
    graph.draw(settings.out)
    print(settings.out)
