"""Symbols and nodes: what a call with symbols is made of.

A :class:`Symbol` stands for a tensor that does not exist yet, a :class:`Node` for one call of a module. Both are
plain records; whether they fit is the business of :mod:`nemolet.wiring`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from nemolet.errors import DeclarationError, WiringError
from nemolet.ports import Port, port_type
from nemolet.types import DictOf, ListOf, NeuralType, PortType


class Typed(Protocol):
    """What wiring needs to know of a module."""

    @property
    def input_ports(self) -> Mapping[str, Port]: ...

    @property
    def output_ports(self) -> Mapping[str, Port]: ...

    @property
    def label(self) -> str: ...


@dataclass(eq=False, frozen=True)
class Symbol:
    """A tensor that does not exist yet: an output of a node, or an input of the graph (``node`` is None)."""

    port: Port
    node: Node | None = None

    @property
    def name(self) -> str:
        """Where the tensor comes from, for messages."""
        return f"{self.node.module.label}.{self.port.name}" if self.node else f"input {self.port.name or '?'}"

    @property
    def known(self) -> PortType:
        """Its type, as far as the call that returned it could know."""
        return self.port.type if self.node is None else self.node.known.get(self.port.name, self.port.type)

    def __repr__(self) -> str:
        return f"Symbol({self.name}: {self.port.type})"

    def _no_value(self, *_: object) -> NoReturn:
        raise WiringError(
            "a symbol has no value yet", where=self.name, fix="wire modules with symbols; run the graph with tensors"
        )

    __bool__ = __len__ = __iter__ = __getitem__ = _no_value


Wire = Symbol | list["Wire"] | dict[str, "Wire"]


@dataclass(eq=False, frozen=True)
class Node:
    """One symbolic call: a module, the wire at each of its ports, plain options, and what is known of its outputs."""

    module: Typed
    wires: Mapping[str, Wire]
    options: Mapping[str, object] = field(default_factory=dict)
    known: Mapping[str, PortType] = field(default_factory=dict)

    def outputs(self) -> dict[str, Symbol]:
        """A symbol for each output port."""
        return {name: Symbol(port, self) for name, port in self.module.output_ports.items()}


def Input(type: Any, name: str = "", *, optional: bool = False) -> Any:
    """Declare an input of a graph.

    Args:
        type: an annotation of a port, such as ``TokenIdsBT``, ``list[HiddenBTD]`` or ``MaskBT | None``, or its type.
        name: the port's name in the graph; by default that of the first port it flows into.
        optional: whether the graph may be run without it; it then flows into optional ports only.

    Raises:
        DeclarationError: for anything that no port can be annotated with.

    Example:
        >>> from nemolet.types import TokenIdsBT
        >>> Input(TokenIdsBT, "tokens")
        Symbol(input tokens: B T TokenIds(vocab=V))
    """
    where = f"input {name or '?'}"
    is_type = isinstance(type, (NeuralType, ListOf, DictOf))
    declared, may_miss = (type, False) if is_type else port_type(type, where)
    if declared is None:
        raise DeclarationError(
            "an input needs a type", where=where, expected="an alias such as nl.TokenIdsBT", found=type
        )
    return Symbol(Port(name, declared, optional or may_miss))


def inputs_of(module: Typed) -> dict[str, Symbol]:
    """An input for each port of a module, by name: what a graph needs that is to be called as the module is.

    Example:
        >>> from nemolet.nn import Decoder
        >>> inputs_of(Decoder(layers=1, width=8, heads=2))["mask"]
        Symbol(input mask: B T Mask)
    """
    return {name: Symbol(port) for name, port in module.input_ports.items()}


def symbols_of(value: object) -> Iterable[Symbol]:
    """All symbols inside a (possibly nested) value."""
    if isinstance(value, Symbol):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from symbols_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from symbols_of(item)


def holds_symbol(value: object) -> bool:
    """Whether a value is, or contains, a symbol. Called on every module call, so tensors leave at once."""
    kind = type(value)
    if kind is Symbol:
        return True
    if kind is list or kind is tuple:
        return any(holds_symbol(item) for item in value)  # type: ignore[attr-defined]
    return kind is dict and any(holds_symbol(item) for item in value.values())  # type: ignore[attr-defined]


def upstream(ends: Iterable[Symbol]) -> list[Node]:
    """All nodes that the given symbols need, each after what it needs itself."""
    order: list[Node] = []
    seen: set[int] = set()
    stack: list[tuple[Node, bool]] = [(s.node, False) for s in reversed(list(ends)) if s.node]
    while stack:  # iterative: deep models must not meet Python's recursion limit
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            needed = [s.node for s in symbols_of(list(node.wires.values())) if s.node]
            stack.extend((each, False) for each in reversed(needed))  # the first port's source runs first
    return order
