"""The plan: where each parameter lies and what happens at each module's boundary, derived from declared axes.

Nothing here needs a device or a process group, so the plan of a cluster can be read on a laptop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import nn

from nemolet.errors import ParallelError
from nemolet.module import NeuralModule
from nemolet.parallel.layout import Boundary, ModulePlan, lay_out
from nemolet.parallel.mesh import MeshSizes
from nemolet.parallel.patterns import Layer, Pattern
from nemolet.parallel.rules import Rules
from nemolet.parallel.settings import Parallel
from nemolet.types import format_dims


@dataclass(frozen=True)
class ParameterPlan:
    """Where one parameter lies.

    ``shards`` maps a mesh axis to the dim it cuts; on all other axes there are copies. ``fsdp`` stands for dp_shard
    and cp together, ``efsdp`` for what is left of them and tp beside the experts' ep. ``local_shape`` is the largest
    part of a rank. ``summed`` says that the gradients of the copies over tp are parts of a sum.
    """

    name: str
    axes: str
    shape: tuple[int, ...]
    shards: Mapping[str, int]
    local_shape: tuple[int, ...]
    summed: bool = False
    tied: tuple[str, ...] = ()

    @property
    def expert(self) -> bool:
        """Whether it belongs to one of several experts that lie on different ranks."""
        return "ep" in self.shards

    @property
    def size(self) -> int:
        """How many numbers there are in all."""
        return prod(self.shape)

    @property
    def local_size(self) -> int:
        """How many numbers a rank holds, at most."""
        return prod(self.local_shape)


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` derives (final).

    Args:
        sizes: of the mesh.
        rules: which letters lie on which mesh axes.
        parameters: by name; a tied parameter is here once, under its first name.
        modules: by name, where a module's boundary or parameters need care; all others run as they are.
        units: modules whose parameters are gathered together, the innermost first; ``""`` is the whole graph.
        stacks: names of the blocks of each stack.
    """

    sizes: MeshSizes
    rules: Rules
    parameters: Mapping[str, ParameterPlan]
    modules: Mapping[str, ModulePlan]
    units: tuple[str, ...]
    stacks: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        from nemolet.parallel.table import plan_table

        return plan_table(self)

    def explain(self) -> str:
        """The plan as text, with the reason for each line."""
        from nemolet.parallel.table import explanation

        return explanation(self)


def plan(graph: nn.Module, rules: Rules | None = None, sizes: MeshSizes | None = None, **options: object) -> Plan:
    """Derive the plan of a model from the axes its layers and ports declare.

    Args:
        graph: the model, or the graph that is trained; on any device, also on none (``meta``).
        rules: which letters lie on which mesh axes; None for the usual ones.
        sizes: of the mesh, resolved; None for one rank.
        options: ``overrides`` and ``kv_heads`` of :class:`Parallel`.

    Raises:
        ParallelError: for a layer that fits no pattern, or a size that does not divide, naming both.

    Example:
        >>> import nemolet as nl
        >>> model = nl.language.CausalLM(vocab_size=16, layers=1, width=8, heads=2)
        >>> derived = plan(model, sizes=MeshSizes(dp_shard=2, tp=2))
        >>> derived.parameters["graph.decoder.blocks.0.attention.qkv.weight"].shards
        {'tp': 0, 'fsdp': 1}
    """
    rules, sizes = rules or Rules(), sizes or MeshSizes()
    defaults = Parallel(**options)  # type: ignore[arg-type]
    layout = lay_out(graph, rules, sizes, defaults.overrides or {}, defaults.kv_heads)
    parameters = _parameters(graph, layout.layers, layout.modules, sizes)
    return Plan(sizes, rules, parameters, layout.modules, _units(graph, layout.layers, layout.stacks), layout.stacks)


def _parameters(
    graph: nn.Module, layers: Mapping[str, Layer], modules: Mapping[str, ModulePlan], sizes: MeshSizes
) -> dict[str, ParameterPlan]:
    owners: dict[int, list[tuple[str, str]]] = {}  # parameter -> modules that hold it, and under which name
    for prefix, module in graph.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((prefix, key))
    found = {}
    for name, parameter in graph.named_parameters():
        prefix, key = owners[id(parameter)][0]
        cuts = [layers[p].shards[k] for p, k in owners[id(parameter)]]
        if any(cut != cuts[0] for cut in cuts):
            raise ParallelError(
                "a tied parameter would be cut in two ways",
                where=name,
                expected="one way to cut it",
                found="; ".join(f"{p}.{k}: {dict(cut)}" for (p, k), cut in zip(owners[id(parameter)], cuts)),
                fix="untie it, or set the same override for both modules",
            )
        module = layers[prefix].module
        dims = module.parameter_dims.get(key) if isinstance(module, NeuralModule) else None
        shape = tuple(parameter.shape)
        shards, local = _with_data_parallel(name, shape, dict(cuts[0]), sizes)
        found[name] = ParameterPlan(
            name=name,
            axes=format_dims(dims) if dims is not None else "not declared",
            shape=shape,
            shards=shards,
            local_shape=local,
            summed=any(k in modules[p].summed for p, k in owners[id(parameter)] if p in modules),
            tied=tuple(f"{p}.{k}" if p else k for p, k in owners[id(parameter)][1:]),
        )
    return found


def _with_data_parallel(
    name: str, shape: tuple[int, ...], shards: dict[str, int], sizes: MeshSizes
) -> tuple[dict[str, int], tuple[int, ...]]:
    """Add the dim that data-parallel ranks cut: the first that nobody else cuts and that they divide, else the first.

    Two cuts of one dim would interleave, which makes checkpoints hard to read in another layout.
    """
    local = list(shape)
    for axis, dim in shards.items():
        local[dim] = -(-local[dim] // sizes.of(axis))
    axis, parts = ("efsdp", sizes.efsdp) if "ep" in shards else ("fsdp", sizes.dp_shard * sizes.cp)
    if parts == 1 or not shape:
        return shards, tuple(local)
    free = [d for d in range(len(shape)) if d not in shards.values()]
    even = [d for d in free if shape[d] % parts == 0]
    dim = even[0] if even else 0
    if not even and 0 not in free and shape[0] % (sizes.of("tp") * parts):
        raise ParallelError(
            "no dim is left that data-parallel ranks could cut",
            where=name,
            expected=f"a dim that {parts} divides",
            found=f"shape {shape}, cut on {shards}",
            fix="change parallel.dp_shard",
        )
    local[dim] = -(-local[dim] // parts)
    return {**shards, axis: dim}, tuple(local)


def _units(graph: nn.Module, layers: Mapping[str, Layer], stacks: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """Blocks of stacks, then tables that nobody shares, then the rest; a tied table belongs to the rest."""
    blocks = [name for stack in stacks for name in stack]
    holders: dict[int, int] = {}
    for layer in layers.values():
        for parameter in layer.module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1

    def alone(layer: Layer) -> bool:
        inside = any(layer.name.startswith(f"{block}.") for block in blocks)
        vocabulary = bool(layer.letters & {"V", "P"})
        return vocabulary and not inside and all(holders[id(p)] == 1 for p in layer.module.parameters(recurse=False))

    experts = [layer.name for layer in layers.values() if any("ep" in cut for cut in layer.shards.values())]
    return (*experts, *blocks, *(layer.name for layer in layers.values() if layer.name and alone(layer)), "")


__all__ = ["Boundary", "ModulePlan", "ParameterPlan", "Pattern", "Plan", "plan"]
