"""Tensor parallelism: modules that compute on parts, as a plan says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from nemolet.language.losses import CrossEntropy
from nemolet.module import NeuralModule
from nemolet.parallel.boundaries import cross, join_uneven, part_size, sum_gradient
from nemolet.parallel.heads import attention_of, shared_rows
from nemolet.parallel.layout import Boundary, ModulePlan
from nemolet.parallel.mesh import Mesh
from nemolet.parallel.patterns import Pattern, sequence_ports
from nemolet.parallel.plan import ParameterPlan, Plan
from nemolet.parallel.vocabulary import look_up, token_loss
from nemolet.types import NeuralType

View = Callable[[Tensor], Tensor | None]


def own_part(whole: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """The part of a tensor that this rank holds; the last part may be smaller."""
    size = -(-whole.shape[dim] // mesh.size())
    start = min(mesh.get_local_rank() * size, whole.shape[dim])
    return whole.narrow(dim, start, min(size, whole.shape[dim] - start))


def cut(whole: Tensor, placed: ParameterPlan, mesh: Mesh, device: torch.device) -> nn.Parameter:
    """A parameter of which this rank holds its part over tp or ep."""
    axis = "ep" if placed.expert else "tp"
    if mesh.sizes.of(axis) == 1:
        return nn.Parameter(whole.to(device))
    view = mesh.axis(axis)
    dim = placed.shards.get(axis)
    placement: Placement = Replicate() if dim is None else Shard(dim)
    part = whole if dim is None else own_part(whole, dim, view)
    local = part.detach().to(device).clone(memory_format=torch.contiguous_format)
    stride = torch.empty(placed.shape, device="meta").stride()
    return nn.Parameter(
        DTensor.from_local(local, view, [placement], run_check=False, shape=torch.Size(placed.shape), stride=stride)
    )


def compute_on_parts(graph: nn.Module, plan: Plan, mesh: Mesh) -> None:
    """Let each module compute on its parts, and take activations over its boundary."""
    modules = dict(graph.named_modules())
    heads = [n for n, p in plan.modules.items() if p.pattern is Pattern.HEAD]
    rows = [modules[n].get_parameter("weight").shape[0] for n in heads]
    for name, planned in plan.modules.items():
        module = modules[name]
        if planned.apart:
            _part_loss(module, rows[0], mesh.axis("tp").get_group())
        elif planned.few_heads:
            attention = attention_of(name, modules)
            shared = shared_rows(attention, mesh.rank_of("tp"), mesh.sizes.tp)
            attention.queries_per_group = attention.heads // mesh.sizes.tp
            _wrap(module, planned, mesh, shared)
        else:
            _wrap(module, planned, mesh)


def _wrap(module: nn.Module, planned: ModulePlan, mesh: Mesh, shared: Tensor | None = None) -> None:
    """Put the boundary around a module's ``forward``, and parts in the place of its parameters while it runs."""
    group = mesh.axis("tp").get_group()
    inner = module.forward
    views = _views(module, planned, mesh)
    if shared is not None:
        views = {key: partial(_chosen_rows, rows=shared, group=group) for key in views}
    enters, leaves = _cut_dims(module, planned)
    late = "bias" if planned.pattern is Pattern.ROW and getattr(module, "bias", None) is not None else None
    compute = _lookup_of(module, inner, group) if planned.pattern is Pattern.LOOKUP else inner
    size = _scores(module) if planned.leave is Boundary.JOIN_SCORES else 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        if enters:
            args, kwargs = _map_ports(args, kwargs, enters, partial(_enter, planned.enter, group))
        if not views:
            out = compute(*args, **kwargs)
        else:
            whole = dict(module._parameters)
            for key, view in views.items():
                module._parameters[key] = view(whole[key])  # type: ignore[assignment, arg-type]
            try:
                out = compute(*args, **kwargs)
            finally:
                module._parameters.update(whole)
        if planned.leave is Boundary.JOIN_SCORES:
            return join_uneven(out, size, group)
        out = cross(out, planned.leave, leaves, group)
        return out if late is None else out + _whole_part(module._parameters[late], late in planned.summed, group)

    module.forward = forward  # type: ignore[method-assign]


