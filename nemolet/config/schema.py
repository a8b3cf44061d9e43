"""What a config block may hold, read from the signature of what it builds.

Signatures are read from source text, not from imported objects: a mistake in a config is then answered
without waiting for torch. Names in annotations are followed through imports, so a block is checked against
the dataclass or class that its annotation names.
"""

from __future__ import annotations

import ast
import functools
import inspect
import keyword
import operator
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIRED = object()  # default of a parameter that has none
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "None": "null",
}
_ROOT = Path(__file__).parents[1]  # the package; its files are read, not imported


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
        return _WORDS[self.name]


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
    """A nested block that builds this dataclass; its schema is read when it is asked for: types may nest."""

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
    """The parsed source of a module below nemolet. Nothing is imported: a name in a config may be hostile."""
    top, *parts = module.split(".")
    if top != "nemolet" or not all(part.isidentifier() for part in parts):
        return None
    here = _ROOT.joinpath(*parts)
    for file in ([here.with_name(f"{here.name}.py")] if parts else []) + [here / "__init__.py"]:
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None


def find(module: str, name: str, depth: int = 0) -> tuple[str, Definition | ast.expr] | None:
    """Where a name of a module is defined, and as what: a class, a function, or an assigned expression."""
    tree = _tree(module)
    if tree is None or depth > 8:
        return None
    for node in _statements(tree.body):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
            return module, node.value
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(node.module, alias.name, depth + 1)
    return None


def _found(node: ast.expr, module: str) -> tuple[str, Definition | ast.expr] | None:
    """The definition of ``Name`` or of ``module.Name``, as they stand in the source of a module."""
    if isinstance(node, ast.Name):
        return find(module, node.id)
    tree = _tree(module)
    if tree is None or not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
        return None
    for statement in _statements(tree.body):
        if isinstance(statement, ast.ImportFrom) and not statement.level:
            for alias in statement.names:
                if (alias.asname or alias.name) == node.value.id:
                    return find(f"{statement.module}.{alias.name}", node.attr)
    return None


def definitions(module: str) -> list[str]:
    """The names of the classes that a module defines or hands on, for suggestions."""
    tree = _tree(module)
    names = [n.name for n in _statements(tree.body) if isinstance(n, ast.ClassDef)] if tree else []
    exports = find(module, "_EXPORTS")
    keys = exports[1].keys if exports and isinstance(exports[1], ast.Dict) else []
    return names + [k.value for k in keys if isinstance(k, ast.Constant) and isinstance(k.value, str)]


def buildable(module: str, name: str) -> bool:
    """Whether the source marks a class (or one it extends) or a function with ``__buildable__ = True``."""
    found = find(module, name)
    if found is None:
        return False
    home, node = found
    if isinstance(node, ast.FunctionDef):
        tree = _tree(home)
        return tree is not None and _mark(tree.body, f"{node.name}.__buildable__") is True
    if not isinstance(node, ast.ClassDef):
        return False
    own = _mark(node.body, "__buildable__")
    if own is not None:
        return own
    bases = [_found(base, home) for base in node.bases]
    return any(isinstance(b[1], ast.ClassDef) and buildable(b[0], b[1].name) for b in bases if b is not None)


