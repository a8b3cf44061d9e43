"""``nemolet plan``: where every parameter of a training run lies, and how many bytes each rank needs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from nemolet.cli import check, train
from nemolet.config import build
from nemolet.errors import ConfigError


@dataclass(frozen=True)
class Settings(train.Settings):
    """A training config, and the cluster it is planned for.

    Args:
        world: ranks; null for as many as the sizes of ``parallel`` multiply to, or a machine of 8.
        explain: also say what happens at the boundaries of modules, and why.
    """

    world: int | None = None
    explain: bool = False

    CONFIG_RULES: ClassVar[tuple[tuple[str, str], ...]] = (("world >= 1", "world is at least 1"),)


def run(settings: Settings) -> None:
    """Print the plan, and what it takes."""
    from nemolet.parallel.plan import plan
    from nemolet.parallel.planner import memory
    from nemolet.parallel.table import memory_table
    from nemolet.training.graphs import example_batch

    parallel = settings.parallel
    sizes = parallel.sizes()
    known = [sizes.of(axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")]
    least = prod(size for size in known if size > 0)
    world = settings.world or (least if -1 not in known else max(8, least))
    sizes = sizes.resolve(world)
    graph = check.wired(settings)
    derived = plan(graph, parallel.make_rules(), sizes, overrides=parallel.overrides, kv_heads=parallel.kv_heads)
    source = build(settings.data, where="data")
    stages = memory(
        graph, derived, example_batch(graph, source.typical), parallel=parallel, optimizer=settings.optim.name
    )
    if not stages:
        raise ConfigError("there is nothing to plan", where="model", fix="choose a model with parameters")
    print(derived.explain() if settings.explain else derived)
    print(f"\n{memory_table(stages, world)}")
