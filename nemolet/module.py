"""NeuralModule: an ``nn.Module`` whose ports are the annotations of its ``forward``.

Writing a typed module costs no more than writing an untyped one: annotate ``forward`` with aliases
such as ``HiddenBTD``, and bind the sizes an instance fixes in ``super().__init__(D=width)``. A call
with tensors runs the module; a call with symbols records a wire (see :mod:`nemolet.wiring`).
"""

from __future__ import annotations

import functools
import inspect
import keyword
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nemolet.errors import DeclarationError, ShapeError, WiringError
from nemolet.ports import Port, Signature, read_signature
from nemolet.rules import check_arguments, check_rules
from nemolet.symbols import holds_symbol
from nemolet.types import (
    ANY,
    REST,
    Axis,
    Binding,
    DictOf,
    Dim,
    ListOf,
    NeuralType,
    PortType,
    bind,
    bind_axis,
    format_dims,
    parse_dims,
)
from nemolet.wiring import bind_call


class NeuralModule(nn.Module):
    """Base of all typed modules (abstract: write your own ``forward``).

    Args:
        bindings: what this instance fixes. A size of an axis (``D=256``), another letter for ``I`` or
            ``O`` (``I=Axis("D", 256)``), or a field of an element (``sample_rate=16000``).

    Raises:
        DeclarationError: when the class is created, for an argument of ``forward`` without a type.
        ConfigError: when an instance is made, for arguments against the ``CONFIG_RULES`` of the class.

    Example:
        >>> from nemolet.types import HiddenBTD
        >>> class Gate(NeuralModule):
        ...     def __init__(self, *, width: int) -> None:
        ...         super().__init__(D=width)
        ...         self.scale = nn.Parameter(torch.ones(width))
        ...         self.declare_axes(scale="D")
        ...     def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        ...         return hidden * self.scale.sigmoid()
        >>> gate = Gate(width=8)
        >>> str(gate.input_ports["hidden"])
        'hidden: B T D=8 Hidden'
        >>> gate.config()
        {'_target_': 'nemolet.module.Gate', 'width': 8}
    """

    signature: Signature | None = None
    branch: ClassVar[bool] = False  # whether what enters goes into projections of its own and nowhere else
    came_from: str | None = None  # a digest of the file that its weights were read from
    __buildable__ = True  # a config or an archive may name a typed module

    def __init_subclass__(cls, *, ports_of_instance: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_rules(cls)
        if "forward" in cls.__dict__ and not ports_of_instance:  # a Graph knows its ports only when it is made
            cls.signature = read_signature(cls.__dict__["forward"], cls.__name__)

    def __new__(cls, *args: Any, **kwargs: Any) -> NeuralModule:
        module = super().__new__(cls)
        vars(module).update(_init_arguments=(args, kwargs))  # what config() writes down
        vars(module).update(dict.fromkeys(_KEPT, _NotBegun(cls.__name__)))
        check_arguments(cls, args, kwargs)
        return module

    def __init__(self, **bindings: Binding) -> None:
        super().__init__()
        self.bindings = bindings
        self.parameter_dims: dict[str, tuple[Dim, ...]] = {}
        self.label = _snake(type(self).__name__)

    @functools.cached_property
    def input_ports(self) -> Mapping[str, Port]:
        """The inputs, with everything this instance knows."""
        return {k: Port(k, bind(p.type, self.bindings), p.optional) for k, p in self.declared().inputs.items()}

    @functools.cached_property
    def output_ports(self) -> Mapping[str, Port]:
        """The outputs, with everything this instance knows."""
        return {k: Port(k, bind(p.type, self.bindings), p.optional) for k, p in self.declared().outputs.items()}

    def comes_from(self, digest: str) -> None:
        """Note which file these weights were read from, here and in all typed modules inside."""
        for module in self.modules():
            if isinstance(module, NeuralModule):
                module.came_from = digest

    def declared(self) -> Signature:
        """The ports as declared, before the sizes of this instance are filled in."""
        if self.signature is None:
            raise DeclarationError("the module has no forward", where=self.label, fix="write a typed forward method")
        return self.signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for value in args:
            if type(value) is not Tensor and _is_of_wiring(value, self, args, kwargs):
                return self.record(args, kwargs)
        for value in kwargs.values():
            if type(value) is not Tensor and _is_of_wiring(value, self, args, kwargs):
                return self.record(args, kwargs)
        if _checks.depth and not torch.compiler.is_compiling():
            return _checked_call(self, super().__call__, args, kwargs)
        return super().__call__(*args, **kwargs)

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a node of a symbolic call and return its outputs in the form ``forward`` returns them."""
        declared = self.declared()
        return self.returned(bind_call(self, declared.order, declared.options, args, kwargs).outputs())

    def returned(self, outputs: dict[str, Any]) -> Any:
        """Outputs by name in the form ``forward`` returns them: a record, else the only one, else by name (a graph)."""
        record = self.declared().record
        if record is not None:
            return record(**outputs)
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def by_name(self, returned: Any) -> dict[str, Any]:
        """What ``forward`` returned, by the names of the output ports."""
        if self.declared().record is not None:
            return dict(returned._asdict())
        ports = self.output_ports
        return dict(returned) if len(ports) > 1 else dict.fromkeys(ports, returned)

    def declare_axes(self, **axes: str) -> None:
        """Declare the axes of this module's own parameters, such as ``weight="(H K) D"``.

        Raises:
            DeclarationError: when a known size contradicts the parameter's shape.
        """
        for name, text in axes.items():
            where = f"{type(self).__name__}.{name}"
            dims = tuple(
                tuple(bind_axis(f, self.bindings) if isinstance(f, Axis) and f.size is None else f for f in dim)
                for dim in parse_dims(text)
            )
            parameter = getattr(self, name)
            if parameter is None:
                continue
            shape = tuple(parameter.shape)
            sizes = [[f if isinstance(f, int) else f.size for f in dim] for dim in dims]
            fits = len(dims) == len(shape) and all(
                None in known or prod(s for s in known if s) == size for known, size in zip(sizes, shape)
            )
            if not fits:
                raise DeclarationError(
                    "the declared axes contradict the parameter",
                    where=where,
                    expected=format_dims(dims),
                    found=f"shape {shape}",
                )
            self.parameter_dims[name] = dims

    def config(self, refs: Mapping[int, str] | None = None) -> dict[str, Any]:
        """The arguments this module was built with, as plain data from which ``nemolet.build`` rebuilds it.

        What was not given is written with its default, so that the module stays the same when a default changes. A
        default that is no plain data is left to the class.

        Args:
            refs: names of modules (by ``id``) that are written elsewhere and only referred to here.

        Raises:
            DeclarationError: for an argument that is no plain data, or has no name.
        """
        args, kwargs = self.__dict__["_init_arguments"]
        try:
            bound = inspect.signature(type(self).__init__).bind(self, *args, **kwargs)
        except TypeError as error:
            raise DeclarationError(
                "the arguments of this module are unknown", where=self.label, found=str(error)
            ) from error
        given = set(bound.arguments)
        bound.apply_defaults()
        tree: dict[str, Any] = {"_target_": f"{type(self).__module__}.{type(self).__qualname__}"}
        for name, value in list(bound.arguments.items())[1:]:
            where, kind = f"{type(self).__name__}.{name}", bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                tree |= {key: _plain(item, f"{where}.{key}", refs or {}) for key, item in value.items()}
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                _refuse_nameless(value, where)
            elif name in given or _is_plain(value):
                tree[name] = _plain(value, where, refs or {})
        return tree


def _refuse_nameless(values: tuple[Any, ...], where: str) -> None:
    if values:
        raise DeclarationError(
            "arguments without names cannot be written to a config",
            where=where,
            found=f"{len(values)} of them",
            fix="take them as one list",
        )


def _setting(field: str) -> str:
    """A field as configs name it: ``from_`` is ``from`` there."""
    return field.removesuffix("_") if keyword.iskeyword(field.removesuffix("_")) else field


def _is_plain(value: Any) -> bool:
    try:
        _plain(value, "", {})
    except DeclarationError:
        return False
    return True


def _is_of_wiring(value: Any, module: NeuralModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a value is a symbol or holds one.

    Raises:
        WiringError: for a module where a tensor or a symbol is meant.
    """
    if isinstance(value, nn.Module):
        declared = module.declared()
        for name, given in (dict(zip(declared.order, args)) | kwargs).items():
            if name in declared.inputs and isinstance(given, nn.Module):
                kind = type(given).__name__
                raise WiringError(
                    "a module was passed where what it returns is meant",
                    where=f"{module.label}.{name}",
                    expected=f"a tensor or a symbol of type {module.input_ports[name].type}",
                    found=f"the module {kind}",
                    fix=f"call it: {name}={_snake(kind)}(...)",
                )
    return holds_symbol(value)


class _NotBegun(dict[str, Any]):
    """What a module holds until ``super().__init__()`` has run: nothing, and nothing can be put into it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __setitem__(self, name: str, value: object) -> None:
        raise _not_begun(self.kind, f"{name} = {type(value).__name__}(...) before it")


class _AfterBegun:
    """An attribute that ``super().__init__()`` sets."""

    def __get__(self, module: NeuralModule | None, kind: type) -> Any:
        if module is None:
            return self
        raise _not_begun(kind.__name__, "no such call")


def _not_begun(kind: str, found: str) -> DeclarationError:
    return DeclarationError(
        "super().__init__() has not run",
        where=f"{kind}.__init__",
        expected="super().__init__() before anything else",
        found=found,
        fix="begin __init__ with super().__init__(), or super().__init__(D=width) to bind sizes",
    )


_KEPT = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")  # where torch keeps what a module has
for _name in ("bindings", "parameter_dims", "label"):
    setattr(NeuralModule, _name, _AfterBegun())


def _plain(value: Any, where: str, refs: Mapping[int, str]) -> Any:
    """Turn a constructor argument into plain data, or say which one cannot be."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, NeuralModule):
        return {"_ref_": refs[id(value)]} if id(value) in refs else value.config(refs)
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, refs) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        held = {f: getattr(value, f.name) for f in fields(value) if f.init}
        kept = {_setting(f.name): item for f, item in held.items() if item is not f.default or _is_plain(item)}
        return {name: _plain(item, f"{where}.{name}", refs) for name, item in kept.items()}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}.{key}", refs) for key, item in value.items()}
    raise DeclarationError(
        "this argument cannot be written to a config",
        where=where,
        found=type(value).__name__,
        expected="numbers, strings, lists, dictionaries by strings, dataclasses of these, or typed modules",
        fix="pass the plain values from which the module can build the object itself",
    )