def _mark(body: list[ast.stmt], name: str) -> bool | None:
    """What a body assigns to a mark, or None where it says nothing."""
    for item in body:
        if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == name:
            return isinstance(item.value, ast.Constant) and item.value.value is True
    return None


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Top-level statements, including those under ``if TYPE_CHECKING``."""
    nested = (_statements(node.body) if isinstance(node, ast.If) else [node] for node in body)
    return [statement for statements in nested for statement in statements]


@functools.lru_cache(maxsize=256)
def schema_of(module: str, name: str) -> Schema | None:
    """The schema of a class or function below nemolet, or None where there is no such definition."""
    found = find(module, name)
    if found is None or not isinstance(found[1], (ast.ClassDef, ast.FunctionDef)):
        return None
    return _schema(found[1], found[0])


def schema_of_object(thing: Any) -> Schema:
    """The schema of a user's registered class: from its source where that is at hand, else only names."""
    parameters = [
        p for p in inspect.signature(thing).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    except (OSError, TypeError, SyntaxError):
        node = None
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        schema = _schema(node, thing.__module__)
        if list(schema.parameters) == [p.name for p in parameters]:  # else it inherits what is not read
            return schema
    rules = getattr(thing, "CONFIG_RULES", ())
    return Schema(
        thing.__name__,
        {p.name: (Anything(), REQUIRED if p.default is p.empty else p.default) for p in parameters},
        tuple(rules) if isinstance(rules, (tuple, list)) else (),
        open=any(p.kind is p.VAR_KEYWORD for p in inspect.signature(thing).parameters.values()),
    )


def _schema(node: Definition, module: str) -> Schema:
    if isinstance(node, ast.FunctionDef):
        found = find(module, "CONFIG_RULES")
        given = _literal(found[1]) if found and isinstance(found[1], ast.expr) else ()
        return Schema(node.name, _parameters(node.args, module), given, bool(node.args.kwarg), module)
    rules: tuple[tuple[str, str], ...] = ()
    fields: dict[str, tuple[Type, Any]] = {}
    is_open = False
    for base in node.bases:
        parent = _found(base, module)
        if parent is not None and isinstance(parent[1], ast.ClassDef):  # what a class extends, it also takes
            inherited = _schema(parent[1], parent[0])
            fields, rules, is_open = dict(inherited.parameters), inherited.rules, inherited.open
    for item in node.body:
        if isinstance(item, (ast.Assign, ast.AnnAssign)) and item.value is not None:
            target = item.targets[0] if isinstance(item, ast.Assign) else item.target
            if isinstance(target, ast.Name) and target.id == "CONFIG_RULES":
                rules = _literal(item.value)
    if _is_dataclass(node):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation):
                assert isinstance(item.target, ast.Name)
                default = REQUIRED if item.value is None else _literal(item.value)
                # A setting named by a word of Python is written with an underscore after it: ``from_``.
                name = item.target.id.removesuffix("_") if keyword.iskeyword(item.target.id[:-1]) else item.target.id
                fields[name] = (_type(item.annotation, module), default)
    init = next((i for i in node.body if isinstance(i, ast.FunctionDef) and i.name == "__init__"), None)
    if init is not None:
        fields, is_open = _parameters(init.args, module, skip=1), bool(init.args.kwarg)
    return Schema(node.name, fields, rules, is_open, module)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _parameters(arguments: ast.arguments, module: str, skip: int = 0) -> dict[str, tuple[Type, Any]]:
    positional = [*arguments.posonlyargs, *arguments.args]
    required: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = list(zip(positional, [*required, *arguments.defaults]))[skip:]
    pairs += list(zip(arguments.kwonlyargs, arguments.kw_defaults))
    return {
        arg.arg: (_type(arg.annotation, module), REQUIRED if default is None else _literal(default))
        for arg, default in pairs
    }


_ARITHMETIC: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.LShift: operator.lshift,
    ast.Pow: operator.pow,
}


def _literal(node: ast.expr) -> Any:
    """The value of a literal, or of arithmetic such as ``1 << 26``; names are left open as None."""
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _literal(node.left), _literal(node.right)
        return None if None in (left, right) else _ARITHMETIC[type(node.op)](left, right)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


_CONTAINERS = {"list", "Sequence", "Iterable", "List"}
_TABLES = {"dict", "Mapping", "Dict"}
_PLAIN: dict[str, Type] = {
    **{name: Plain(name) for name in ("int", "float", "str", "bool")},
    **{name: Many((Anything(),)) for name in _CONTAINERS},
    **{name: Table(Anything()) for name in _TABLES},
    "Any": Anything(),
    "object": Anything(),
    "ModuleConfig": Target("typed module"),
}


def _type(node: ast.expr | None, module: str, depth: int = 0) -> Type:
    """An annotation as a type of configs."""
    if node is None or depth > 6:
        return Anything()
    if isinstance(node, ast.Constant) and node.value is None:
        return Plain("None")
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _type(ast.parse(node.value, mode="eval").body, module, depth + 1)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        sides = [_type(side, module, depth) for side in (node.left, node.right)]
        return _either(sides)
    if isinstance(node, ast.Subscript):
        return _generic(node, module, depth)
    if isinstance(node, ast.Name) and node.id in _PLAIN:
        return _PLAIN[node.id]
    found = _found(node, module)
    if found is None:
        return Anything()
    home, definition = found
    if isinstance(definition, ast.ClassDef):
        return Block(home, definition.name) if _is_dataclass(definition) else Target(definition.name)
    return _type(definition, home, depth + 1) if isinstance(definition, ast.expr) else Anything()


def _either(options: list[Type]) -> Either:
    """Types joined by ``|``, which may be joins themselves."""
    nested = (option.options if isinstance(option, Either) else (option,) for option in options)
    return Either(tuple(option for inner in nested for option in inner))


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
    if outer in ("Optional", "Union"):
        missing: list[Type] = [Plain("None")] if outer == "Optional" else []
        return _either([_type(item, module, depth) for item in inner] + missing)
    return Anything()
