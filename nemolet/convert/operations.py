"""What happens to tensors between two layouts; each operation knows its way back.

An operation takes the tensors of a Hugging Face checkpoint (*theirs*) and gives those of a nemolet model (*ours*).
Sizes come from the declared axes of our parameters, so a table never repeats them. All operations only move numbers:
there and back is bit-exact, and on tensors without data they tell the shapes of the other side.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from nemolet.types import Dim

Tensors = list[Tensor]


@dataclass(frozen=True)
class Layout:
    """What is known of our side.

    Args:
        dims: the declared axes of our first parameter.
        vocab: tokens of the vocabulary, without padding.
        blank: which of their tokens is the blank of CTC; ours is the last.
    """

    dims: tuple[Dim, ...]
    vocab: int = 0
    blank: int = 0

    def factors(self) -> list[int]:
        """The sizes of the factors of the first dimension, as ``(G R K)``."""
        return [factor if isinstance(factor, int) else int(factor.size or 0) for factor in self.dims[0]]


class Operation(abc.ABC):
    """A way from their tensors to ours, and back (abstract)."""

    @abc.abstractmethod
    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        """Ours, made of theirs."""

    @abc.abstractmethod
    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        """Theirs, made of ours."""


@dataclass(frozen=True)
class LeftOut(Operation):
    """A tensor of ours that they have no place for, and that changes no output; a rule for it names none of theirs."""

    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        raise AssertionError("nothing is read from nothing")

    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        return []


@dataclass(frozen=True)
class Same(Operation):
    """Only the name differs."""

    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        return theirs

    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        return ours


@dataclass(frozen=True)
class Transpose(Operation):
    """Rows become columns, as in the linear layers of GPT-2; vectors stay."""

    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        return [tensor.T if tensor.ndim == 2 else tensor for tensor in theirs]

    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        return self.take(ours, layout)


@dataclass(frozen=True)
class Flatten(Operation):
    """A leading dimension of one is dropped."""

    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        return [tensor.squeeze(0) for tensor in theirs]

    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        return [tensor.unsqueeze(0) for tensor in ours]


@dataclass(frozen=True)
class Rows(Operation):
    """A table with one row per token: ours may be padded with zeros, theirs is not."""

    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        (table,), rows = theirs, layout.factors()[0]
        if rows <= table.shape[0]:
            return [table]
        return [torch.cat((table, table.new_zeros(rows - table.shape[0], *table.shape[1:])))]

    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        return [ours[0][: layout.vocab] if layout.vocab else ours[0]]


@dataclass(frozen=True)
class BlankLast(Operation):
    """Rows of a table of labels: the blank, wherever theirs is, becomes the last."""

    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        before, blank, after = theirs[0].tensor_split((layout.blank, layout.blank + 1))
        return [torch.cat((before, after, blank))]

    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        before, after, blank = ours[0].tensor_split((layout.blank, -1))
        return [torch.cat((before, blank, after))]


@dataclass(frozen=True)
class Heads(Operation):
    """Queries, keys and values become one weight, grouped by key/value head: ``(G R K)``.

    Args:
        keyless: theirs has no keys, ours are zeros: the bias of a key adds the same to all scores of a query, so it
            changes nothing (Whisper).
        paired: there are keys and values only, as in cross attention: ``(G 2 K)``.
    """

    keyless: bool = False
    paired: bool = False

    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        groups, rows, size = layout.factors()
        tail = theirs[-1].shape[1:]
        parts = list(theirs)
        if self.keyless:
            parts.insert(len(parts) - 1, parts[-1].new_zeros(groups * size, *tail))
        per_group = [1, 1] if self.paired else [rows - 2, 1, 1]
        grouped = [part.reshape(groups, count, size, *tail) for part, count in zip(parts, per_group, strict=True)]
        return [torch.cat(grouped, dim=1).flatten(0, 2)]

    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        groups, rows, size = layout.factors()
        grouped = ours[0].unflatten(0, (groups, rows, size))
        parts = [part.flatten(0, 2) for part in grouped.split([1, 1] if self.paired else [rows - 2, 1, 1], dim=1)]
        if self.keyless:
            parts.pop(-2)
        return parts


@dataclass(frozen=True)
class Stacked(Operation):
    """All queries, then all keys, then all values in one weight (GPT-2, Phi-3, ModernBERT) become grouped heads."""

    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        groups, rows, size = layout.factors()
        return Heads().take(list(theirs[0].split([groups * n * size for n in (rows - 2, 1, 1)])), layout)

    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        return [torch.cat(Heads().give(ours, layout))]


@dataclass(frozen=True)
class Halves(Operation):
    """One weight is ours twice, one after the other (the fused gate and up of Phi-3)."""

    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        return list(theirs[0].chunk(2))

    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        return [torch.cat(ours)]


@dataclass(frozen=True)
class Stack(Operation):
    """Many tensors of one shape become one with a new first dimension (experts)."""

    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        return [torch.stack(theirs)]

    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        return list(ours[0].unbind(0))


@dataclass(frozen=True)
class Repeated(Operation):
    """Theirs is stored several times, ours once; which are equal is seen before (:mod:`nemolet.convert.copies`).

    Args:
        times: how often beside the first.
    """

    times: int

    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        return theirs[: -self.times]

    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        return [*ours, *(tensor.clone() for tensor in ours for _ in range(self.times))]


@dataclass(frozen=True)
class Interleaved(Operation):
    """Rotary pairs that lie side by side become halves of a head, as ours are (the layout of GPT-J).

    Without it logits are almost right, which is worse than wrong.
    """

    size: int

    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        return [t.unflatten(0, (-1, self.size // 2, 2)).transpose(1, 2).flatten(0, 2) for t in theirs]

    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        return [t.unflatten(0, (-1, 2, self.size // 2)).transpose(1, 2).flatten(0, 2) for t in ours]


@dataclass(frozen=True)
class Chain(Operation):
    """Operations one after the other; back in the opposite order."""

    steps: tuple[Operation, ...]

    def take(self, theirs: Tensors, layout: Layout) -> Tensors:
        for step in self.steps:
            theirs = step.take(theirs, layout)
        return theirs

    def give(self, ours: Tensors, layout: Layout) -> Tensors:
        for step in reversed(self.steps):
            ours = step.give(ours, layout)
        return ours


def chain(*steps: Operation) -> Chain:
    """Operations in the order from their layout to ours."""
    return Chain(steps)