def parameter_axes(module: nn.Module) -> dict[str, tuple[Dim, ...]]:
    """The declared axes of every parameter, by its full name.

    Raises:
        DeclarationError: for parameters without declared axes, all named at once.
    """
    declared: dict[str, tuple[Dim, ...]] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, NeuralModule):
            declared |= {f"{prefix}.{k}" if prefix else k: dims for k, dims in child.parameter_dims.items()}
    missing = [name for name, _ in module.named_parameters() if name not in declared]
    if missing:
        raise DeclarationError(
            "parameters without declared axes",
            where=type(module).__name__,
            found=", ".join(missing),
            fix='call self.declare_axes(weight="F D") where they are made',
        )
    return {name: declared[name] for name, _ in module.named_parameters()}


def first_names(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor once: a tied weight is stored under its first name."""
    known: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            known[id(tensor)] = name
            tensors[name] = tensor.detach()
    return tensors


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


# --------------------------------------------------------------------------------------------------
# Run-time checks, on demand
# --------------------------------------------------------------------------------------------------


class _Checks:
    """How many ``checked()`` blocks are open; a plain attribute, so an unchecked call pays one look."""

    depth = 0


_checks = _Checks()


@contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """Compare real tensors with the declared types at every module call inside the block.

    Blocks nest: leaving an inner block restores the outer one, whatever each said.

    Example:
        >>> with checked():
        ...     pass
    """
    before, _checks.depth = _checks.depth, _checks.depth + 1 if enabled else 0
    try:
        yield
    finally:
        _checks.depth = before


def _checked_call(module: NeuralModule, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    declared = module.declared()
    sizes: dict[str, tuple[int, str]] = {}
    for name, value in {**dict(zip(declared.order, args)), **kwargs}.items():
        port = module.input_ports.get(name)
        if port is not None and value is not None:
            _check_value(port.type, value, f"{module.label}.{name}", sizes)
    result = call(*args, **kwargs)
    values = module.by_name(result)
    for name, port in module.output_ports.items():
        if values.get(name) is not None:
            _check_value(port.type, values[name], f"{module.label}.{name}", sizes)
    return result


def _check_value(declared: PortType, value: Any, where: str, sizes: dict[str, tuple[int, str]]) -> None:
    if isinstance(declared, NeuralType):
        check_tensor(declared, value, where, sizes)
        return
    items = value.values() if isinstance(value, dict) else value
    kind = dict if isinstance(declared, DictOf) else (list, tuple)
    if not isinstance(value, kind) or (isinstance(declared, ListOf) and declared.size not in (None, len(value))):
        raise ShapeError(
            "the container differs from its declaration", where=where, expected=declared, found=type(value)
        )
    for item in items:
        _check_value(declared.item, item, where, sizes)


def check_tensor(declared: NeuralType, value: Any, where: str, sizes: dict[str, tuple[int, str]]) -> None:
    """Compare one tensor with its declared type; ``sizes`` remembers what each letter was, and where.

    Raises:
        ShapeError: naming the port, the axis and both sizes.
    """
    if not isinstance(value, Tensor):
        raise ShapeError("not a tensor", where=where, expected=declared, found=type(value).__name__)
    axes, shape = declared.axes, tuple(value.shape)
    if axes and axes[0].letter == REST:
        lead = len(shape) - len(axes) + 1
        axes, shape = axes[1:], shape[lead:] if lead >= 0 else shape
    if len(axes) != len(shape):
        raise ShapeError(
            "the tensor has another rank", where=where, expected=declared, found=f"shape {tuple(value.shape)}"
        )
    for axis, size in zip(axes, shape):
        known = (axis.size, "its declaration") if axis.size is not None else sizes.get(axis.letter)
        if known is not None and known[0] != size:
            raise ShapeError(
                f"axis {axis.letter} has another size",
                where=where,
                expected=f"{axis.letter}={known[0]} by {known[1]}",
                found=f"shape {tuple(value.shape)}",
            )
        if axis.size is None and axis.letter != ANY:
            sizes.setdefault(axis.letter, (size, where))


__all__ = ["NeuralModule", "check_tensor", "checked", "first_names", "parameter_axes"]
