"""Where two configs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A place in two configs, and what stands there in each; None where nothing does."""

    path: str
    one: Any
    other: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.one} and {self.other}"


def differences(one: Any, other: Any, path: str = "") -> Iterator[Difference]:
    """Where two configs differ, value by value.

    Example:
        >>> [str(each) for each in differences({"a": {"b": 1}}, {"a": {"b": 2}})]
        ['a.b: 1 and 2']
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            yield from differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield Difference(path, one, other)
