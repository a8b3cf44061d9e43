"""Names of a graph's modules, inputs and outputs, and letters of its axes."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemolet.errors import WiringError
from nemolet.module import NeuralModule
from nemolet.symbols import Node, Symbol, symbols_of
from nemolet.types import ANY, LEGEND, REST, Axis, NeuralType, PortType
from nemolet.wiring import Items, ResolvedTree, Solution, Var


class Letters:
    """Gives every axis variable one letter over all ports of a graph, and no letter to two variables."""

    def __init__(self, solution: Solution) -> None:
        self.solution = solution
        self.letter_of: dict[Var, str] = {}

    def of(self, symbol: Symbol) -> PortType:
        """The type of a symbol in the letters of the graph."""
        return self._named(self.solution.resolved(symbol))

    def _named(self, resolved: ResolvedTree) -> PortType:
        if isinstance(resolved, Items):
            return resolved.holding(self._named(resolved.item))
        plain = resolved.plain()
        axes = [Axis(self._letter(var.root(), axis), axis.size) for var, axis in zip(resolved.axes, plain.axes)]
        renamed = {
            name: self._letter(var.root(), Axis(var.letter))
            for name, var in resolved.refs.items()
            if isinstance(getattr(plain.element, name), str)
        }
        return NeuralType(tuple(axes), replace(plain.element, **renamed) if renamed else plain.element)

    def _letter(self, root: Var, axis: Axis) -> str:
        if axis.size is not None or axis.letter in (ANY, REST):
            return axis.letter
        if root not in self.letter_of:
            used = set(self.letter_of.values())
            same_kind = [k for k, (kind, _) in LEGEND.items() if kind == axis.kind and k not in used]
            self.letter_of[root] = axis.letter if axis.letter not in used else next(iter(same_kind), ANY)
        return self.letter_of[root]


def name_outputs(outputs: Sequence[Any], named: Mapping[str, Symbol]) -> dict[str, Symbol]:
    """The ends of a graph by name: as given, else as the last module calls them."""
    ends: dict[str, Symbol] = {}
    for value in outputs:
        pairs = value._asdict() if hasattr(value, "_asdict") else value
        for name, symbol in (pairs if isinstance(pairs, dict) else {"": pairs}).items():
            symbol = _end(symbol)
            name = name or symbol.port.name
            unique = name if name not in ends else symbol.name.replace(".", "_")
            if unique in ends:
                raise WiringError(
                    "two outputs have one name", where=f"output {unique}", fix="pass them by name: Graph(a=..., b=...)"
                )
            ends[unique] = symbol
    return {**ends, **{name: _end(symbol) for name, symbol in named.items()}}


def _end(value: object) -> Symbol:
    if not isinstance(value, Symbol):
        raise WiringError(
            "a graph ends in symbols",
            where="Graph",
            expected="what a symbolic call returned",
            found=type(value).__name__,
            fix="call the modules with nl.Input(...) symbols",
        )
    return value


def name_modules(nodes: Sequence[Node], names: Mapping[str, NeuralModule], inputs: Collection[str]) -> dict[int, str]:
    """A name for each module, by its id: as given, else after its class, and not that of an input."""
    chosen = {id(module): name for name, module in names.items()}
    taken = {*names, *inputs}
    numbers: dict[str, Iterator[int]] = defaultdict(lambda: itertools.count(2))
    for node in nodes:
        if id(node.module) in chosen:
            continue
        name = base = node.module.label
        while name in taken:
            name = f"{base}_{next(numbers[base])}"
        chosen[id(node.module)] = name
        taken.add(name)
    return chosen


def name_inputs(nodes: Sequence[Node]) -> dict[str, Symbol]:
    """The inputs of a graph by name: as given, else after the port they enter."""
    named: dict[str, Symbol] = {}
    for node in nodes:
        for port, wire in node.wires.items():
            for symbol in symbols_of([wire]):
                if symbol.node is not None or any(symbol is known for known in named.values()):
                    continue
                name = symbol.port.name or port
                if name in named:
                    raise WiringError(
                        "two inputs have one name",
                        where=f"input {name}",
                        expected="distinct names",
                        found=f"{named[name].port.type} and {symbol.port.type}",
                        fix=f'name them: nl.Input(..., "{name}_2")',
                    )
                named[name] = symbol
    return named
