"""What a config block may hold, read from the signature of what it builds.

Signatures are read from source text, not from imported objects: a mistake in a config is then answered
without waiting for torch. Names in annotations are followed through imports, so a block is checked against
the dataclass or class that its annotation names.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIRED = object()  # default of a parameter that has none


@dataclass(frozen=True)
class Anything:
    """A value of which nothing is known."""

    def __str__(self) -> str:
        return "anything"


@dataclass(frozen=True)
class Plain:
    """One of int, float, str, bool, None."""

    name: str

    def __str__(self) -> str:
        return {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "None": "null"}[self.name]


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return "one of " + ", ".join(map(str, self.values))


@dataclass(frozen=True)
class Either:
    """Any of these types."""

    options: tuple[Type, ...]

    def __str__(self) -> str:
        return " or ".join(map(str, self.options))


@dataclass(frozen=True)
class Many:
    """A list; ``items`` of fixed length where ``fixed``."""

    items: tuple[Type, ...]
    fixed: bool = False

    def __str__(self) -> str:
        return f"a list of {len(self.items)}" if self.fixed else f"a list of {self.items[0]}"


@dataclass(frozen=True)
class Table:
    """A mapping from names to values of one type."""

    value: Type

    def __str__(self) -> str:
        return f"a mapping to {self.value}"


@dataclass(frozen=True)
class Block:
    """A nested block that builds this dataclass; its schema is read when it is asked for, since types may nest."""

    home: str
    name: str

    @property
    def schema(self) -> Schema:
        """The fields of the dataclass."""
        schema = schema_of(self.home, self.name)
        assert schema is not None
        return schema

    def __str__(self) -> str:
        return f"the settings of {self.name}"


@dataclass(frozen=True)
class Target:
    """A nested block that names its class by ``_target_``, or an earlier part by ``_ref_``."""

    name: str

    def __str__(self) -> str:
        return f"a block with _target_ that builds a {self.name}"


Type = Anything | Plain | Choice | Either | Many | Table | Block | Target


@dataclass(frozen=True)
class Schema:
    """The parameters of one class or function.

    Attributes:
        name: of the class or function.
        parameters: type and default of each.
        rules: ``(expression, sentence)`` pairs that must hold between parameters.
        open: whether further parameters are accepted.
        home: the module that defines it.
    """

    name: str
    parameters: Mapping[str, tuple[Type, Any]]
    rules: tuple[tuple[str, str], ...] = ()
    open: bool = False
    home: str = ""


# --------------------------------------------------------------------------------------------------
# Finding a definition in source text
# --------------------------------------------------------------------------------------------------

Definition = ast.ClassDef | ast.FunctionDef


@functools.lru_cache(maxsize=256)
def _tree(module: str) -> ast.Module | None:
    """The parsed source of a module below nemolet; parents are packages without side effects."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, AttributeError, ValueError):
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def find(module: str, name: str, depth: int = 0) -> tuple[str, Definition | ast.expr] | None:
    """Where a name of a module is defined, and its definition: a class, a function, or an assigned expression."""
    tree = _tree(module) if module.split(".")[0] == "nemolet" else None
    if tree is None or depth > 8:
        return None
    for node in _statements(tree.body):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return module, node.value
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(node.module, alias.name, depth + 1)
    return None


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Top-level statements, including those under ``if TYPE_CHECKING``."""
    return [inner for node in body for inner in (_statements(node.body) if isinstance(node, ast.If) else [node])]


@functools.lru_cache(maxsize=256)
def schema_of(module: str, name: str) -> Schema | None:
    """The schema of a class or function below nemolet, or None where there is no such definition."""
    found = find(module, name)
    if found is None or not isinstance(found[1], (ast.ClassDef, ast.FunctionDef)):
        return None
    return _schema(found[1], found[0])


def schema_of_object(thing: Any) -> Schema:
    """The schema of a user's registered class: from its source where that is at hand, else only names."""
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    except (OSError, TypeError, SyntaxError):
        node = None
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        schema = _schema(node, thing.__module__)
        if schema.parameters:
            return schema
    parameters = inspect.signature(thing).parameters.values()
    return Schema(
        thing.__name__,
        {p.name: (Anything(), REQUIRED if p.default is p.empty else p.default) for p in parameters
         if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)},
        open=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _schema(node: Definition, module: str) -> Schema:
    if isinstance(node, ast.FunctionDef):
        rules = find(module, "CONFIG_RULES")
        parameters = _parameters(node.args, module)
        return Schema(node.name, parameters, _literal(rules[1]) if rules and isinstance(rules[1], ast.expr) else (), home=module)
    rules_here: tuple[tuple[str, str], ...] = ()
    fields: dict[str, tuple[Type, Any]] = {}
    for base in (b.id for b in node.bases if isinstance(b, ast.Name)):
        parent = schema_of(module, base)  # a dataclass has the fields of the dataclass it extends
        if parent is not None:
            fields, rules_here = dict(parent.parameters), parent.rules
    for item in node.body:
        if isinstance(item, (ast.Assign, ast.AnnAssign)):
            target = item.targets[0] if isinstance(item, ast.Assign) else item.target
            name = target.id if isinstance(target, ast.Name) else ""
            if name == "CONFIG_RULES" and item.value is not None:
                rules_here = _literal(item.value)
            elif isinstance(item, ast.AnnAssign):
                fields[name] = (_type(item.annotation, module), REQUIRED if item.value is None else _literal(item.value))
    init = next((i for i in node.body if isinstance(i, ast.FunctionDef) and i.name == "__init__"), None)
    if init is not None:
        fields = _parameters(init.args, module, skip=1)
    return Schema(node.name, fields, rules_here, open=bool(init and init.args.kwarg), home=module)


