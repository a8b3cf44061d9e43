"""Ports: the named inputs and outputs of a module, read from the annotations of its ``forward``."""

from __future__ import annotations

import inspect
import types as python_types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from nemolet.errors import DeclarationError
from nemolet.types import DictOf, ListOf, NeuralType, PortType


@dataclass(frozen=True)
class Port:
    """One named input or output of a module."""

    name: str
    type: PortType
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.type}" + (" | None" if self.optional else "")


@dataclass(frozen=True)
class Signature:
    """What the annotations of a ``forward`` declare."""

    inputs: Mapping[str, Port]
    options: tuple[str, ...]  # arguments that are no tensors: caches, flags
    order: tuple[str, ...]  # all arguments as positions
    outputs: Mapping[str, Port]
    record: type | None  # the NamedTuple that holds several outputs


def read_signature(forward: Any, name: str) -> Signature:
    """Read the ports from the annotations of a ``forward`` method.

    Raises:
        DeclarationError: for a tensor argument without a type, naming it.
    """
    try:
        hints = get_type_hints(forward, include_extras=True)
    except NameError as error:
        raise DeclarationError(
            "an annotation names something unknown",
            where=f"{name}.forward",
            found=str(error),
            fix="import the name at the top of the module, outside `if TYPE_CHECKING`",
        ) from error
    inputs, options, order = {}, [], []
    for argument in list(inspect.signature(forward).parameters.values())[1:]:
        where = f"{name}.forward({argument.name})"
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            raise DeclarationError("ports cannot hide in *args or **kwargs", where=where, fix="name each argument")
        if argument.name not in hints:
            raise DeclarationError(
                "an argument has no annotation",
                where=where,
                expected="a type such as HiddenBTD",
                found="nothing",
                fix=f"write {argument.name}: HiddenBTD (or its plain Python type)",
            )
        declared, optional = port_type(hints[argument.name], where)
        order.append(argument.name)
        if declared is None:
            options.append(argument.name)
        else:
            inputs[argument.name] = Port(argument.name, declared, optional or argument.default is None)
    outputs, record = _read_outputs(hints.get("return"), name)
    return Signature(inputs, tuple(options), tuple(order), outputs, record)


def _read_outputs(hint: Any, name: str) -> tuple[dict[str, Port], type | None]:
    where = f"{name}.forward() -> ..."
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        outputs = {}
        for key, value in get_type_hints(hint, include_extras=True).items():
            declared, optional = port_type(value, f"{hint.__name__}.{key}")
            if declared is None:
                raise DeclarationError("an output has no type", where=f"{hint.__name__}.{key}", found=value)
            outputs[key] = Port(key, declared, optional)
        return outputs, hint
    declared, optional = port_type(hint, where) if hint is not None else (None, False)
    if declared is None:
        raise DeclarationError(
            "the output has no type",
            where=where,
            found=hint,
            expected="a type such as HiddenBTD, or a NamedTuple of them",
        )
    return {"output": Port("output", declared, optional)}, None


def port_type(hint: Any, where: str) -> tuple[PortType | None, bool]:
    """The declared type inside an annotation (None for a plain Python type), and whether it is optional.

    Raises:
        DeclarationError: for a tensor without a type, and for containers that no port can have.

    Example:
        >>> from nemolet.types import HiddenBTD
        >>> str(port_type(list[HiddenBTD], "here")[0]), port_type(HiddenBTD | None, "here")[1], port_type(int, "here")
        ('list[B T D Hidden]', True, (None, False))
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = [arg for arg in args[1:] if isinstance(arg, NeuralType)]
        return (found[0], False) if found else port_type(args[0], where)
    if origin in (Union, python_types.UnionType):
        members = [port_type(arg, where)[0] for arg in args if arg is not type(None)]
        declared = next((member for member in members if member is not None), None)
        if any(member is not None and member != declared for member in members):
            raise DeclarationError(
                "a port has one type", where=where, found=hint, fix="give each an argument of its own"
            )
        return declared, type(None) in args
    if isinstance(origin, type) and issubclass(origin, Collection):
        items = [port_type(arg, where)[0] for arg in args if arg is not Ellipsis]
        item = next((each for each in items if each is not None), None)
        if item is None:
            return None, False
        if origin is list or (origin is tuple and Ellipsis in args):
            return ListOf(item), False
        if origin is tuple and set(items) == {item}:
            return ListOf(item, len(args)), False
        if origin is dict and items[0] is None:
            return DictOf(item), False
        raise DeclarationError(
            "this container of tensors has no port type",
            where=where,
            found=hint,
            expected="list[X], dict[str, X], or a tuple of one type X",
            fix="give each tensor an argument of its own, or return a NamedTuple",
        )
    if isinstance(hint, type) and issubclass(hint, Tensor):
        raise DeclarationError(
            "a tensor has no type",
            where=where,
            expected="a type such as HiddenBTD",
            found=hint.__name__,
            fix="annotate it with an alias of nemolet.types, or with Annotated[Tensor, NeuralType(...)]",
        )
    return None, False
