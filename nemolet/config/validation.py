"""Checking a whole config against schemas; every problem is found, not only the first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemolet.config.registry import schema_of_target
from nemolet.config.schema import (
    REQUIRED,
    Anything,
    Block,
    Choice,
    Either,
    Many,
    Plain,
    Schema,
    Table,
    Target,
    Type,
)
from nemolet.errors import ConfigError, nearest
from nemolet.rules import broken

MISSING = "???"


@dataclass(frozen=True)
class Problem:
    """One mistake in a config."""

    path: str
    what: str
    expected: str | None = None
    found: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        rows = (("expected", self.expected), ("found", self.found))
        details = "; ".join(f"{label} {text}" for label, text in rows if text)
        text = f"{self.path}: {self.what}" + (f" ({details})" if details else "")
        return f"{text}; {self.fix}" if self.fix else text


def refuse(problems: Iterable[Problem], where: str) -> None:
    """Raise one error that lists all problems, if there are any."""
    found = list(dict.fromkeys(problems))
    if len(found) == 1:
        only = found[0]
        raise ConfigError(only.what, where=only.path, expected=only.expected, found=only.found, fix=only.fix)
    if found:
        lines = "\n".join(f"  - {problem}" for problem in found)
        raise ConfigError(f"{len(found)} problems\n{lines}", where=where)


def check_block(
    schema: Schema, values: Mapping[str, Any], path: str = "", supplied: Collection[str] = ()
) -> list[Problem]:
    """All problems of a block.

    Args:
        schema: what the block builds.
        values: what it holds.
        path: where it lies in the config.
        supplied: paths that the program fills in, so that they may be null or absent.
    """
    problems: list[Problem] = []
    for name, value in values.items():
        here = _join(path, name)
        if name in ("_target_", "_ref_"):
            continue
        if name not in schema.parameters:
            if not schema.open:
                close = _deeper(schema, values, str(name)) or nearest(str(name), schema.parameters)
                problems.append(
                    Problem(
                        here,
                        f"{schema.name if path else 'the config'} has no such setting",
                        found=str(name),
                        expected=None if close else ", ".join(schema.parameters) or "nothing",
                        fix=f"did you mean {_join(path, close)}?" if close else "remove it",
                    )
                )
        elif not (here in supplied and value is None):
            problems += check_value(schema.parameters[name][0], value, here, supplied)
    for name, (kind, default) in schema.parameters.items():
        here = _join(path, name)
        if default is REQUIRED and name not in values and here not in supplied:
            problems.append(Problem(here, "a value is missing", expected=str(kind), fix=f"set {here}=..."))
    return problems + _broken_rules(schema, values, path)


def _deeper(schema: Schema, values: Mapping[str, Any], name: str) -> str | None:
    """Where below a block a setting of this name is."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner = _schema_below(schema.parameters[key][0] if key in schema.parameters else None, value)
            if inner is not None and name in inner.parameters:
                return f"{key}.{name}"
    return None


def _schema_below(kind: Type | None, value: Mapping[str, Any]) -> Schema | None:
    """What a block of a config is checked against, where that is known."""
    if "_target_" in value:
        try:
            return schema_of_target(value["_target_"], "")
        except ConfigError:  # reported where it stands
            return None
    options = kind.options if isinstance(kind, Either) else (kind,)
    return next((option.schema for option in options if isinstance(option, Block)), None)