def _parameters(arguments: ast.arguments, module: str, skip: int = 0) -> dict[str, tuple[Type, Any]]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = list(zip(positional, defaults))[skip:] + list(zip(arguments.kwonlyargs, arguments.kw_defaults))
    return {
        arg.arg: (_type(arg.annotation, module), REQUIRED if default is None else _literal(default)) for arg, default in pairs
    }


def _literal(node: ast.expr) -> Any:
    """The value of a literal; arithmetic and names are left open as None."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


_CONTAINERS = {"list", "Sequence", "Iterable", "List"}
_TABLES = {"dict", "Mapping", "Dict"}


def _type(node: ast.expr | None, module: str, depth: int = 0) -> Type:
    """An annotation as a type of configs."""
    if node is None or depth > 6:
        return Anything()
    if isinstance(node, ast.Constant):
        if node.value is None:
            return Plain("None")
        return _type(ast.parse(node.value, mode="eval").body, module, depth + 1) if isinstance(node.value, str) else Anything()
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        sides = [_type(side, module, depth) for side in (node.left, node.right)]
        return Either(tuple(o for side in sides for o in (side.options if isinstance(side, Either) else (side,))))
    if isinstance(node, ast.Subscript):
        return _generic(node, module, depth)
    if isinstance(node, ast.Name):
        return _named(node.id, module, depth)
    return Anything()


def _generic(node: ast.Subscript, module: str, depth: int) -> Type:
    outer = node.value.id if isinstance(node.value, ast.Name) else ""
    inner = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
    if outer == "Literal":
        return Choice(tuple(_literal(item) for item in inner))
    if outer == "tuple" and not any(isinstance(i, ast.Constant) and i.value is Ellipsis for i in inner):
        return Many(tuple(_type(item, module, depth) for item in inner), fixed=True)
    if outer in _CONTAINERS or outer == "tuple":
        return Many((_type(inner[0], module, depth),))
    if outer in _TABLES:
        return Table(_type(inner[-1], module, depth))
    return Anything()


def _named(name: str, module: str, depth: int) -> Type:
    if name in ("int", "float", "str", "bool"):
        return Plain(name)
    if name in ("Any", "object"):
        return Anything()
    if name == "ModuleConfig":
        return Target("typed module")
    if name in _CONTAINERS:
        return Many((Anything(),))
    if name in _TABLES:
        return Table(Anything())
    found = find(module, name)
    if found is None:
        return Anything()
    home, definition = found
    if isinstance(definition, ast.ClassDef):
        dataclass_like = any("dataclass" in ast.unparse(d) for d in definition.decorator_list)
        return Block(home, definition.name) if dataclass_like else Target(definition.name)
    return _type(definition, home, depth + 1) if isinstance(definition, ast.expr) else Anything()
