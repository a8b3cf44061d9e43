"""Two configs that say the same: keys of ``config.json`` beside arguments of our models.

A config is a list of parts. Each part reads some keys of theirs into arguments of ours, and writes them back.
Arguments and keys are dotted where they are nested: ``attention.head_size``. What a missing key means is said once for
an architecture, not here.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemolet.convert.settled import settled
from nemolet.errors import ConversionError

Config = dict[str, Any]
ABSENT = object()  # no value: the key is not written, the argument keeps its default

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}


def get(config: Mapping[str, Any], path: str, default: Any = ABSENT) -> Any:
    """A value by its dotted path."""
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def put(config: Config, path: str, value: Any) -> None:
    """Set a value by its dotted path; an absent one is not set."""
    if value is ABSENT:
        return
    *parents, last = path.split(".")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = value


class Part(abc.ABC):
    """Some keys of theirs and some arguments of ours (abstract)."""

    @abc.abstractmethod
    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        """Set our arguments."""

    @abc.abstractmethod
    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        """Set their keys."""


def _keep(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Field(Part):
    """One key and one argument.

    Args:
        theirs: the key; several for the same value, of which the first that has one counts.
        ours: the argument.
        to_ours: what becomes of a value on the way in.
        to_theirs: and on the way out.
    """

    theirs: str | tuple[str, ...]
    ours: str
    to_ours: Callable[[Any], Any] = _keep
    to_theirs: Callable[[Any], Any] = _keep

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        keys = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        found = [value for value in (get(theirs, key) for key in keys) if value is not ABSENT]
        if not found:
            raise ConversionError(
                "a key is missing", where="config.json", expected=" or ".join(keys), found=", ".join(theirs)[:300]
            )
        value = next((value for value in found if value is not None), None)
        try:
            put(ours, self.ours, self.to_ours(value))
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ConversionError(
                "this value has no counterpart", where=f"config.json: {keys[0]}", found=f"{value!r} ({error})"
            ) from error

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        value = get(ours, self.ours)
        for key in (self.theirs,) if isinstance(self.theirs, str) else self.theirs:
            try:
                put(theirs, key, ABSENT if value is ABSENT else self.to_theirs(value))
            except KeyError as error:
                raise ConversionError("this value has no counterpart", where=self.ours, found=repr(value)) from error


def activation(theirs: str, ours: str) -> Field:
    """The name of an activation."""
    back = {name: key for key, name in reversed(ACTIVATIONS.items())}
    return Field(theirs, ours, ACTIVATIONS.__getitem__, back.__getitem__)


@dataclass(frozen=True)
class Fixed(Part):
    """Arguments that are the same for every model of an architecture."""

    values: Mapping[str, Any]

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        for path, value in self.values.items():
            put(ours, path, value)

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        """Nothing to write: that ours has these values is seen when the result is read back."""


@dataclass(frozen=True)
class Only(Part):
    """Keys of which only one value can be read; they change what a model computes.

    Args:
        values: key to value; a missing key means this one, and null and the like mean false.
    """

    values: Mapping[str, Any]

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        for key, value in self.values.items():
            found = get(theirs, key, value)
            if found != value and (found or value):
                raise ConversionError(
                    "this variant is not supported", where=f"config.json: {key}", expected=value, found=found
                )

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        for key, value in self.values.items():
            put(theirs, key, value)


@dataclass(frozen=True)
class Inside(Part):
    """The config of a part of ours, out of the same keys.

    Args:
        ours: the argument that the part is.
        target: its class.
        parts: its config.
    """

    ours: str
    target: str
    parts: tuple[Part, ...]

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        put(ours, self.ours, read_config(self.parts, theirs, self.target))

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        for part in self.parts:
            part.write(get(ours, self.ours), theirs)


def read_config(parts: Sequence[Part], theirs: Mapping[str, Any], target: str) -> Config:
    """Our config of their model.

    Raises:
        ConversionError: where some value is none that a config has.
    """
    ours: Config = {"_target_": target}
    for part in parts:
        try:
            part.read(theirs, ours)
        except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise ConversionError(
                "the config cannot be understood",
                where="config.json",
                found=f"{type(error).__name__}: {error}, in what is read as {type(part).__name__}",
                fix="take config.json as save_pretrained wrote it",
            ) from error
    return ours


def write_config(parts: Sequence[Part], ours: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> Config:
    """Their config of our model; what is ``known`` of theirs beside it stays."""
    complete, theirs = settled(ours, ignore=()), copy.deepcopy(dict(known or {}))
    for part in parts:
        part.write(complete, theirs)
    return theirs
