"""``nemolet plan``: where every parameter of a training run lies, and how many bytes each rank needs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from nemolet.cli import train
from nemolet.config import build
from nemolet.errors import ConfigError

if TYPE_CHECKING:
    from nemolet.parallel.plan import Plan


@dataclass(frozen=True)
class Settings(train.Settings):
    """A training config, and the cluster it is planned for.

    Args:
        world: ranks; null for as many as the sizes of ``parallel`` multiply to, or a machine of 8.
        explain: also say what happens at the boundaries of modules, and why.
        out: a ``.svg`` or ``.md`` file into which the model is drawn as a rank sees it; null for none.
    """

    world: int | None = None
    explain: bool = False
    out: str | None = None

    CONFIG_RULES: ClassVar[tuple[tuple[str, str], ...]] = (("world >= 1", "world is at least 1"),)


def run(settings: Settings) -> None:
    """Print the plan, and what it takes."""
    show(settings, world=settings.world, explain=settings.explain, out=settings.out)


def show(settings: train.Settings, *, world: int | None = None, explain: bool = False, out: str | None = None) -> None:
    """Print the plan of a training config; no weights are made, and no data is read.

    Args:
        settings: of the run.
        world: see :class:`Settings`, like what follows.
        explain: whether boundaries are printed too.
        out: where a picture goes.
    """
    from nemolet.parallel.plan import plan
    from nemolet.parallel.planner import memory
    from nemolet.parallel.table import memory_table
    from nemolet.training.graphs import example_batch
    from nemolet.training.optim import states

    parallel = settings.parallel
    sizes = parallel.sizes()
    known = [sizes.of(axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")]
    least = prod(size for size in known if size > 0)
    world = world or (least if -1 not in known else max(8, least))
    sizes = sizes.resolve(world)
    graph = train.wired(settings)
    derived = plan(graph, parallel.make_rules(), sizes, overrides=parallel.overrides, kv_heads=parallel.kv_heads)
    source = build(settings.data, where="data")
    stages = memory(
        graph, derived, example_batch(graph, source.typical), parallel=parallel, states=states(settings.optim, graph)
    )
    print(derived.explain() if explain else derived)
    print(f"\n{memory_table(stages, world)}")
    if out is not None:
        _draw(graph, derived, out)


def _draw(graph: Any, derived: Plan, path: str) -> None:
    from nemolet.draw import mermaid, svg, write
    from nemolet.parallel.picture import sharded_picture

    if not path.endswith((".svg", ".md")):
        raise ConfigError(
            "this kind of picture is unknown",
            where="out",
            found=path,
            expected="a name that ends in .svg or .md",
        )
    inside = getattr(graph.model, "graph", None)
    picture = sharded_picture(graph if inside is None else inside, derived, "" if inside is None else "model.graph")
    write(path, svg(picture) if path.endswith(".svg") else mermaid(picture))
    print(path)
