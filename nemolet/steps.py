"""A graph as a sequence of calls: what each reads and writes, and which values nothing reads any more."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Step:
    """One call when the graph runs.

    Values lie in slots: an input of the graph under its name, an output under the number of its step and its port.
    """

    name: str
    arguments: Mapping[str, Any]  # port -> slot, or a list or dict of slots
    constants: Mapping[str, object]
    options: tuple[str, ...]
    results: Mapping[str, str]  # output port -> slot
    single: bool  # whether the module returns the value of its only output, not several by name
    done: tuple[str, ...] = ()  # slots that are read for the last time here, or never

    @property
    def reads(self) -> list[str]:
        """The slots of all arguments."""
        return list(_flat(self.arguments))

    def run(self, module: nn.Module, values: dict[str, Any]) -> None:
        """Call the module with values out of their slots, and put what it returns into others."""
        call = {port: _fetch(slot, values) for port, slot in self.arguments.items()}
        call.update(self.constants)
        for option in self.options:
            if option in values:
                call[option] = values[option]
        result = module(**call)
        for port, slot in self.results.items():
            values[slot] = result if self.single else result[port] if type(result) is dict else getattr(result, port)
        for slot in self.done:
            del values[slot]


def release(steps: Iterable[Step], kept: Collection[str]) -> list[Step]:
    """The same steps, each of which drops the values that no later one reads.

    Args:
        steps: in running order.
        kept: slots that are read after the last step. Inputs are the caller's, and are kept as well.

    Example:
        >>> first = Step("a", {"x": "x"}, {}, (), {"y": "0.y"}, single=True)
        >>> last = Step("b", {"y": "0.y"}, {}, (), {"z": "1.z"}, single=True)
        >>> [step.done for step in release([first, last], ["1.z"])]
        [(), ('0.y',)]
    """
    needed, result = set(kept), []
    for step in reversed(list(steps)):
        own = [slot for slot in dict.fromkeys([*step.reads, *step.results.values()]) if "." in slot]
        result.append(replace(step, done=tuple(slot for slot in own if slot not in needed)))
        needed.update(own)
    return result[::-1]


def _flat(slots: Any) -> Iterable[str]:
    if isinstance(slots, str):
        yield slots
    else:
        for item in slots.values() if isinstance(slots, Mapping) else slots:
            yield from _flat(item)


def _fetch(slot: Any, values: Mapping[str, Any]) -> Any:
    if type(slot) is str:
        return values[slot]
    if type(slot) is dict:
        return {key: _fetch(item, values) for key, item in slot.items()}
    return [_fetch(item, values) for item in slot]
