"""Which classes a config may name: those of nemolet, and those a user registered in this process."""

from __future__ import annotations

import importlib
import keyword
from collections.abc import Callable
from typing import Any, TypeVar

from nemolet.config.schema import Block, Either, Schema, buildable, definitions, schema_of, schema_of_object
from nemolet.errors import ConfigError, NemoletError, nearest
from nemolet.rules import check_rules

_registered: dict[str, Any] = {}  # filled by the user's own imports; a config cannot add to it

ModuleConfig = dict[str, Any]  # a block with _target_; annotate settings with it

T = TypeVar("T", bound=Callable[..., Any])


def register(thing: T) -> T:
    """Let configs and archives name a class (or function) of yours; use it as a decorator.

    Its name is ``module.Class``. The process that loads an archive has to import the module first.

    Raises:
        ConfigError: for a class with a rule that cannot be read.

    Example:
        >>> @register
        ... class Twice:
        ...     def __init__(self, *, factor: int = 2) -> None:
        ...         self.factor = factor
        >>> build({"_target_": "nemolet.config.registry.Twice", "factor": 3}).factor
        3
    """
    if isinstance(thing, type):
        check_rules(thing)
    _registered[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return thing


def schema_of_target(target: Any, where: str = "_target_") -> Schema:
    """The schema of a target that a config may build, without importing it.

    Raises:
        ConfigError: for a target outside the allowlist.
    """
    if isinstance(target, str) and target in _registered:
        return schema_of_object(_registered[target])
    module, name = _split(target, where)
    schema = schema_of(module, name)
    if schema is None:
        close = nearest(name, definitions(module))
        raise ConfigError(
            "there is no such class",
            where=where,
            expected=f"a class that {module} defines",
            found=target,
            fix=f"did you mean {module}.{close}?" if close else _REGISTER,
        )
    if not buildable(module, name):
        raise ConfigError(
            "a config may not build this",
            where=where,
            found=target,
            fix=_REGISTER,
            expected="a typed module or a registered class",
        )
    return schema


def resolve(target: Any, where: str = "_target_") -> Callable[..., Any]:
    """Import what a target names.

    Only a class that is defined below ``nemolet.`` and says that it may be built, or a registered one, is
    returned; never an attribute of a module that happens to be reachable, as ``nemolet.module.torch.load``.

    Raises:
        ConfigError: for anything else.
    """
    if isinstance(target, str) and target in _registered:
        return _registered[target]  # type: ignore[no-any-return]
    schema_of_target(target, where)  # defined there, by its source text, before anything is imported
    module, name = _split(target, where)
    found = getattr(importlib.import_module(module), name, None)
    home = str(getattr(found, "__module__", "")).split(".")[0]
    named_so = home == "nemolet" and getattr(found, "__name__", "") == name
    if found is None or not named_so or not getattr(found, "__buildable__", False):
        raise ConfigError(
            "a config may not build this",
            where=where,
            found=target,
            fix=_REGISTER,
            expected="a typed module or a registered class",
        )
    return found  # type: ignore[no-any-return]


_REGISTER = "register a class of your own with nemolet.register"


def _split(target: Any, where: str) -> tuple[str, str]:
    parts = target.split(".") if isinstance(target, str) else []
    plain = all(part.isidentifier() and not part.startswith("_") for part in parts)
    if len(parts) < 3 or parts[0] != "nemolet" or not plain:
        known = {name.split(".")[-1]: name for name in _registered}
        close = known.get(nearest(str(target).split(".")[-1], known) or "")
        register_it = f"{_REGISTER}, and import its module first (imports=[my_module])"
        raise ConfigError(
            "this target is not allowed",
            where=where,
            found=repr(target),
            expected="a class of nemolet, or one registered in this process",
            fix=f"did you mean {close}?" if close else register_it,
        )
    return ".".join(parts[:-1]), parts[-1]


def build(config: Any, *, parts: dict[str, Any] | None = None, where: str = "") -> Any:
    """Build objects from plain data.

    A mapping with ``_target_`` becomes an object, its values being built first; ``{"_ref_": name}`` stands
    for a part that was built earlier under this name.

    Args:
        config: plain data.
        parts: objects that may be referred to.
        where: place of the data, for errors.

    Raises:
        ConfigError: for a target outside the allowlist, unknown, missing or wrong arguments, all at once.

    Example:
        >>> build({"_target_": "nemolet.nn.RMSNorm", "axis": "D", "size": 4})
        RMSNorm()
    """
    from nemolet.config.validation import check_tree, refuse

    refuse(check_tree(config, where), where or "build")
    return _build(config, dict(parts or {}), where)


def _build(config: Any, parts: dict[str, Any], where: str) -> Any:
    if isinstance(config, (list, tuple)):
        return [_build(item, parts, f"{where}[{i}]") for i, item in enumerate(config)]
    if not isinstance(config, dict):
        return config
    if "_ref_" in config:
        return _referred(config["_ref_"], parts, f"{where}._ref_")
    values: dict[str, Any] = {}
    inner = dict(parts)  # siblings see each other, outsiders do not see inside
    for name, value in config.items():
        if name != "_target_":
            values[name] = inner[name] = _build(value, inner, f"{where}.{name}" if where else str(name))
    if "_target_" not in config:
        return values
    make = resolve(config["_target_"], f"{where}._target_" if where else "_target_")
    values = _with_settings(schema_of_target(config["_target_"]), values)
    try:
        return make(**values)
    except NemoletError:
        raise
    except Exception as error:  # a class of anybody raises anything; told with its place, and as the cause
        raise ConfigError(
            f"{make.__name__} cannot be built so",
            where=where or config["_target_"],
            found=f"{type(error).__name__}: {str(error)[:500]}",
        ) from error


def _referred(name: Any, parts: dict[str, Any], where: str) -> Any:
    if not isinstance(name, str) or name not in parts:
        close = nearest(str(name), parts)
        raise ConfigError(
            "nothing was built under this name yet",
            where=where,
            found=name,
            expected=", ".join(parts) or "an earlier part",
            fix=f"did you mean {close!r}?" if close else None,
        )
    return parts[name]


def construct(schema: Schema, values: dict[str, Any]) -> Any:
    """A settings dataclass from a block that was validated against its schema; nested settings likewise.

    Blocks with ``_target_`` stay plain data.
    """
    made: dict[str, Any] = {}
    for name, value in values.items():
        inner = _block(schema.parameters[name][0])
        if inner is not None and isinstance(value, dict) and "_target_" not in value:
            value = construct(inner, value)
        made[f"{name}_" if keyword.iskeyword(name) else name] = tuple(value) if isinstance(value, list) else value
    return getattr(importlib.import_module(schema.home), schema.name)(**made)


def _with_settings(schema: Schema, values: dict[str, Any]) -> dict[str, Any]:
    """The same values, plain blocks having become the dataclasses that the signature asks for."""
    made = dict(values)
    for name, value in values.items():
        kind, default = schema.parameters.get(name, (None, None))
        inner = _block(kind)
        if inner is not None and isinstance(value, dict):
            made[name] = construct(inner, value)
        elif isinstance(default, tuple) and isinstance(value, list):  # plain data has no tuples
            made[name] = tuple(value)
    return made


def _block(kind: Any) -> Schema | None:
    options = kind.options if isinstance(kind, Either) else (kind,)
    return next((option.schema for option in options if isinstance(option, Block)), None)
