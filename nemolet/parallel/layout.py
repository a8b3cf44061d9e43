"""How activations lie at the boundaries of modules, so that layers which are cut fit each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase

from torch import nn

from nemolet.errors import ParallelError
from nemolet.language.losses import CrossEntropy
from nemolet.module import NeuralModule
from nemolet.parallel.heads import attention_of
from nemolet.parallel.mesh import MeshSizes
from nemolet.parallel.patterns import (
    Layer,
    Override,
    Pattern,
    by_position,
    carries_sequence,
    layer_of,
    sequence_ports,
)
from nemolet.parallel.rules import Rules
from nemolet.types import Logits, Loss, NeuralType


class Boundary(Enum):
    """What happens to an activation where it enters or leaves a module, over the ranks of tp.

    Backward, each is followed by its adjoint: where gradients of the copies are parts of a sum, they are summed.
    """

    KEEP = "keep"
    COPY = "copy"  # backward: sum
    SUM = "sum"  # backward: copy
    GATHER = "gather T"  # backward: sum and scatter
    SCATTER = "sum and scatter T"  # backward: gather
    SPLIT = "own part of T"  # backward: gather
    JOIN = "join T"  # backward: own part
    JOIN_SCORES = "join V"  # backward: own part
    SHOW_SCORES = "join V to look at"  # without gradients only


# What is left of a boundary at the ends of a stack, where the sequence is whole again.
_AFTER_SPLIT = {Boundary.KEEP: Boundary.SPLIT, Boundary.GATHER: Boundary.COPY, Boundary.JOIN: Boundary.KEEP}
_BEFORE_JOIN = {Boundary.KEEP: Boundary.JOIN, Boundary.SCATTER: Boundary.SUM, Boundary.SPLIT: Boundary.KEEP}


@dataclass(frozen=True)
class ModulePlan:
    """What a module needs that does not run as on one device.

    Args:
        pattern: how its parameters are cut; None for a module without parameters of its own.
        enter: what happens to the hidden states that enter.
        leave: what happens to what leaves.
        summed: its parameters whose gradients, over the copies on tp, are parts of a sum.
        few_heads: each rank computes a share of a projection that all hold.
        apart: the vocabulary of a loss lies on several ranks.
    """

    pattern: Pattern | None = None
    enter: Boundary = Boundary.KEEP
    leave: Boundary = Boundary.KEEP
    summed: tuple[str, ...] = ()
    few_heads: bool = False
    apart: bool = False


@dataclass
class Layout:
    """Layers by name, plans of modules by name, and the stacks of blocks."""

    layers: dict[str, Layer] = field(default_factory=dict)
    modules: dict[str, ModulePlan] = field(default_factory=dict)
    stacks: tuple[tuple[str, ...], ...] = ()


def lay_out(
    graph: nn.Module, rules: Rules, sizes: MeshSizes, overrides: Mapping[str, Override], kv_heads: str
) -> Layout:
    """Recognise all layers and say what happens at the boundaries.

    Raises:
        ParallelError: for a layer that fits no pattern, or an override that matches nothing.
    """
    names = dict(graph.named_modules())
    forced = _forced(names, overrides)
    stacks = tuple(_stacks(graph))
    layers = {
        name: layer_of(name, module, rules, sizes, forced.get(name), kv_heads)
        for name, module in names.items()
        if next(module.parameters(recurse=False), None) is not None
    }
    layout = Layout(layers, stacks=stacks)
    if sizes.tp > 1:
        _Boundaries(graph, layout, forced, sequence=rules.sequence, ep=sizes.ep).draw()
    elif sizes.ep > 1:
        layout.modules = {n: ModulePlan(p.pattern) for n, p in layers.items() if p.pattern is Pattern.EXPERTS}
    layout.modules = {name: layout.modules[name] for name in names if name in layout.modules}
    return layout


def _forced(names: Mapping[str, nn.Module], overrides: Mapping[str, Override]) -> dict[str, Override]:
    """Overrides by module; one of a whole module reaches what is below it."""
    found: dict[str, Override] = {}
    for pattern, what in overrides.items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ParallelError(
                "an override matches no module",
                where=f"parallel.overrides.{pattern}",
                expected="a module name, with * for any part of it",
                found=pattern,
                fix="see the names in the table of `nemolet plan`",
            )
        for name in matched:
            found.setdefault(name, what)
            if what == "replicate":
                found.update({n: what for n in names if n.startswith(f"{name}.")})
    return found


def _stacks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, ...]]:
    """Outermost lists of blocks through which hidden states flow one after another."""
    for key, child in module.named_children():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(child, nn.ModuleList) and len(child) and all(carries_sequence(block) for block in child):
            yield tuple(f"{name}.{index}" for index in range(len(child)))
        else:
            yield from _stacks(child, name)


class _Boundaries:
    """One walk over a graph under tp, which fills in a layout (final)."""

    def __init__(
        self, graph: nn.Module, layout: Layout, forced: Mapping[str, Override], *, sequence: bool, ep: int
    ) -> None:
        self.graph, self.layout, self.forced, self.ep = graph, layout, forced, ep
        self.sequence = sequence
        self.names = dict(graph.named_modules())
        self.blocks = {name for stack in layout.stacks for name in stack}
        self.partners = self._pair()
        self.seen: set[int] = set()

    def draw(self) -> None:
        """Fill in the plans of all modules."""
        self._scores()
        self._walk("", self.graph, split=False, entered=False)
        if self.sequence:
            for stack in self.layout.stacks:
                first, last = (self.layout.modules.get(name, ModulePlan()) for name in (stack[0], stack[-1]))
                self._edit(stack[0], enter=_AFTER_SPLIT[first.enter])
                self._edit(stack[-1], leave=_BEFORE_JOIN[last.leave])

    def _edit(self, name: str, **changes: object) -> None:
        known = self.layout.modules.get(name, ModulePlan())
        self.layout.modules[name] = replace(known, **changes)  # type: ignore[arg-type]

    # ------------------------------------------------------------------------------ columns and rows

    def _pair(self) -> dict[str, str]:
        """For each column and row, the innermost module that holds its counterpart too."""
        wanted = {Pattern.COLUMN: Pattern.ROW, Pattern.ROW: Pattern.COLUMN}
        partners = {}
        for name, layer in self.layout.layers.items():
            if layer.pattern not in wanted:
                continue
            outer = name
            while outer:
                outer = outer.rpartition(".")[0]
                others = [p for n, p in self.layout.layers.items() if n.startswith(f"{outer}." if outer else "")]
                if any(p.pattern is wanted[layer.pattern] and _same(p, layer) for p in others):
                    break
                if outer in self.blocks or not outer:
                    raise ParallelError(
                        f"a layer that is cut as a {layer.pattern.value} has no counterpart",
                        where=name,
                        expected=f"a {wanted[layer.pattern].value} of the same axis beside it",
                        found=f"only {layer.letter} on tp here",
                        fix=f"set parallel.overrides={{{name}: replicate}}, or declare the axes of the other layer",
                    )
            partners[name] = outer
        return partners

    def _inside(self, layer: Layer) -> bool:
        """Whether a whole layer acts on cut activations, such as a norm of each head."""
        for name, outer in self.partners.items():
            within = layer.name.startswith(f"{outer}." if outer else "")
            if within and layer.letters and layer.letters <= self.layout.layers[name].minor:
                return True
        return False

    # ------------------------------------------------------------------------------ the walk

    def _walk(self, name: str, module: nn.Module, *, split: bool, entered: bool) -> None:
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        split = split or (self.sequence and name in self.blocks)
        layer = self.layout.layers.get(name)
        if self.forced.get(name) == "replicate":
            for inner in self.layout.layers:
                if inner == name or inner.startswith(f"{name}." if name else ""):
                    self._edit(inner, pattern=Pattern.WHOLE)
            if split:
                self._edit(name, enter=Boundary.JOIN, leave=Boundary.SPLIT)
            return
        if layer is not None:
            self._layer(name, layer, split=split, entered=entered)
        elif self._is_branch(name, module):
            entered = True
            self._edit(name, enter=Boundary.GATHER if split else Boundary.COPY)
        split = self._mixture(name, module, split)
        for key, child in module.named_children():
            self._walk(f"{name}.{key}" if name else key, child, split=split, entered=entered)

    def _layer(self, name: str, layer: Layer, *, split: bool, entered: bool) -> None:
        copied = tuple(key for key, axes in layer.shards.items() if "tp" not in axes)
        inward = Boundary.KEEP if entered else Boundary.GATHER if split else Boundary.COPY
        outward = Boundary.SCATTER if split else Boundary.SUM
        if layer.pattern is Pattern.COLUMN:
            if layer.few_heads:
                attention_of(name, self.names)
            self._edit(name, pattern=layer.pattern, enter=inward, summed=copied, few_heads=layer.few_heads)
        elif layer.pattern is Pattern.ROW:
            # A bias is added after the sum, and where the sequence is whole by all ranks alike.
            summed = tuple(key for key in copied if split or key != "bias")
            self._edit(name, pattern=layer.pattern, leave=outward, summed=summed)
        elif layer.pattern is Pattern.LOOKUP:
            self._edit(name, pattern=layer.pattern, leave=outward)
        elif layer.pattern is Pattern.HEAD:
            self._edit(name, pattern=layer.pattern, enter=inward)
        elif layer.pattern is Pattern.EXPERTS:
            self._edit(name, pattern=layer.pattern)  # the dispatch brings tokens there and back
        elif layer.pattern is Pattern.BETWEEN:
            self._edit(name, pattern=layer.pattern)
        else:
            self._whole(name, layer, split=split)

    def _whole(self, name: str, layer: Layer, *, split: bool) -> None:
        if self._inside(layer):
            self._edit(name, pattern=layer.pattern, summed=tuple(layer.shards))
        elif not split:
            self._edit(name, pattern=layer.pattern)
        elif by_position(layer.module):
            self._edit(name, pattern=layer.pattern, summed=tuple(layer.shards))
        else:
            raise ParallelError(
                "nobody says that this layer looks at every position alone",
                where=name,
                expected="ports such as '... D', where the sequence is sharded",
                found=", ".join(map(str, getattr(layer.module, "input_ports", {}).values())),
                fix=f"declare its ports so, or set parallel.overrides={{{name}: replicate}}, or "
                "parallel.rules.activations.T=[cp]",
            )

    def _is_branch(self, name: str, module: nn.Module) -> bool:
        """Whether all that enters goes into layers that are cut, so that one boundary serves them all."""
        if not (isinstance(module, NeuralModule) and module.branch):
            return False
        inner = [p for n, p in self.layout.layers.items() if n.startswith(f"{name}.")]
        cut = (Pattern.COLUMN, Pattern.ROW, Pattern.BETWEEN)
        columns = any(p.pattern is Pattern.COLUMN for p in inner)
        return columns and all(p.pattern in cut or self._inside(p) for p in inner)

    def _mixture(self, name: str, module: nn.Module, split: bool) -> bool:
        """Whether tokens are split over tp inside; a mixture of experts wants each on one rank, or on all."""
        children = [self.layout.layers.get(f"{name}.{key}" if name else key) for key, _ in module.named_children()]
        experts = next((p for p in children if p is not None and p.pattern is Pattern.EXPERTS), None)
        if experts is None:
            return split
        apart = self.ep > 1  # experts lie on other ranks, also of tp: each token asks them once
        if apart and not split:
            self._edit(name, enter=Boundary.SPLIT, leave=Boundary.JOIN)
        elif split and not apart:
            self._edit(name, enter=Boundary.JOIN, leave=Boundary.SPLIT)
        return apart

    # ------------------------------------------------------------------------------ scores of a vocabulary

    def _scores(self) -> None:
        """Scores stay cut where all that is trained by them can add up over ranks; else they are joined.

        What only looks at them, such as a metric, gets them whole: without gradients from the head, else by itself.
        """
        ports = self.graph.output_ports if isinstance(self.graph, NeuralModule) else {}
        readers = [(n, m) for n, m in self.graph.named_modules() if isinstance(m, NeuralModule) and _has(m, Logits)]
        losses = [(n, m) for n, m in readers if _has(m, Loss, outputs=True)]
        heads = [name for name, layer in self.layout.layers.items() if layer.pattern is Pattern.HEAD]
        seen = any(
            isinstance(port.type, NeuralType) and isinstance(port.type.element, Logits) for port in ports.values()
        )
        if seen or not losses or not all(isinstance(module, CrossEntropy) for _, module in losses):
            for name in heads:
                self._edit(name, leave=Boundary.JOIN_SCORES)
            return
        lookers = [name for name, module in readers if (name, module) not in losses]
        for name in heads if lookers else ():
            self._edit(name, leave=Boundary.SHOW_SCORES)
        for name, _ in losses if heads else ():
            self._edit(name, apart=True)
        for name in lookers if heads else ():
            self._edit(name, enter=Boundary.JOIN_SCORES)


def _same(one: Layer, other: Layer) -> bool:
    return one.kind == other.kind


def _has(module: NeuralModule, element: type, outputs: bool = False) -> bool:
    """Whether something of this element enters a module, or leaves it."""
    if module.signature is None:
        return False
    ports = module.output_ports if outputs else module.input_ports
    return any(isinstance(p.type, NeuralType) and isinstance(p.type.element, element) for p in ports.values())


__all__ = ["Boundary", "Layout", "ModulePlan", "lay_out", "sequence_ports"]