def check_value(kind: Type, value: Any, path: str, supplied: Collection[str] = ()) -> list[Problem]:
    """All problems of one value."""
    if value == MISSING:
        return [Problem(path, "a value is missing", expected=str(kind), fix=f"set {path}=...")]
    if isinstance(kind, Either):
        attempts = [check_value(option, value, path, supplied) for option in kind.options]
        if not all(attempts):
            return []
        if isinstance(value, Mapping):  # the error inside a block says more than "no block"
            inner = [a for a, o in zip(attempts, kind.options) if isinstance(o, (Block, Target, Table))]
            return inner[0] if inner else attempts[0]
        return [_mismatch(kind, value, path)]
    if isinstance(kind, Anything):
        return check_tree(value, path, supplied)
    if isinstance(kind, Plain):
        return [] if _is_plain(kind.name, value) else [_mismatch(kind, value, path)]
    if isinstance(kind, Choice):
        if any(value == option and type(value) is type(option) for option in kind.values):
            return []
        close = nearest(str(value), map(str, kind.values))
        return [
            Problem(
                path,
                "unknown choice",
                expected=str(kind),
                found=repr(value),
                fix=f"did you mean {path}={close}?" if close else None,
            )
        ]
    if isinstance(kind, Many):
        if not isinstance(value, (list, tuple)) or (kind.fixed and len(value) != len(kind.items)):
            return [_mismatch(kind, value, path)]
        kinds = kind.items if kind.fixed else kind.items * len(value)
        checks = (check_value(k, v, f"{path}[{i}]", supplied) for i, (k, v) in enumerate(zip(kinds, value)))
        return [problem for problems in checks for problem in problems]
    if not isinstance(value, Mapping):
        return [_mismatch(kind, value, path)]
    if isinstance(kind, Table):
        if "_target_" in value:
            return check_tree(value, path, supplied)
        checks = (check_value(kind.value, v, _join(path, str(k)), supplied) for k, v in value.items())
        return [problem for problems in checks for problem in problems]
    if isinstance(kind, Block):
        return check_block(kind.schema, value, path, supplied)
    if "_ref_" not in value and "_target_" not in value:
        return [
            Problem(path, "the block does not say what to build", expected=str(kind), fix=f"set {path}._target_=...")
        ]
    return check_tree(value, path, supplied)


def check_tree(value: Any, path: str, supplied: Collection[str] = ()) -> list[Problem]:
    """All problems of a value of which only its ``_target_`` blocks are known."""
    if value == MISSING:
        return [Problem(path, "a value is missing", fix=f"set {path}=...")]
    if isinstance(value, (list, tuple)):
        return [p for i, item in enumerate(value) for p in check_tree(item, f"{path}[{i}]", supplied)]
    if not isinstance(value, Mapping):
        return []
    if "_target_" not in value:
        return [p for k, v in value.items() for p in check_tree(v, _join(path, str(k)), supplied)]
    try:
        schema = schema_of_target(value["_target_"], _join(path, "_target_"))
    except ConfigError as error:
        where = error.where or path
        return [Problem(where, error.what, _text(error.expected), _text(error.found), error.fix)]
    return check_block(schema, value, path, supplied)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _join(path: str, name: str | None) -> str:
    return f"{path}.{name}" if path else str(name)


def _is_plain(name: str, value: Any) -> bool:
    if name == "None":
        return value is None
    if name == "bool":
        return isinstance(value, bool)
    if name == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, {"int": int, "str": str}[name]) and not isinstance(value, bool)


def _mismatch(kind: Type, value: Any, path: str) -> Problem:
    fix = None
    if isinstance(value, str) and isinstance(kind, (Plain, Either)) and _is_number(value):
        fix = f"write {path}={value} without quotes"
    elif isinstance(value, (int, float, bool)) and kind == Plain("str"):
        fix = f"""write {path}="'{value}'" """.strip()
    elif isinstance(value, float) and kind == Plain("int") and value.is_integer():
        fix = f"write {path}={int(value)}"
    found = f"{value!r} ({type(value).__name__})"
    return Problem(path, "wrong type of value", expected=str(kind), found=found, fix=fix)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# --------------------------------------------------------------------------------------------------
# Rules between settings
# --------------------------------------------------------------------------------------------------


def _broken_rules(schema: Schema, values: Mapping[str, Any], path: str) -> list[Problem]:
    return [
        Problem(path or "config", sentence, found=", ".join(f"{_join(path, n)}={v}" for n, v in named.items()))
        for sentence, named in broken(schema.rules, _with_defaults(schema, values))
    ]


def _with_defaults(schema: Schema, values: Mapping[str, Any]) -> dict[str, Any]:
    """All settings as they will be, those of nested blocks included."""
    known = {name: default for name, (_, default) in schema.parameters.items() if default is not REQUIRED}
    for name, value in values.items():
        kind = schema.parameters[name][0] if name in schema.parameters else Anything()
        options = kind.options if isinstance(kind, Either) else (kind,)
        block = next((option for option in options if isinstance(option, Block)), None)
        known[name] = _with_defaults(block.schema, value) if block and isinstance(value, Mapping) else value
    return known
