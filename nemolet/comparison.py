"""Comparison of types: whether a tensor of one type may enter a port of another."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from enum import Enum
from typing import Protocol, TypeVar

from nemolet.types import REST, Axis, DictOf, Element, ListOf, NeuralType, PortType, Void


class Outcome(Enum):
    """Result of comparing an expected type with one that was found.

    Only SAME and GREATER (the expected element is a parent of the found one) may flow.
    """

    SAME = "same"
    GREATER = "the expected element is a parent of the found one"
    LESS = "the found element is more general than the expected one"
    DIM_INCOMPATIBLE = "an axis has another size"
    TRANSPOSE_SAME = "the same axes in another order"
    CONTAINER_SIZE_MISMATCH = "containers of another kind, depth or length"
    SAME_TYPE_INCOMPATIBLE_PARAMS = "the same element with another parameter"
    INCOMPATIBLE = "another element or other axes"
    UNCHECKED = "nothing is declared"

    @property
    def flows(self) -> bool:
        """Whether a wire with this outcome is allowed."""
        return self in (Outcome.SAME, Outcome.GREATER)


def compare(expected: PortType, found: PortType | None) -> Outcome:
    """Say whether a tensor of type ``found`` may enter a port of type ``expected``.

    Unlike in NeMo, an axis that matches anything never hides a mismatch found at another axis.

    Example:
        >>> from nemolet.types import Hidden
        >>> compare(NeuralType("B T D=512", Hidden()), NeuralType("B T D=256", Hidden())).name
        'DIM_INCOMPATIBLE'
    """
    if found is None:
        return Outcome.UNCHECKED
    if isinstance(expected, NeuralType) and isinstance(found, NeuralType):
        if isinstance(expected.element, Void) and not expected.axes:
            return Outcome.SAME
        axes = compare_axes(expected.axes, found.axes)
        element = compare_elements(expected.element, found.element)
        if element in (Outcome.INCOMPATIBLE, Outcome.LESS):
            return element
        return axes if axes is not Outcome.SAME else element
    if isinstance(expected, DictOf) and isinstance(found, DictOf):
        return compare(expected.item, found.item)
    if isinstance(expected, ListOf) and isinstance(found, ListOf) and _agree(expected.size, found.size):
        return compare(expected.item, found.item)
    return Outcome.CONTAINER_SIZE_MISMATCH


def compare_axes(expected: tuple[Axis, ...], found: tuple[Axis, ...]) -> Outcome:
    """Compare axes by position: rank, then letters, then sizes."""
    pairs = pair_axes(expected, found)
    if pairs is None:
        return Outcome.INCOMPATIBLE
    if not all(want.fits(have) for want, have in pairs):
        kinds = [Counter(axis.kind for axis in axes) for axes in zip(*pairs)]
        return Outcome.TRANSPOSE_SAME if kinds[0] == kinds[1] else Outcome.INCOMPATIBLE
    return Outcome.SAME if all(_agree(want.size, have.size) for want, have in pairs) else Outcome.DIM_INCOMPATIBLE


class Lettered(Protocol):
    """An axis, or a variable for one."""

    @property
    def letter(self) -> str: ...


A = TypeVar("A", bound=Lettered)


def pair_axes(expected: tuple[A, ...], found: tuple[A, ...]) -> list[tuple[A, A]] | None:
    """Pair axes by position, after '...' took what is left over; None where the ranks differ."""
    open_want = bool(expected) and expected[0].letter == REST
    open_have = bool(found) and found[0].letter == REST
    want, have = expected[open_want:], found[open_have:]
    if (len(want) > len(have) and not open_have) or (len(have) > len(want) and not open_want):
        return None
    shared = min(len(want), len(have))
    return list(zip(want[len(want) - shared :], have[len(have) - shared :]))


def compare_elements(expected: Element, found: Element) -> Outcome:
    """Compare elements by class and by the fields both know."""
    if isinstance(expected, Void):
        return Outcome.SAME
    if not isinstance(found, type(expected)):
        return Outcome.LESS if isinstance(expected, type(found)) else Outcome.INCOMPATIBLE
    for name in (f.name for f in fields(expected)):
        want, have = getattr(expected, name), getattr(found, name)
        if isinstance(want, str) and isinstance(have, str):
            agree = Axis(want).fits(Axis(have))
        else:  # a letter stands for a size that only the graph knows
            agree = isinstance(want, str) or isinstance(have, str) or _agree(want, have)
        if not agree:
            return Outcome.SAME_TYPE_INCOMPATIBLE_PARAMS
    return Outcome.SAME if type(expected) is type(found) else Outcome.GREATER


def _agree(want: object, have: object) -> bool:
    """Whether two values are equal, as far as both are known."""
    return want is None or have is None or want == have
