"""Tables between names: which of their tensors make which of ours.

A table is a list of rules for one architecture. It is written once, for the way in; names, order and shapes of the
way out are derived from it. In a name ``*`` stands for the number of a layer, and ``@`` for ``weight`` and ``bias``,
as far as our model has them; in one of theirs ``#`` stands for each number of our first axis in turn (experts).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nemolet.convert.operations import Layout, Operation, Same
from nemolet.errors import ConversionError
from nemolet.module import NeuralModule, parameter_axes

Names = str | tuple[str, ...]
SAME = Same()


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Args:
        ours: name (or names) of our parameters.
        theirs: name (or names) of their tensors.
        operation: what happens in between.
    """

    ours: Names
    theirs: Names
    operation: Operation = SAME


def rules(ours_at: str, theirs_at: str, lines: Mapping[Any, Any]) -> list[Rule]:
    """Several rules whose names begin alike.

    Args:
        ours_at: how our names begin.
        theirs_at: how theirs do.
        lines: the rest of our name (or names), and of theirs; or theirs with an operation.

    Example:
        >>> rules("a.*.", "h.*.", {"norm.@": "ln.@"})
        [Rule(ours=('a.*.norm.@',), theirs=('h.*.ln.@',), operation=Same())]
    """
    made = []
    for ours, right in lines.items():
        with_operation = isinstance(right, tuple) and isinstance(right[1], Operation)
        theirs, operation = right if with_operation else (right, SAME)
        made.append(Rule(_prefixed(ours_at, ours), _prefixed(theirs_at, theirs), operation))
    return made


def _tuple(names: object) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)  # type: ignore[arg-type]


def _prefixed(prefix: str, names: object) -> tuple[str, ...]:
    return tuple(prefix + name for name in _tuple(names))


@dataclass(frozen=True)
class Entry:
    """A rule for one layer: names without wildcards, and what is known of our side."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    operation: Operation
    layout: Layout

    def take(self, theirs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Our tensors by name."""
        return dict(zip(self.ours, self.operation.take(list(theirs), self.layout), strict=True))

    def give(self, ours: Sequence[Tensor]) -> dict[str, Tensor]:
        """Their tensors by name."""
        return dict(zip(self.theirs, self.operation.give(list(ours), self.layout), strict=True))


class Source(Protocol):
    """Tensors by name, read one at a time."""

    def get(self, name: str) -> Tensor: ...


def own_tensors(model: NeuralModule) -> dict[str, Tensor]:
    """Our tensors, a tied one once, under its first name."""
    known: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            known.add(id(tensor))
            found[name] = tensor.detach()
    return found


def expand(table: Iterable[Rule], model: NeuralModule, *, vocab: int, blank: int = 0) -> list[Entry]:
    """The entries for one model. A rule whose parameters the model lacks does not apply; of several the first counts.

    Args:
        table: the rules.
        model: ours.
        vocab: tokens of the vocabulary, without padding.
        blank: which of their tokens is the blank of CTC.

    Raises:
        ConversionError: for parameters that no rule speaks of.
    """
    names, axes = own_tensors(model), parameter_axes(model)
    entries: list[Entry] = []
    covered: set[str] = set()
    for rule in table:
        for ours, theirs in _instances(rule, names):
            if covered.isdisjoint(ours) and names.keys() >= set(ours):
                covered.update(ours)
                layout = Layout(axes[ours[0]], vocab, blank)
                entries.append(Entry(ours, _numbered(theirs, layout), rule.operation, layout))
    odd = sorted(names.keys() - covered)
    if odd:
        raise ConversionError(
            "the table does not say where these parameters come from",
            where=type(model).__name__,
            found=", ".join(odd[:8]),
            fix="add a rule to the table of the architecture",
        )
    order = {name: index for index, name in enumerate(names)}
    return sorted(entries, key=lambda entry: order[entry.ours[0]])


def _instances(rule: Rule, names: Mapping[str, Tensor]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    ours, theirs = _tuple(rule.ours), _tuple(rule.theirs)
    pattern = re.compile(re.escape(ours[0]).replace(r"\*", r"(?P<layer>\d+)").replace("@", "(?P<kind>weight|bias)"))
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        layer, kind = match.groupdict().get("layer", ""), match.groupdict().get("kind", "")
        yield (
            tuple(one.replace("*", layer).replace("@", kind) for one in ours),
            tuple(one.replace("*", layer).replace("@", kind) for one in theirs),
        )


def _numbered(theirs: tuple[str, ...], layout: Layout) -> tuple[str, ...]:
    """Names with ``#`` once for each number of our first axis."""
    if not any("#" in name for name in theirs):
        return theirs
    return tuple(name.replace("#", str(index)) for index in range(layout.factors()[0]) for name in theirs)


def expected_shapes(entries: Iterable[Entry], model: NeuralModule) -> dict[str, tuple[int, ...]]:
    """The shape of each of their tensors: the way out, run on tensors without data."""
    own = own_tensors(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        given = entry.give([torch.empty(own[name].shape, device="meta") for name in entry.ours])
        shapes |= {name: tuple(tensor.shape) for name, tensor in given.items()}
    return shapes


def ours_from(entries: Iterable[Entry], source: Source) -> Iterator[tuple[str, Tensor]]:
    """Our tensors one by one, in the order of the model; at any time only those of one entry are in memory."""
    for entry in entries:
        yield from entry.take([source.get(name) for name in entry.theirs]).items()


def theirs_from(entries: Iterable[Entry], source: Source) -> Iterator[tuple[str, Tensor]]:
    """Their tensors one by one."""
    for entry in entries:
        yield from entry.give([source.get(name) for name in entry.ours]).items()
