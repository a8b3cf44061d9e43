"""The check that a set of wires fits, before any tensor exists.

:func:`check` walks nodes in order and unifies, over every wire, the axes of the output with the axes of the input:
each letter of each node is a variable, a wire makes two variables one, and two sizes in one variable are an error
that names both ends. It is a pure function of the nodes; nothing is kept between calls. :func:`bind_call` makes the
node of one symbolic call, checked against what is known of its inputs; a graph is checked as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from nemolet.comparison import Outcome, compare, pair_axes
from nemolet.errors import WiringError, did_you_mean
from nemolet.ports import Port
from nemolet.symbols import Node, Symbol, Typed, Wire, holds_symbol, symbols_of, upstream
from nemolet.types import ANY, LEGEND, REST, Axis, DictOf, Element, ListOf, NeuralType, PortType


class Var:
    """One axis variable; variables that a wire made equal share a root."""

    __slots__ = ("axes", "letter", "origin", "parent", "size")

    def __init__(self, letter: str, size: int | None, origin: str) -> None:
        self.letter, self.size, self.origin = letter, size, origin
        self.parent: Var | None = None
        self.axes: tuple[Var, ...] | None = None  # of '...': what a wire showed it to stand for

    def root(self) -> Var:
        var = self
        while (parent := var.parent) is not None:
            if parent.parent is not None:
                var.parent = parent.parent  # so that the way is short at the next look, however many wires it led over
            var = parent
        return var

    def axis(self) -> Axis:
        """What is known of it; an axis of any kind is of the kind it has met."""
        root = self.root()
        return Axis(root.letter if self.letter == ANY else self.letter, root.size)


@dataclass(frozen=True)
class Resolved:
    """A tensor type whose axes are variables: what a symbol carries during a check."""

    declared: tuple[Var, ...]
    element: Element
    refs: Mapping[str, Var]  # element fields that refer to the size of an axis

    @property
    def axes(self) -> tuple[Var, ...]:
        """The axes, with what a wire has shown '...' to stand for."""
        axes = self.declared
        while axes and (axes[0].root().axes is not None):
            axes = (*(axes[0].root().axes or ()), *axes[1:])
        return axes

    def plain(self) -> NeuralType:
        """The type with everything the check found out."""
        known = {k: v.root().size for k, v in self.refs.items() if v.root().size and k != "of"}
        axes = tuple(var.axis() for var in self.axes)
        return NeuralType(_distinct(axes), replace(self.element, **known) if known else self.element)


@dataclass
class Items:
    """A container during a check: all its items have one type."""

    item: ResolvedTree
    length: int | None  # of a list; it becomes known where the list enters a port with a length
    named: bool = False  # whether it is a dictionary

    def plain(self) -> PortType:
        """The type with everything the check found out."""
        return self.holding(self.item.plain())

    def holding(self, item: PortType) -> PortType:
        """This container as a type, of items of a type."""
        return DictOf(item) if self.named else ListOf(item, self.length)


ResolvedTree = Resolved | Items


def _distinct(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Give a letter that occurs twice to its first axis and another of the kind to the later one."""
    used: set[str] = set()
    result = []
    for axis in axes:
        if axis.letter in used:
            free = (k for k, (kind, _) in LEGEND.items() if kind == axis.kind and k not in used)
            axis = Axis(next(free, ANY), axis.size)
        used.add(axis.letter)
        result.append(axis)
    return tuple(result)


