"""The ways in which a layer can be cut, recognised by nothing but its declared axes and ports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from torch import nn

from nemolet.errors import ParallelError
from nemolet.module import NeuralModule
from nemolet.parallel.mesh import MeshSizes
from nemolet.parallel.rules import Rules
from nemolet.types import LEGEND, REST, Axis, Dim, Hidden, Index, NeuralType, format_dims

Override = Literal["replicate", "column", "row"]
_SETTING = {"H": "model.heads", "G": "model.kv_heads", "F": "model.ffn_width", "E": "model.experts.number"}


class Pattern(Enum):
    """How one layer is cut over tp."""

    WHOLE = "whole"  # every rank holds all of it
    COLUMN = "column"  # its outputs are cut
    ROW = "row"  # its inputs are cut, its outputs are partial sums
    LOOKUP = "lookup"  # a table of vectors, cut along its rows
    HEAD = "head"  # scores of a vocabulary that is cut
    BETWEEN = "between"  # acts on activations that are cut
    EXPERTS = "experts"  # cut by expert, or inside each


@dataclass(frozen=True)
class Layer:
    """A module with parameters of its own, and how it is cut.

    ``shards`` says for each parameter on which dim each mesh axis cuts it; ``letter`` is what tp cuts.
    """

    name: str
    module: nn.Module
    pattern: Pattern
    shards: Mapping[str, Mapping[str, int]]
    letter: str = ""
    few_heads: bool = False  # fewer key/value heads than tp: whole, of which each rank computes its share

    @property
    def kind(self) -> str:
        """What kind of axis tp cuts: columns and rows of one kind belong together."""
        return LEGEND[self.letter][0] if self.letter else ""

    @property
    def minor(self) -> set[str]:
        """Letters that stay whole inside a cut dim, such as the head size."""
        dims = self.module.parameter_dims.values() if isinstance(self.module, NeuralModule) else ()
        return {f.letter for param in dims for dim in param for f in dim[1:] if isinstance(f, Axis)}

    @property
    def letters(self) -> set[str]:
        """All letters of its parameters."""
        dims = self.module.parameter_dims.values() if isinstance(self.module, NeuralModule) else ()
        return {f.letter for param in dims for dim in param for f in dim if isinstance(f, Axis)}


def layer_of(
    name: str, module: nn.Module, rules: Rules, sizes: MeshSizes, forced: Override | None, kv_heads: str
) -> Layer:
    """Recognise how a module with parameters is cut.

    Raises:
        ParallelError: for parameters without declared axes, sizes that do not divide, or axes that fit no pattern.
    """
    own = [key for key, parameter in module.named_parameters(recurse=False)]
    if sizes.tp == sizes.ep == 1 or forced == "replicate":
        return Layer(name, module, Pattern.WHOLE, {key: {} for key in own})
    if not isinstance(module, NeuralModule) or any(key not in module.parameter_dims for key in own):
        raise ParallelError(
            "a layer without declared axes cannot be sharded",
            where=name,
            expected="declared axes for each parameter",
            found=f"{type(module).__name__} with {', '.join(own)}",
            fix=f'call self.declare_axes({own[0]}="F D") where it is made, or set '
            f"parallel.overrides={{{name}: replicate}}",
        )
    dims = {key: module.parameter_dims[key] for key in own}
    shards = {key: _shards(f"{name}.{key}", each, rules, sizes) for key, each in dims.items()}
    if any("E" in _majors(each) for each in dims.values()):
        return _experts(name, module, dims, shards, sizes)
    if forced is not None:
        return _forced(name, module, dims, forced, sizes.tp)
    cut = {_majors(dims[key])[axes["tp"]] for key, axes in shards.items() if "tp" in axes}
    if not cut:
        return Layer(name, module, Pattern.WHOLE, {key: {} for key in own})
    letter, weight = cut.copy().pop(), max(own, key=lambda key: len(dims[key]))
    roles = _roles(module, dims[weight], shards[weight].get("tp")) if len(cut) == 1 else set()
    if len(roles) != 1:
        raise ParallelError(
            "these axes fit no way to cut a layer",
            where=name,
            expected="a weight with one axis on tp, which is the last axis of one port",
            found=", ".join(f"{key}: {format_dims(each)}" for key, each in dims.items()),
            fix=f"build it of Linear, Embedding and Head, or set parallel.overrides={{{name}: replicate}} "
            "(or column, or row)",
        )
    few = _check_sizes(name, dims, shards, sizes.tp, kv_heads)
    layer = Layer(name, module, roles.pop(), shards, letter)
    if few:
        return Layer(name, module, layer.pattern, {key: {} for key in own}, letter, few_heads=True)
    return layer


def _majors(dims: tuple[Dim, ...]) -> list[str]:
    """The letter of the major factor of each dim: the only one that can be cut."""
    return [dim[0].letter if isinstance(dim[0], Axis) else "" for dim in dims]


def _shards(name: str, dims: tuple[Dim, ...], rules: Rules, sizes: MeshSizes) -> dict[str, int]:
    """On which dim each mesh axis of more than one rank cuts a parameter."""
    majors = _majors(dims)
    for dim in dims:
        for factor in dim[1:]:
            if isinstance(factor, Axis) and {"tp", "ep"} & set(rules.parameters.get(factor.letter, ())):
                raise ParallelError(
                    f"only the major factor of a dim can be cut, and {factor.letter} is not",
                    where=name,
                    expected=f"({factor.letter} ...)",
                    found=format_dims(dims),
                    fix=f"lay the rows out with {factor.letter} outermost, or keep the factors in weights of their own",
                )
    found = rules.axes_of(majors, name)
    live = {axis: dim for dim, axes in found.items() for axis in axes if axis in ("tp", "ep") and sizes.of(axis) > 1}
    if majors and "E" in majors and sizes.ep > 1:  # tp is one of the axes that experts are spread over
        live.pop("tp", None)
    return live


def _roles(module: NeuralModule, dims: tuple[Dim, ...], dim: int | None) -> set[Pattern]:
    """Where the cut dim of a weight meets the ports."""
    if dim is None:
        return set()
    reads, writes = _last_axes(module.input_ports), _last_axes(module.output_ports)
    letter = _majors(dims)[dim]
    flat = len(dims[dim]) > 1  # a composite dim is one flat axis at the port
    seen = {("I" if flat else letter) in reads, ("O" if flat else letter) in writes}
    if len(dims) == 1:
        return {Pattern.BETWEEN} if seen == {True} else set()
    roles = set()
    if letter in _vocabularies(module):
        roles.add(Pattern.LOOKUP)
    if ("O" if flat else letter) in writes:
        roles.add(Pattern.HEAD if LEGEND[letter][0] == "vocabulary" else Pattern.COLUMN)
    if ("I" if flat else letter) in reads:
        roles.add(Pattern.ROW)
    if not roles and letter in _axes(module.output_ports):
        roles.add(Pattern.BETWEEN)  # it makes something for each of what is cut, such as a bias of each head
    return roles


def _last_axes(ports: Mapping[str, object]) -> set[str]:
    types = [getattr(port, "type", None) for port in ports.values()]
    return {t.axes[-1].letter for t in types if isinstance(t, NeuralType) and t.axes}


def _axes(ports: Mapping[str, object]) -> set[str]:
    types = [getattr(port, "type", None) for port in ports.values()]
    return {axis.letter for t in types if isinstance(t, NeuralType) for axis in t.axes}


def _vocabularies(module: NeuralModule) -> set[str]:
    """Letters of the vocabularies whose ids a module reads."""
    found = set()
    for port in module.declared().inputs.values():
        letter = getattr(port.type.element, "vocab", None) if isinstance(port.type, NeuralType) else None
        if isinstance(letter, str):
            bound = module.bindings.get(letter)
            found.add(bound.letter if isinstance(bound, Axis) else letter)
    return found


def _check_sizes(
    name: str,
    dims: Mapping[str, tuple[Dim, ...]],
    shards: Mapping[str, Mapping[str, int]],
    tp: int,
    kv_heads: str,
) -> bool:
    """Refuse what does not divide; True where key/value heads are fewer than tp, and that is allowed."""
    for key, axes in shards.items():
        if "tp" not in axes:
            continue
        axis = dims[key][axes["tp"]][0]
        assert isinstance(axis, Axis)
        if axis.kind == "vocabulary":  # parts of a vocabulary need not be equal
            _check_rows(f"{name}.{key}", axis, tp)
            continue
        if axis.size is None:
            raise ParallelError(
                f"nobody says how large {axis.letter} is",
                where=f"{name}.{key}",
                expected="a size for each factor, as in (H=4 K=16)",
                found=format_dims(dims[key]),
                fix="write the sizes where the axes are declared",
            )
        if axis.size % tp == 0:
            continue
        if axis.letter == "G" and tp % axis.size == 0 and kv_heads == "replicate":
            return True
        few = axis.letter == "G" and tp % axis.size == 0
        setting = _SETTING.get(axis.letter, f"the size of {axis.letter}")
        raise ParallelError(
            "there are fewer key/value heads than ranks of tp" if few else f"tp does not divide {axis.letter}",
            where=f"{name}.{key}",
            expected=f"{axis.letter} a multiple of parallel.tp={tp}",
            found=f"{axis.letter}={axis.size}",
            fix=(f"set parallel.kv_heads=replicate, or parallel.tp={axis.size}" if few else f"change {setting}")
            + ("" if few else f", or set parallel.tp to a divisor of {axis.size}"),
        )
    return False


def _check_rows(name: str, axis: Axis, tp: int) -> None:
    rows = axis.size or tp
    if -(-rows // tp) * (tp - 1) >= rows:
        raise ParallelError(
            "a rank would have nothing of the vocabulary",
            where=name,
            expected=f"rows for each of {tp} ranks",
            found=f"{axis.letter}={rows}, of which {tp - 1} ranks take {-(-rows // tp)} each",
            fix=f"set model.pad_vocab_to={tp}, or parallel.rules.parameters.{axis.letter}=[]",
        )


def _forced(name: str, module: NeuralModule, dims: Mapping[str, tuple[Dim, ...]], forced: str, tp: int) -> Layer:
    """A weight whose axes leave open how it is cut, and a config that says it."""
    weight = max(dims, key=lambda key: len(dims[key]))
    dim = 0 if forced == "column" else 1
    size = module.get_parameter(weight).shape
    if len(dims[weight]) != 2 or size[dim] % tp:
        raise ParallelError(
            f"this layer cannot be cut as a {forced}",
            where=name,
            expected=f"a weight of two dims, of which dim {dim} is a multiple of {tp}",
            found=f"{format_dims(dims[weight])}, shape {tuple(size)}",
            fix=f"take {name} out of parallel.overrides",
        )
    cut = {weight: {"tp": dim}}
    if forced == "column":
        cut |= {key: {"tp": 0} for key in dims if key != weight}
    shards = {key: cut.get(key, {}) for key in dims}
    return Layer(name, module, Pattern(forced), shards, _majors(dims[weight])[dim])


def _experts(
    name: str,
    module: NeuralModule,
    dims: Mapping[str, tuple[Dim, ...]],
    shards: Mapping[str, Mapping[str, int]],
    sizes: MeshSizes,
) -> Layer:
    for key, axes in shards.items():
        for mesh_axis, dim in axes.items():
            axis = dims[key][dim][0]
            assert isinstance(axis, Axis)
            size = axis.size or module.get_parameter(key).shape[dim]
            if size % sizes.of(mesh_axis):
                raise ParallelError(
                    f"{mesh_axis} does not divide {axis.letter}",
                    where=f"{name}.{key}",
                    expected=f"{axis.letter} a multiple of parallel.{mesh_axis}={sizes.of(mesh_axis)}",
                    found=f"{axis.letter}={size}",
                    fix=f"change {_SETTING.get(axis.letter, axis.letter)}, or parallel.{mesh_axis}",
                )
    letter = "F" if any("tp" in axes for axes in shards.values()) else ""
    return Layer(name, module, Pattern.EXPERTS, shards, letter)


def by_position(module: nn.Module) -> bool:
    """Whether a module says, by ports such as ``... D``, that it looks at every position alone."""
    if not isinstance(module, NeuralModule) or module.signature is None:
        return False
    ports = [*module.declared().inputs.values(), *module.declared().outputs.values()]
    types = [port.type for port in ports if isinstance(port.type, NeuralType)]
    return bool(types) and all(t.axes and t.axes[0].letter == REST for t in types)


def carries_sequence(module: nn.Module) -> bool:
    """Whether hidden states of a sequence enter and leave a module, as through a block of a stack."""
    if not isinstance(module, NeuralModule):
        return False
    return bool(sequence_ports(module.input_ports)) and bool(sequence_ports(module.output_ports))


def sequence_ports(ports: Mapping[str, object]) -> list[str]:
    """Names of the ports through which hidden states of a sequence flow."""
    types = {name: getattr(port, "type", None) for name, port in ports.items()}
    return [
        name
        for name, t in types.items()
        if isinstance(t, NeuralType)
        and isinstance(t.element, Hidden)
        and not isinstance(t.element, Index)
        and any(axis.letter == "T" for axis in t.axes)
    ]