def _enter(boundary: Boundary, group: dist.ProcessGroup, tensor: Tensor, dim: int) -> Tensor:
    return cross(tensor, boundary, dim, group)


def _cut_dims(module: nn.Module, planned: ModulePlan) -> tuple[dict[str | int, int], int]:
    """For each port that hidden states enter, by name and position, the dim of T; and that dim of the output."""
    if not isinstance(module, NeuralModule):
        return {}, 1
    declared = module.declared()
    names = sequence_ports(module.input_ports) or [
        name for name, port in module.input_ports.items() if isinstance(port.type, NeuralType)
    ][:1]
    enters: dict[str | int, int] = {}
    if planned.enter is not Boundary.KEEP:
        for name in names:
            enters[name] = enters[declared.order.index(name)] = _dim_of_time(module.input_ports[name].type)
    outputs = list(module.output_ports.values())
    return enters, _dim_of_time(outputs[0].type) if outputs else 1


def _dim_of_time(declared: Any) -> int:
    """Where T is; in ``... D`` it is the last of what the dots stand for."""
    letters = [axis.letter for axis in declared.axes] if isinstance(declared, NeuralType) else []
    return letters.index("T") - len(letters) if "T" in letters else -2


def _map_ports(
    args: tuple[Any, ...], kwargs: dict[str, Any], ports: Mapping[str | int, int], change: Callable[[Tensor, int], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    changed = tuple(change(a, ports[i]) if i in ports and a is not None else a for i, a in enumerate(args))
    named = {k: change(a, ports[k]) if k in ports and a is not None else a for k, a in kwargs.items()}
    return changed, named


# --------------------------------------------------------------------------------------------------
# Parameters while a module runs
# --------------------------------------------------------------------------------------------------


def _views(module: nn.Module, planned: ModulePlan, mesh: Mesh) -> dict[str, View]:
    """What stands in the place of each parameter while its module runs."""
    group = mesh.axis("tp").get_group()
    views: dict[str, View] = {}
    for key, parameter in module.named_parameters(recurse=False):
        views[key] = partial(_whole_part, summed=key in planned.summed, group=group)
    if planned.pattern is Pattern.ROW and "bias" in views:
        views["bias"] = _nothing  # added once, after the sum
    if planned.pattern is Pattern.HEAD:
        rows, valid = module.get_parameter("weight").shape[0], _scores(module)
        first = part_size(rows, group) * dist.get_rank(group)
        count = max(0, min(part_size(rows, group), rows - first, valid - first))
        views["weight"] = partial(_first_rows, count=count)
    return views


def _nothing(parameter: Tensor) -> None:
    return None


def _whole_part(parameter: Tensor | None, summed: bool, group: dist.ProcessGroup) -> Tensor:
    assert parameter is not None
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return sum_gradient(local, group) if summed else local


def _first_rows(parameter: Tensor, count: int) -> Tensor:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local[:count]


def _chosen_rows(parameter: Tensor, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _whole_part(parameter, True, group).index_select(0, rows.to(parameter.device))


def _scores(module: nn.Module) -> int:
    """How many scores a head gives, which may be fewer than its padded weight has rows."""
    assert isinstance(module, NeuralModule)
    axis = next(p.type.axes[-1] for p in module.output_ports.values() if isinstance(p.type, NeuralType))
    return axis.size or module.get_parameter("weight").shape[0]


def _lookup_of(module: nn.Module, inner: Callable[..., Tensor], group: dist.ProcessGroup) -> Callable[..., Tensor]:
    rows = module.get_parameter("weight").shape[0]
    part = part_size(rows, group)
    start = part * dist.get_rank(group)

    def compute(*args: Tensor, **kwargs: Tensor) -> Tensor:
        (tokens,) = (*args, *kwargs.values())
        return look_up(inner, tokens, start, min(part, rows - start))

    return compute


def _part_loss(module: nn.Module, rows: int, group: dist.ProcessGroup) -> None:
    assert isinstance(module, CrossEntropy)
    options = {"smoothing": module.label_smoothing, "z_loss": module.z_loss}
    start = part_size(rows, group) * dist.get_rank(group)
    module.forward = lambda logits, labels: token_loss(  # type: ignore[method-assign]
        logits, labels, start=start, group=group, **options
    )
