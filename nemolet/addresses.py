"""Addresses of the YAML form of a graph: which ports the wires name, and the order they imply.

``decoder.output`` is an output of a module, ``decoder.hidden`` a port, ``decoder`` the only one of either. Any other
word is an input of the graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from nemolet.comparison import compare
from nemolet.errors import WiringError, did_you_mean
from nemolet.module import NeuralModule
from nemolet.ports import Port
from nemolet.types import DictOf, ListOf, PortType


def full_wires(modules: Mapping[str, NeuralModule], wires: Mapping[str, Any]) -> dict[str, Any]:
    """The wires, with a port for every module that is named without one.

    Raises:
        WiringError: for a module with several ports, listing them, and for two wires into one.
    """

    def full(source: Any, where: str) -> Any:
        if isinstance(source, dict):
            return {key: full(item, where) for key, item in source.items()}
        if isinstance(source, list):
            return [full(item, where) for item in source]
        return source if source is None else full_address(modules, source, where)

    found: dict[str, Any] = {}
    for end, source in wires.items():
        target = end
        if end in modules:
            ports = modules[end].input_ports
            target = _only(end, [p for p in ports.values() if not p.optional] or [*ports.values()], f"wires.{end}")
        if target in found:
            raise WiringError(
                "two wires enter one port",
                where=target,
                found=f"{found[target]} and {source}",
                fix="remove one of them",
            )
        found[target] = full(source, f"wires.{end}")
    return found


def full_address(modules: Mapping[str, NeuralModule], address: str, where: str) -> str:
    """An address, with its only output for a module.

    Raises:
        WiringError: for a module with several outputs, listing them.
    """
    return _only(address, modules[address].output_ports.values(), where) if address in modules else address


def _only(module: str, ports: Collection[Port], where: str) -> str:
    if len(ports) != 1:
        raise WiringError(
            f"{module} has several ports",
            where=where,
            expected=", ".join(f"{module}.{port}" for port in ports),
            found=module,
            fix="write the port too",
        )
    return f"{module}.{next(iter(ports)).name}"


def check_addresses(modules: Mapping[str, NeuralModule], wires: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse a wire that starts or ends at no port, and options of no module, with the nearest that exists.

    Raises:
        WiringError: naming the address.
    """
    targets = dict.fromkeys(f"{name}.{port}" for name, module in modules.items() for port in module.input_ports)
    sources = dict.fromkeys(f"{name}.{port}" for name, module in modules.items() for port in module.output_ports)
    for name in options:
        if name not in modules:
            raise WiringError(
                "these are options of no module",
                where=f"options.{name}",
                expected=", ".join(modules),
                found=name,
                fix=did_you_mean(name, modules),
            )
    for target, source in wires.items():
        if target not in targets:
            raise WiringError(
                "this wire ends at no port",
                where=f"wires.{target}",
                expected=", ".join(targets),
                found=f"{target} from {source}",
                fix=did_you_mean(target, targets),
            )
        for address in flat(source):
            if "." in address and address not in sources:
                raise WiringError(
                    "this wire starts at no port",
                    where=f"wires.{target}",
                    expected=", ".join(sources),
                    found=f"{target} from {address}",
                    fix=did_you_mean(address, sources),
                )


def wired_inputs(modules: Mapping[str, NeuralModule], wires: Mapping[str, Any]) -> dict[str, Port]:
    """The inputs that wires name: of the narrowest type they flow into, and optional if it all can do without."""
    found: dict[str, Port] = {}

    def meet(address: Any, port: Port) -> None:
        if isinstance(address, (list, dict)):
            for item in address.values() if isinstance(address, dict) else address:
                meet(item, replace(port, type=item_type(port.type)))
        elif address is not None and "." not in address:
            known = found.get(address, port)
            narrowest = port.type if compare(known.type, port.type).flows else known.type
            found[address] = Port(address, narrowest, port.optional and known.optional)

    for target, source in wires.items():
        name, _, port = target.partition(".")
        meet(source, modules[name].input_ports[port])
    return found


def running_order(modules: Mapping[str, NeuralModule], wires: Mapping[str, Any]) -> list[str]:
    """The given order, changed only where a wire needs a module earlier.

    Raises:
        WiringError: naming the modules and wires of a cycle.
    """
    needs: dict[str, dict[str, str]] = {name: {} for name in modules}
    for target, source in wires.items():
        for address in flat(source):
            if "." in address:
                needs[target.split(".")[0]][address.split(".")[0]] = f"{address} -> {target}"
    follow: dict[str, list[str]] = {name: [] for name in modules}
    for name, sources in needs.items():
        for source in sources:
            follow[source].append(name)
    places = {name: place for place, name in enumerate(modules)}
    open_needs = {name: len(sources) for name, sources in needs.items()}
    ready = [(places[name], name) for name, count in open_needs.items() if not count]  # in order, and so a heap
    order: list[str] = []
    while ready:
        order.append(heapq.heappop(ready)[1])
        for name in follow[order[-1]]:
            open_needs[name] -= 1
            if not open_needs[name]:
                heapq.heappush(ready, (places[name], name))
    stuck = [name for name, count in open_needs.items() if count]
    if stuck:
        loop = [wire for name in stuck for need, wire in needs[name].items() if need in stuck]
        raise WiringError(
            "the wires form a cycle",
            where=", ".join(stuck),
            expected="wires that lead forward",
            found="; ".join(loop),
            fix="remove one of these wires, or put the loop inside one module",
        )
    return order


def flat(source: Any) -> list[str]:
    """All addresses in the source of a wire, which may be a list, a dictionary, or null."""
    if isinstance(source, dict):
        source = list(source.values())
    if source is None:
        return []
    return [a for item in source for a in flat(item)] if isinstance(source, list) else [str(source)]


def item_type(declared: PortType) -> PortType:
    """The type of what a container holds."""
    return declared.item if isinstance(declared, (ListOf, DictOf)) else declared
