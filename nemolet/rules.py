"""What must hold of settings, whether they come from a config or from Python.

A class states it in ``CONFIG_RULES``, pairs of an expression and a sentence, and in ``Literal`` annotations. Configs
are checked by :mod:`nemolet.config`, typed modules whenever one is made, and so are dataclasses below :class:`Checked`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from nemolet.errors import ConfigError, did_you_mean

Rules = Sequence[tuple[str, str]]

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "len": len,
    "min": lambda many: min(many.values() if isinstance(many, Mapping) else many, default=None),
}
_JOINS: tuple[type, ...] = (ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.BinOp, ast.Compare, ast.Is, ast.IsNot)
_READABLE = (ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.Call, ast.Load, *_JOINS, *_OPERATORS)


class _Unknown(Exception):
    """A rule speaks of a setting that is not set."""


@functools.lru_cache(maxsize=1024)
def read_rule(expression: str) -> ast.expr:
    """The parsed expression of a rule.

    Raises:
        ConfigError: for anything but numbers, text, names, items, lengths, smallest items (of a mapping: its smallest
            value), arithmetic, comparisons, and, or, not.

    Example:
        >>> evaluate(read_rule("not width % heads"), {"width": 8, "heads": 2})
        True
    """
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise ConfigError("a rule cannot be read", where=expression, found=error.msg) from error
    for node in ast.walk(tree):
        known = isinstance(node, _READABLE)
        if isinstance(node, ast.Attribute):
            known = isinstance(node.value, (ast.Name, ast.Attribute))
        elif isinstance(node, ast.Call):
            known = _dotted(node.func) in _FUNCTIONS and len(node.args) == 1 and not node.keywords
        elif isinstance(node, ast.Compare):
            is_none = isinstance(node.ops[0], (ast.Is, ast.IsNot))
            known = len(node.ops) == 1 and (not is_none or ast.unparse(node.comparators[0]) == "None")
        if not known:
            raise ConfigError(
                "a rule can only compare and calculate",
                where=expression,
                found=ast.unparse(node) or type(node).__name__,
                fix="check this in __init__",
            )
    return tree


def broken(rules: Rules, known: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The sentence of each rule that does not hold, and the settings it speaks of; those that are not set, where the
    sentence speaks of them too.

    Args:
        rules: pairs of an expression and a sentence.
        known: the settings by name; a setting that is None is not set, and breaks no rule.

    Example:
        >>> broken([("width % heads == 0", "heads must divide the width")], {"width": 8, "heads": 3})
        [('heads must divide the width', {'width': 8, 'heads': 3})]
    """
    found = []
    for expression, sentence in rules:
        tree = read_rule(expression)
        try:
            holds = evaluate(tree, known)
        except (_Unknown, TypeError, IndexError, KeyError):
            continue  # a value that is not set, or of a wrong type, which is a problem of its own
        except ZeroDivisionError:
            holds = False
        if not holds:
            named = {name: _lookup(name, known) for name in _settings_of(tree)}
            words = re.findall(r"\w+", sentence)
            told = {k: v for k, v in named.items() if v is not None or k.rpartition(".")[2] in words}
            found.append((sentence, told or named))
    return found


def _settings_of(tree: ast.expr) -> list[str]:
    """The settings that a rule speaks of, such as ``width`` and ``attention.head_size``."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Attribute))]
    names = [name for name in dict.fromkeys(map(_dotted, nodes)) if name not in _FUNCTIONS]
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def evaluate(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """The value of an expression that :func:`read_rule` has read."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.Name, ast.Attribute)):
        value = _lookup(_dotted(node), known)
        if value is None:
            raise _Unknown
        return value
    if isinstance(node, ast.BoolOp):
        every = all if isinstance(node.op, ast.And) else any
        return every(evaluate(value, known) for value in node.values)
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](evaluate(node.operand, known))
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](evaluate(node.left, known), evaluate(node.right, known))
    if isinstance(node, ast.Subscript):
        return evaluate(node.value, known)[evaluate(node.slice, known)]
    if isinstance(node, ast.Call):
        return _FUNCTIONS[_dotted(node.func)](evaluate(node.args[0], known))
    assert isinstance(node, ast.Compare)
    if isinstance(node.ops[0], (ast.Is, ast.IsNot)):
        return (_lookup(_dotted(node.left), known) is None) == isinstance(node.ops[0], ast.Is)
    return _OPERATORS[type(node.ops[0])](evaluate(node.left, known), evaluate(node.comparators[0], known))


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return getattr(node, "id", "")


def _lookup(name: str, known: Mapping[str, Any]) -> Any:
    value: Any = known
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value


