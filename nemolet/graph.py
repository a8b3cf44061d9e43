"""Graph: typed modules snapped together by their ports.

Two ways lead to the same object. In Python, call modules with symbols and pass the last symbols to
:class:`Graph`. In YAML, :func:`compose` takes modules in order and matches ports by name and type.
A Graph has ports of its own, so graphs nest; it runs as a plain sequence of calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemolet.addresses import check_addresses, full_address, full_wires, item_type, running_order, wired_inputs
from nemolet.comparison import compare
from nemolet.draw import Arrow, Box, Picture, mermaid, svg, text_table, write
from nemolet.errors import ConfigError, WiringError, did_you_mean
from nemolet.module import NeuralModule
from nemolet.naming import Letters, name_inputs, name_modules, name_outputs
from nemolet.ports import Port, Signature
from nemolet.steps import Step, release
from nemolet.symbols import Node, Symbol, Wire, symbols_of, upstream
from nemolet.types import PortType
from nemolet.wiring import Solution, check


class Graph(NeuralModule, ports_of_instance=True):
    """Modules wired by symbols, checked when the graph is made (final).

    Args:
        outputs: symbols, or what a symbolic call returned.
        names: names for modules, by name; others are named after their class.
        named_outputs: symbols by the name of the output.

    Raises:
        WiringError: for wires that do not fit, doubled names, or nothing to compute.

    Example:
        >>> import nemolet as nl
        >>> embed, head = nl.nn.Embedding("V", "D", 10, 4), nl.nn.Linear("D", "D", 4, 4)
        >>> tokens = nl.Input(nl.TokenIdsBT)
        >>> graph = Graph(head(embed(tokens)))
        >>> list(graph.input_ports), list(graph.output_ports)
        (['tokens'], ['output'])
        >>> graph(tokens=__import__("torch").zeros(2, 3, dtype=int)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, *outputs: Any, names: Mapping[str, NeuralModule] | None = None, **named_outputs: Symbol) -> None:
        super().__init__()
        ends = name_outputs(outputs, named_outputs)
        self.nodes: list[Node] = upstream(ends.values())
        if not self.nodes:
            raise WiringError(
                "a graph needs at least one module", where="Graph", fix="pass the symbols modules returned"
            )
        self.solution: Solution = check(self.nodes)
        self.inputs: dict[str, Symbol] = name_inputs(self.nodes)
        self.ends: dict[str, Symbol] = ends
        self.numbers: dict[Node, int] = {node: number for number, node in enumerate(self.nodes)}
        named = name_modules(self.nodes, names or {}, self.inputs)
        self._add_modules(named)
        self.end_slots: dict[str, str] = {name: self._slot(symbol) for name, symbol in ends.items()}
        steps = (self._step(named[id(node.module)], node) for node in self.nodes)
        self.steps: list[Step] = release(steps, self.end_slots.values())
        self.signature = self._signature()

    def _add_modules(self, names: Mapping[int, str]) -> None:
        for node in self.nodes:
            assert isinstance(node.module, NeuralModule)
            name = names[id(node.module)]
            if name in self._modules:
                continue
            if not name or "." in name or name in self.inputs or hasattr(self, name) or name == "steps":
                raise WiringError(
                    "a module cannot have this name",
                    where=f"Graph.{name}",
                    found=repr(name),
                    expected="a name without dots that no input and no attribute of the graph has",
                    fix=f"call it {name}_",
                )
            self.add_module(name, node.module)
            node.module.label = name

    @property
    def module_names(self) -> dict[int, str]:
        """Names of the modules by ``id``; made anew, because a copied graph has other modules."""
        return {id(module): name for name, module in self._modules.items()}

    def _step(self, name: str, node: Node) -> Step:
        module = node.module
        assert isinstance(module, NeuralModule)
        declared = module.declared()
        return Step(
            name=name,
            arguments={port: self._slots(wire) for port, wire in node.wires.items()},
            constants=dict(node.options),
            options=tuple(o for o in declared.options if o not in node.options),
            results={port: f"{self.numbers[node]}.{port}" for port in module.output_ports},
            single=declared.record is None and len(module.output_ports) == 1,
        )

    def _slots(self, wire: Wire) -> Any:
        if isinstance(wire, Symbol):
            return self._slot(wire)
        if isinstance(wire, dict):
            return {key: self._slots(item) for key, item in wire.items()}
        return [self._slots(item) for item in wire]

    def _slot(self, symbol: Symbol) -> str:
        if symbol.node is None:
            name = next((name for name, known in self.inputs.items() if known is symbol), None)
            if name is None:
                raise WiringError("an output is an input that no module uses", where=symbol.name, fix="leave it out")
            return name
        return f"{self.numbers[symbol.node]}.{symbol.port.name}"

    def _signature(self) -> Signature:
        letters = Letters(self.solution)
        optional = {name: s.port.optional for name, s in self.inputs.items()}
        inputs = {k: Port(k, letters.of(s), optional[k]) for k, s in self.inputs.items()}
        outputs = {k: Port(k, letters.of(s), s.port.optional) for k, s in self.ends.items()}
        options = tuple(dict.fromkeys(option for step in self.steps for option in step.options))
        clash = set(options) & set(inputs)
        if clash:
            raise WiringError(
                "an input has the name of an option", where=f"input {min(clash)}", fix="name the input otherwise"
            )
        return Signature(inputs, options, (*inputs, *options), outputs, self._record())

    def _record(self) -> type | None:
        """The NamedTuple of the last module, where the outputs are exactly its fields."""
        nodes = {s.node for s in self.ends.values()}
        node = nodes.pop() if len(nodes) == 1 else None
        if node is None or not isinstance(node.module, NeuralModule):
            return None
        ports = [s.port.name for s in self.ends.values()]
        same = ports == list(node.module.output_ports) == list(self.ends)
        return node.module.declared().record if same else None

    @property
    def input_ports(self) -> Mapping[str, Port]:
        """Inputs of the whole graph."""
        return self.declared().inputs

    @property
    def output_ports(self) -> Mapping[str, Port]:
        """Outputs of the whole graph."""
        return self.declared().outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run all modules in order.

        Returns:
            The tensor of the only output, the NamedTuple of the last module, or a dictionary by name.
        """
        values = self._bind(self.declared(), args, kwargs)
        for step in self.steps:
            step.run(self.get_submodule(step.name), values)
        return self.returned({name: values[slot] for name, slot in self.end_slots.items()})

    def _bind(self, declared: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(declared.order):
            raise WiringError(
                "too many arguments", where=self.label, expected=", ".join(declared.order), found=len(args)
            )
        values: dict[str, Any] = dict(zip(declared.order, args))
        for name, value in kwargs.items():
            if name in values:
                raise WiringError(f"input {name!r} is given twice", where=f"{self.label}.{name}", fix="pass it once")
            if name not in declared.order:
                raise WiringError(
                    f"there is no input {name!r}",
                    where=self.label,
                    expected=", ".join(declared.order),
                    found=name,
                    fix=did_you_mean(name, declared.order),
                )
            values[name] = value
        for name, port in declared.inputs.items():
            if values.get(name) is None:
                if not port.optional:
                    raise WiringError(
                        f"input {name!r} is missing",
                        where=f"{self.label}.{name}",
                        expected=port.type,
                        found="nothing",
                        fix=f"pass {name}=...",
                    )
                values[name] = None
        return values

    # ---------------------------------------------------------------------------------- looking at it

    def type_of(self, symbol: Symbol) -> PortType:
        """The type of a tensor inside the graph, with all sizes the check found."""
        return self.solution.type_of(symbol)

    def picture(self) -> Picture:
        """The boxes and arrows of this graph, from which every drawing is made."""
        boxes = [Box(f"in:{name}", name, "input", "") for name in self.inputs]
        boxes += [
            Box(self._box(node), self._title(node), type(node.module).__name__, _parameters(node))
            for node in self.nodes
        ]
        boxes += [Box(f"out:{name}", name, "output", "") for name in self.ends]
        arrows = [
            Arrow(self._source(symbol), self._box(node), port, str(self.type_of(symbol)))
            for node in self.nodes
            for port, wire in node.wires.items()
            for symbol in symbols_of([wire])
        ]
        arrows += [Arrow(self._source(s), f"out:{name}", name, str(self.type_of(s))) for name, s in self.ends.items()]
        return Picture(self.label, tuple(boxes), tuple(arrows), sum(p.numel() for p in self.parameters()))

    def _box(self, node: Node) -> str:
        return f"{self.numbers[node]}"

    def _title(self, node: Node) -> str:
        return self.steps[self.numbers[node]].name

    def _source(self, symbol: Symbol) -> str:
        return f"in:{self._slot(symbol)}" if symbol.node is None else self._box(symbol.node)

    def summary(self) -> str:
        """A table of modules, their wires and their parameters."""
        return text_table(self.picture())

    def draw(self, path: str | None = None) -> str:
        """Draw the graph: an SVG file where ``path`` ends in .svg, else Mermaid text (also returned).

        Raises:
            ConfigError: for a file of pixels.
        """
        if path is not None and Path(path).suffix in (".png", ".jpg", ".jpeg", ".gif", ".pdf", ".webp"):
            raise ConfigError("pictures are drawn as SVG or as Mermaid text", where=path, expected=".svg, .mmd or .md")
        picture = self.picture()
        text = svg(picture) if path is not None and path.endswith(".svg") else mermaid(picture)
        if path is not None:
            write(path, text)
        return text

    def config(self, refs: Mapping[int, str] | None = None) -> dict[str, Any]:
        """This graph as plain data; :func:`compose` rebuilds it."""
        outer = {key: name for key, name in (refs or {}).items() if name not in self._modules}
        inner = outer | self.module_names
        modules: dict[str, Any] = {}
        for node in self.nodes:
            name = self._title(node)
            if name not in modules:
                assert isinstance(node.module, NeuralModule)
                modules[name] = node.module.config(inner)
        if len(modules) < len(self.nodes):
            raise WiringError(
                "a module that is called twice cannot be written to a config",
                where=self.label,
                fix="put the two calls into one typed module of your own",
            )
        return {
            "_target_": f"{__name__}.compose",
            "modules": modules,
            "wires": self._wires(),
            "outputs": {name: self._address(symbol) for name, symbol in self.ends.items()},
            "options": {self._title(n): dict(n.options) for n in self.nodes if n.options},
        }

    def _wires(self) -> dict[str, Any]:
        names = {*self.inputs, *(port for node in self.nodes for port in node.module.output_ports)}
        wires: dict[str, Any] = {}
        for node in self.nodes:
            for port in node.module.input_ports:
                if port in node.wires:
                    wires[f"{self._title(node)}.{port}"] = self._address(node.wires[port])
                elif port in names:  # left open here, so the rebuilt graph must not match it by name
                    wires[f"{self._title(node)}.{port}"] = None
        return wires

    def _address(self, wire: Wire) -> Any:
        if isinstance(wire, dict):
            return {key: self._address(item) for key, item in wire.items()}
        if isinstance(wire, list):
            return [self._address(item) for item in wire]
        return self._slot(wire) if wire.node is None else f"{self._title(wire.node)}.{wire.port.name}"


def _parameters(node: Node) -> str:
    assert isinstance(node.module, NeuralModule)
    count = sum(p.numel() for p in node.module.parameters())
    return f"{count:,}" if count else ""


# --------------------------------------------------------------------------------------------------
# The YAML form
# --------------------------------------------------------------------------------------------------


def compose(
    modules: dict[str, NeuralModule],
    wires: dict[str, Any] | None = None,
    outputs: dict[str, str] | list[str] | None = None,
    options: dict[str, dict[str, Any]] | None = None,
) -> Graph:
    """Build a Graph from modules in order; ports are matched by name and type.

    A required port takes the only output not yet used whose type fits, else the one that also has its
    name; where no output fits, the port becomes an input of the graph under its own name. An optional port takes
    only what has its name too: an output, else an input that is there already; otherwise it stays open.

    Args:
        modules: typed modules by name.
        wires: only where matching does not say it: ``{"head.hidden": "decoder.output"}``, or ``{"head": "decoder"}``
            where each has one port; null leaves a port open, and any other word is an input of the graph.
        outputs: addresses of the outputs, by name; by default every output that nothing uses.
        options: constant options of modules, by module.

    Raises:
        WiringError: for an ambiguous match, an unknown address, a cycle, or wires that do not fit.

    Example:
        >>> import nemolet as nl
        >>> graph = compose({"embed": nl.nn.Embedding("V", "D", 10, 4), "proj": nl.nn.Linear("D", "D", 4, 4)})
        >>> list(graph.input_ports)
        ['tokens']
    """
    options = options or {}
    for name, module in modules.items():
        module.label = name
    wires = full_wires(modules, wires or {})
    check_addresses(modules, wires, options)
    available: dict[str, Symbol] = {}  # address -> output
    unused: dict[str, Symbol] = {}
    inputs: dict[str, Symbol] = {}
    typed = wired_inputs(modules, wires)

    def find(address: Any, port: Port) -> Any:
        if isinstance(address, list):
            return [find(item, replace(port, type=item_type(port.type))) for item in address]
        if isinstance(address, dict):
            return {key: find(item, replace(port, type=item_type(port.type))) for key, item in address.items()}
        if address in available:
            unused.pop(address, None)
            return available[address]
        return inputs.setdefault(address, Symbol(typed.get(address, replace(port, name=address))))

    for name in running_order(modules, wires):
        module, call = modules[name], dict(options.get(name, {}))
        for port in module.input_ports.values():
            target = f"{name}.{port.name}"
            address = wires[target] if target in wires else _match(target, port, unused, inputs)
            if address is not None:
                call[port.name] = find(address, port)
        if not any(True for _ in symbols_of(call)):
            raise WiringError("the module has no inputs", where=name, fix="remove it, or give it a typed input port")
        for symbol in module.by_name(module(**call)).values():
            available[f"{name}.{symbol.port.name}"] = unused[f"{name}.{symbol.port.name}"] = symbol
    return Graph(names=modules, **_pick_outputs(modules, outputs, available, unused))


compose.__buildable__ = True  # type: ignore[attr-defined]  # what Graph.config() writes down


def _match(target: str, port: Port, unused: Mapping[str, Symbol], inputs: Mapping[str, Symbol]) -> str | None:
    """The address that fits a port without a wire; None leaves an optional port open."""
    fitting = [address for address, symbol in unused.items() if compare(port.type, symbol.port.type).flows]
    same_name = [address for address in fitting if unused[address].port.name == port.name]
    candidates = same_name or ([] if port.optional else fitting)
    if len(candidates) > 1:
        raise WiringError(
            "several outputs fit this port",
            where=target,
            expected=f"one output of type {port.type}",
            found=", ".join(candidates),
            fix=f"say which: wires: {{{target}: {candidates[0]}}}" + (", or null for none" if port.optional else ""),
        )
    if candidates:
        return candidates[0]
    return None if port.optional and port.name not in inputs else port.name


def _pick_outputs(
    modules: Mapping[str, NeuralModule],
    outputs: dict[str, str] | list[str] | None,
    available: Mapping[str, Symbol],
    unused: Mapping[str, Symbol],
) -> dict[str, Symbol]:
    if outputs is None:
        chosen = {a: a for a in unused}
    else:
        chosen = dict(outputs) if isinstance(outputs, dict) else {a: a for a in outputs}
    ends: dict[str, Symbol] = {}
    for name, given in chosen.items():
        address = full_address(modules, given, f"outputs.{name}")
        if address not in available:
            raise WiringError(
                "there is no such output",
                where=f"outputs.{name}",
                expected=", ".join(available),
                found=address,
                fix=did_you_mean(address, available),
            )
        short = available[address].port.name
        key = name if name != given else short if short not in ends else address.replace(".", "_")
        ends[key] = available[address]
    return ends