class Scope:
    """The axis variables of one node."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.letters: dict[str, Var] = {}

    def var(self, axis: Axis, port: str) -> Var:
        """The variable of a letter; each 'Any' is an axis of its own."""
        origin = f"{self.label}.{port}" if port else self.label
        # An axis with a size of its own is told apart by it: one module may have a wide and a narrow D.
        key = str(axis) if axis.letter != ANY else f"Any{len(self.letters)}"
        if key not in self.letters:
            self.letters[key] = Var(axis.letter, axis.size, origin)
        return self.letters[key]

    def resolve(self, declared: NeuralType, port: str) -> Resolved:
        """A declared type with the variables of this node."""
        axes = tuple(self.var(axis, port) for axis in declared.axes)
        refs: dict[str, Var] = {}
        for f in fields(declared.element):
            value = getattr(declared.element, f.name)
            if isinstance(value, str):
                refs[f.name] = self.var(Axis(value), port)
        return Resolved(axes, declared.element, refs)

    def resolve_tree(self, declared: PortType, port: str) -> ResolvedTree:
        """The same for containers too."""
        if isinstance(declared, NeuralType):
            return self.resolve(declared, port)
        item = self.resolve_tree(declared.item, port)
        return Items(item, None, named=True) if isinstance(declared, DictOf) else Items(item, declared.size)


class Solution:
    """Types of all symbols after a check, with every size that the wires imply."""

    def __init__(self) -> None:
        self._types: dict[object, ResolvedTree] = {}

    def type_of(self, symbol: Symbol) -> PortType:
        """The solved type of a symbol."""
        return self.resolved(symbol).plain()

    def resolved(self, symbol: Symbol, port: str = "?") -> ResolvedTree:
        """The variables of a symbol; those of what no checked node returns are made when it first enters a port."""
        # Symbols of one output are made anew by each look at a node, so they are told apart by node and port.
        key = symbol if symbol.node is None else (symbol.node, symbol.port.name)
        if key not in self._types:
            origin = f"input {symbol.port.name or port}" if symbol.node is None else symbol.name
            self._types[key] = Scope(origin).resolve_tree(symbol.known, "")
        return self._types[key]

    def store(self, symbol: Symbol, resolved: ResolvedTree) -> None:
        """Keep the variables of an output of a node."""
        self._types[symbol.node, symbol.port.name] = resolved


def check(nodes: Sequence[Node]) -> Solution:
    """Unify all wires of the nodes, which come in running order.

    Raises:
        WiringError: naming both ports of the first wire that does not fit.
    """
    solution = Solution()
    for node in nodes:
        scope = Scope(node.module.label)
        for name, port in node.module.input_ports.items():
            if name in node.wires:
                _Entry(port, scope, solution).take(node.wires[name], port.type)
        for name, symbol in node.outputs().items():
            solution.store(symbol, scope.resolve_tree(symbol.port.type, name))
    return solution


@dataclass(frozen=True)
class _Entry:
    """A port that a wire enters."""

    port: Port
    scope: Scope
    solution: Solution

    @property
    def where(self) -> str:
        return f"{self.scope.label}.{self.port.name}"

    def take(self, wire: Wire, declared: PortType) -> None:
        """Let a wire enter: the types must fit, and their axes become one."""
        if isinstance(wire, Symbol):
            if wire.port.optional and not self.port.optional:
                raise WiringError(
                    "an optional output flows into a port that needs a value",
                    where=self.where,
                    expected=f"{self.port}",
                    found=f"{wire.name} | None",
                    fix=f"make port {self.port.name!r} optional, or the source not",
                )
            self.unify(declared, self.solution.resolved(wire, self.port.name), wire.name)
            return
        if isinstance(declared, DictOf) and isinstance(wire, dict):
            items = list(wire.values())
        elif isinstance(declared, ListOf) and isinstance(wire, list) and declared.size in (None, len(wire)):
            items = wire
        else:
            raise self.misfit(Outcome.CONTAINER_SIZE_MISMATCH, declared, _describe(wire), _names(wire))
        for item in items:
            self.take(item, declared.item)

    def unify(self, declared: PortType, resolved: ResolvedTree, source: str) -> None:
        """Compare what is known of both sides, and make it one."""
        found = resolved.plain()
        outcome = compare(declared, found)
        if not outcome.flows:
            raise self.misfit(outcome, declared, found, source)
        if isinstance(resolved, Items):
            assert isinstance(declared, (ListOf, DictOf))
            if isinstance(declared, ListOf) and resolved.length is None:
                resolved.length = declared.size
            self.unify(declared.item, resolved.item, source)
            return
        assert isinstance(declared, NeuralType)
        if not declared.axes and resolved.axes:
            return  # Void
        want = self.scope.resolve(declared, self.port.name)
        pairs = _pair(want.axes, resolved.axes)
        if pairs is None or not all(mine.axis().fits(theirs.axis()) for mine, theirs in pairs):
            note = "'...' already stands for other axes"
            raise self.misfit(Outcome.INCOMPATIBLE, declared, found, source, note)
        pairs += [(want.refs[name], resolved.refs[name]) for name in want.refs if name in resolved.refs]
        for name, var in want.refs.items():  # a letter here against a known number there
            size = getattr(resolved.element, name, None)
            if isinstance(size, int):
                pairs.append((var, Var(var.letter, size, source)))
        for name, var in resolved.refs.items():
            size = getattr(want.element, name, None)
            if isinstance(size, int):
                pairs.append((Var(var.letter, size, self.where), var))
        for mine, theirs in pairs:
            clash = _merge(mine.root(), theirs.root())
            if clash:
                raise self.misfit(Outcome.DIM_INCOMPATIBLE, declared, found, source, clash)

    def misfit(
        self, outcome: Outcome, expected: PortType, found: object, source: str, note: str | None = None
    ) -> WiringError:
        """The one text for a wire that does not fit."""
        what = {
            Outcome.DIM_INCOMPATIBLE: "an axis has another size",
            Outcome.TRANSPOSE_SAME: "the axes are in another order",
            Outcome.CONTAINER_SIZE_MISMATCH: "the containers differ",
            Outcome.SAME_TYPE_INCOMPATIBLE_PARAMS: "the elements have different parameters",
            Outcome.LESS: "the element is too general",
        }.get(outcome, "the types do not fit")
        fix = {
            Outcome.DIM_INCOMPATIBLE: (f"{note}; " if note else "") + "build both modules with the same size",
            Outcome.TRANSPOSE_SAME: "transpose the tensor between the two modules",
            Outcome.CONTAINER_SIZE_MISMATCH: "pass a container of the declared kind, depth and length",
            Outcome.SAME_TYPE_INCOMPATIBLE_PARAMS: "give both modules the same value, or convert in between",
        }.get(outcome, note or _element_fix(expected, found))
        return WiringError(
            f"{what}: {source} -> {self.where}",
            where=self.where,
            expected=f"{expected}   at input {self.where}",
            found=f"{found}   from {source}",
            fix=fix,
        )


def _describe(wire: Wire) -> str:
    if isinstance(wire, Symbol):
        return str(wire.port.type)
    items = list(wire.values()) if isinstance(wire, dict) else wire
    return f"{type(wire).__name__} of {len(items)}: [{', '.join(_describe(item) for item in items)}]"


def _names(wire: Wire) -> str:
    return ", ".join(dict.fromkeys(s.name for s in symbols_of(wire))) or "an empty container"


def _pair(want: tuple[Var, ...], have: tuple[Var, ...]) -> list[tuple[Var, Var]] | None:
    """Pair two rows of axes, where an open '...' takes what the other row has more; None where it cannot."""
    pairs = pair_axes(want, have)
    if pairs is None:
        return None
    left, right = want[: len(want) - len(pairs)], have[: len(have) - len(pairs)]
    if [var.letter for var in left] != [REST]:
        left, right = right, left
    if not left:
        return pairs
    (rest,) = left
    if [var.letter for var in right] == [REST]:
        return [(rest, right[0]), *pairs]
    if any(var.root() is rest.root() for var in right):  # it cannot stand for itself and more
        return None
    rest.root().axes = right
    return pairs


def _merge(mine: Var, theirs: Var) -> str | None:
    """Make two variables one; where their sizes differ, say so."""
    if mine is theirs:
        return None
    if mine.size is not None and theirs.size is not None and mine.size != theirs.size:
        return f"{mine.letter} is {mine.size} by {mine.origin}, but {theirs.size} by {theirs.origin}"
    if theirs.size is None and mine.size is not None:
        theirs.size, theirs.origin = mine.size, mine.origin
    if theirs.letter == ANY:
        theirs.letter = mine.letter
    mine.parent = theirs
    return None


def _element_fix(expected: PortType, found: object) -> str:
    if isinstance(expected, NeuralType) and isinstance(found, NeuralType):
        if type(expected.element) is not type(found.element):
            return f"wire an output whose element is {type(expected.element).__name__}"
        return f"wire an output with the axes {' '.join(map(str, expected.axes)) or 'of a scalar'}"
    return "wire an output of the expected type"


def bind_call(
    module: Typed, order: Sequence[str], options: Sequence[str], args: Sequence[object], kwargs: Mapping[str, object]
) -> Node:
    """Bind the arguments of a symbolic call to ports, and check everything up to here.

    Raises:
        WiringError: for unknown, missing or doubled arguments, a tensor among symbols, or a misfit.
    """
    if len(args) > len(order):
        raise WiringError(
            "too many arguments",
            where=module.label,
            expected=f"at most {len(order)}: {', '.join(order)}",
            found=len(args),
            fix="pass each port once, by name",
        )
    given = dict(zip(order, args))
    for name, value in kwargs.items():
        if name in given:
            raise WiringError(
                f"port {name!r} is given twice",
                where=f"{module.label}.{name}",
                expected="one wire for each port",
                found=f"{_brief(given[name])} and {_brief(value)}",
                fix=f"remove one of the two wires into {module.label}.{name}",
            )
        if name not in order:
            raise WiringError(
                f"there is no port {name!r}",
                where=f"{module.label}.{name}",
                expected=", ".join(map(str, module.input_ports.values())),
                found=f"{name} from {_brief(value)}",
                fix=did_you_mean(name, order) or "use one of the ports above",
            )
        given[name] = value
    wires: dict[str, Wire] = {}
    for name, port in module.input_ports.items():
        value = given.pop(name, None)
        if value is None:
            if not port.optional:
                raise WiringError(
                    f"nothing flows into port {name!r}",
                    where=f"{module.label}.{name}",
                    expected=str(port.type),
                    found="no wire",
                    fix=f"pass {name}=... with an output of type {port.type}",
                )
            continue
        wires[name] = _as_wire(value, f"{module.label}.{name}", port)
    constants = {name: given[name] for name in options if name in given}
    for name, value in constants.items():
        if holds_symbol(value):
            raise WiringError(
                "a symbol was passed to an argument that is no port",
                where=f"{module.label}.{name}",
                expected="a plain value",
                found=_brief(value),
                fix=f"annotate {name!r} in forward with the type of the tensor",
            )
    node = Node(module, wires, constants)
    return replace(node, known=_returned(node))


def _returned(node: Node) -> dict[str, PortType]:
    """The types that a call returns, as far as they follow from those that enter it.

    Raises:
        WiringError: for a misfit.
    """
    try:
        solution = check([node])
    except WiringError:  # looked at with all that led here, it fits after all, or the error names who fixed the sizes
        solution = check([*upstream(itertools.chain.from_iterable(map(symbols_of, node.wires.values()))), node])
    return {name: solution.type_of(symbol) for name, symbol in node.outputs().items()}


def _brief(value: object) -> str:
    """A given value for a message; a tensor by its class, because printing one would compute."""
    return ", ".join(map(repr, symbols_of(value))) or type(value).__name__


def _as_wire(value: object, where: str, port: Port) -> Wire:
    if isinstance(value, Symbol):
        return value
    if isinstance(value, (list, tuple)):
        return [_as_wire(item, where, port) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_wire(item, where, port) for key, item in value.items()}
    raise WiringError(
        "a value was passed among symbols",
        where=where,
        expected=f"a symbol of type {port.type}",
        found=type(value).__name__,
        fix="declare it with nl.Input(...) and pass it when the graph runs",
    )