# --------------------------------------------------------------------------------------------------
# Objects that are made in Python
# --------------------------------------------------------------------------------------------------


class Checked:
    """Base of dataclasses of settings: what a config would not be allowed, Python is not either (abstract).

    Raises:
        ConfigError: when an instance is made, naming the class and the field.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        check_names(cls, kwargs)
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_rules(cls)

    def __post_init__(self) -> None:
        kind: Any = type(self)
        values = {field.name: getattr(self, field.name) for field in fields(kind)}
        check_choices(kind, kind.__name__, values)
        _refuse_broken(kind, values)


def check_names(kind: type, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that a class does not have.

    Raises:
        ConfigError: naming the class, the argument, and the nearest that it has.
    """
    parameters = _signature(kind.__init__).parameters  # type: ignore[misc]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [name for name in parameters if name != "self"]
    for name in kwargs:
        if name not in known:
            raise ConfigError(
                "there is no such argument",
                where=f"{kind.__name__}.{name}",
                expected=", ".join(known) or "none",
                found=name,
                fix=did_you_mean(name, known) or "remove it",
            )


def check_arguments(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse the same among the arguments of a class, before it is made of them.

    Raises:
        ConfigError: naming the class and the argument.
    """
    make: Any = kind.__init__  # type: ignore[misc]
    check_names(kind, kwargs)
    if not (args or kwargs) or not (_choices(make) or hasattr(kind, "CONFIG_RULES")):
        return  # a copy is made without arguments
    try:
        bound = _signature(make).bind(None, *args, **kwargs)
    except TypeError:
        return  # which the call itself reports
    check_choices(make, kind.__name__, bound.arguments)
    bound.apply_defaults()
    _refuse_broken(kind, bound.arguments)


def check_rules(kind: type) -> None:
    """Refuse rules that cannot be read or speak of no setting, when a class is defined; for ``__init_subclass__``.

    Raises:
        ConfigError: naming the class and the rule.
    """
    own: Any = kind.__init__  # type: ignore[misc]
    parameters = {} if own is object.__init__ else _signature(own).parameters  # a dataclass gets its own later
    settings = [*parameters, *(name for each in kind.__mro__ for name in inspect.get_annotations(each))]
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for expression, _ in kind.__dict__.get("CONFIG_RULES", ()):
        for name in _settings_of(read_rule(expression)):
            if name.partition(".")[0] not in settings and not is_open:
                raise ConfigError(
                    "a rule speaks of no setting",
                    where=f"{kind.__name__}.CONFIG_RULES",
                    found=f"{name} in {expression!r}",
                    fix=did_you_mean(name, settings),
                )


def _refuse_broken(kind: type, values: Mapping[str, Any]) -> None:
    rules: Rules = getattr(kind, "CONFIG_RULES", ())
    for sentence, named in broken(rules, values):
        found = ", ".join(f"{name}={value!r}" for name, value in named.items())
        raise ConfigError(sentence, where=kind.__name__, found=found, fix=f"change {' or '.join(named)}")


def check_choices(annotated: Any, where: str, values: Mapping[str, Any]) -> None:
    """Compare values with the ``Literal`` annotations of a class or function.

    Raises:
        ConfigError: naming the argument, and the nearest choice.
    """
    for name, hint in _choices(annotated).items():
        if name in values and not _fits(hint, values[name]):
            known = [str(choice) for choice in _named(hint)]
            raise ConfigError(
                "unknown choice",
                where=f"{where}.{name}",
                expected="one of " + ", ".join(known),
                found=repr(values[name]),
                fix=did_you_mean(str(values[name]), known) or "choose one of them",
            )


@functools.lru_cache(maxsize=1024)
def _signature(make: Any) -> inspect.Signature:
    return inspect.signature(make)


@functools.lru_cache(maxsize=1024)
def _choices(annotated: Any) -> dict[str, Any]:
    """The annotations that name choices."""
    try:
        hints = get_type_hints(annotated)
    except NameError:  # a class of the user's that imports types for the type checker only
        return {}
    return {name: hint for name, hint in hints.items() if _named(hint)}


def _named(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for inner in get_args(hint) for choice in _named(inner)]


def _fits(hint: Any, value: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return any(_fits(option, value) for option in inner)
    if origin in (tuple, list):
        items = [option for option in inner if option is not Ellipsis]
        return isinstance(value, (tuple, list)) and all(_fits(items[0], item) for item in value)
    if hint in (int, str, bool, type(None)):
        return isinstance(value, hint) and (hint is not int or not isinstance(value, bool))
    return True
