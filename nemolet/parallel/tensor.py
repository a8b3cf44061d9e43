"""Tensor parallelism: modules that compute on parts, as a plan says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from nemolet.language.losses import CrossEntropy
from nemolet.module import NeuralModule
from nemolet.nn.adapters import AdaptedLinear
from nemolet.parallel.boundaries import cross, join_uneven, part_size, sum_gradient
from nemolet.parallel.heads import attention_of, shared_rows
from nemolet.parallel.layout import Boundary, ModulePlan
from nemolet.parallel.mesh import Mesh
from nemolet.parallel.patterns import Pattern
from nemolet.parallel.plan import ParameterPlan, Plan
from nemolet.parallel.vocabulary import look_up, token_loss
from nemolet.types import REST, Hidden, Logits, NeuralType

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
            _part_loss(module, rows[0], _scores(modules[heads[0]]), mesh.axis("tp").get_group())
        elif planned.enter is Boundary.JOIN_SCORES:
            _join_first(module, rows[0], _scores(modules[heads[0]]), mesh.axis("tp").get_group())
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
        views |= {key: partial(_chosen_rows, rows=shared, group=group) for key in _with_rows(module)}
    if planned.pattern is Pattern.ROW and isinstance(module, AdaptedLinear):
        module.sum_parts = partial(_summed, group=group)
    enters = _crossings(module, planned.enter)
    leaves = _dim_of_time(next(iter(module.output_ports.values())).type) if isinstance(module, NeuralModule) else -2
    late = "bias" if planned.pattern is Pattern.ROW and getattr(module, "bias", None) is not None else None
    compute = _lookup_of(module, inner, group) if planned.pattern is Pattern.LOOKUP else inner
    joins = planned.leave in (Boundary.JOIN_SCORES, Boundary.SHOW_SCORES)
    part, size = (part_size(module.get_parameter("weight").shape[0], group), _scores(module)) if joins else (0, 0)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if enters:
            args = tuple(_enter(value, enters.get(place), group) for place, value in enumerate(args))
            kwargs = {name: _enter(value, enters.get(name), group) for name, value in kwargs.items()}
        if not views:
            out = compute(*args, **kwargs)
        else:
            parameters: dict[str, Any] = module._parameters
            whole = dict(parameters)
            for key, view in views.items():
                parameters[key] = view(whole[key])
            try:
                out = compute(*args, **kwargs)
            finally:
                parameters.update(whole)
        if joins and (planned.leave is Boundary.JOIN_SCORES or not torch.is_grad_enabled()):
            return join_uneven(out, part, size, group)
        out = out if joins else cross(out, planned.leave, leaves, group)
        return out if late is None else out + _whole_part(module._parameters[late], late in planned.summed, group)

    module.forward = forward


def _enter(value: Any, crossing: tuple[Boundary, int] | None, group: dist.ProcessGroup) -> Any:
    return value if crossing is None or value is None else cross(value, *crossing, group)


def _crossings(module: nn.Module, boundary: Boundary) -> dict[str | int, tuple[Boundary, int]]:
    """What happens at each port that hidden states enter, by name and by position, and along which dim.

    Hidden states without T, such as a memory, are never cut along the sequence: they are copied where T is gathered.
    """
    if not isinstance(module, NeuralModule) or boundary is Boundary.KEEP:
        return {}
    order = module.declared().order
    found: dict[str | int, tuple[Boundary, int]] = {}
    for name, port in module.input_ports.items():
        if not isinstance(port.type, NeuralType) or not isinstance(port.type.element, Hidden):
            continue
        timed = any(axis.letter in ("T", REST) for axis in port.type.axes)
        what = boundary if timed else Boundary.COPY if boundary in (Boundary.COPY, Boundary.GATHER) else Boundary.KEEP
        if what is not Boundary.KEEP:
            found[name] = found[order.index(name)] = (what, _dim_of_time(port.type))
    return found


def _dim_of_time(declared: Any) -> int:
    """Where T is; in ``... D`` it is the last of what the dots stand for."""
    letters = [axis.letter for axis in declared.axes] if isinstance(declared, NeuralType) else []
    return letters.index("T") - len(letters) if "T" in letters else -2


# --------------------------------------------------------------------------------------------------
# Parameters while a module runs
# --------------------------------------------------------------------------------------------------


def _views(module: nn.Module, planned: ModulePlan, mesh: Mesh) -> dict[str, View]:
    """What stands in the place of each parameter while its module runs."""
    group = mesh.axis("tp").get_group()
    views: dict[str, View] = {}
    for key, _ in module.named_parameters(recurse=False):
        views[key] = partial(_whole_part, summed=key in planned.summed, group=group)
    if planned.pattern is Pattern.ROW and "bias" in views:
        views["bias"] = _nothing  # added once, after the sum
    if planned.pattern is Pattern.HEAD:
        rows, valid = module.get_parameter("weight").shape[0], _scores(module)
        first = part_size(rows, group) * dist.get_rank(group)
        count = max(0, min(part_size(rows, group), rows - first, valid - first))
        views = dict.fromkeys(views, partial(_first_rows, count=count))
    return views


def _nothing(parameter: Tensor) -> None:
    return None


def _whole_part(parameter: Tensor | None, summed: bool, group: dist.ProcessGroup) -> Tensor:
    assert parameter is not None
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return sum_gradient(local, group) if summed else local


def _with_rows(module: nn.Module) -> list[str]:
    """Names of the parameters that have the rows of the weight: the weight, a bias, the outer half of an addition."""
    assert isinstance(module, NeuralModule)
    dims = module.parameter_dims
    return [key for key, _ in module.named_parameters(recurse=False) if dims[key][0] == dims["weight"][0]]


def _summed(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(part, group=group)
    return part


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


def _part_loss(module: nn.Module, rows: int, size: int, group: dist.ProcessGroup) -> None:
    """Let a loss add up over the ranks that hold the vocabulary, unless somebody wanted to see all scores."""
    assert isinstance(module, CrossEntropy)
    options = {"smoothing": module.label_smoothing, "z_loss": module.z_loss}
    start, whole = part_size(rows, group) * dist.get_rank(group), module.forward

    def forward(logits: Tensor, labels: Tensor) -> Any:
        if logits.shape[-1] == size:
            return whole(logits, labels)
        return token_loss(logits, labels, start=start, group=group, **options)

    module.__dict__["forward"] = forward


def _join_first(module: nn.Module, rows: int, size: int, group: dist.ProcessGroup) -> None:
    """Join the scores that a module looks at, where they come in parts."""
    assert isinstance(module, NeuralModule)
    inner, order, part = module.forward, module.declared().order, part_size(rows, group)
    scores = {n for n, p in module.input_ports.items() if isinstance(getattr(p.type, "element", None), Logits)}

    def joined(name: str, value: Any) -> Any:
        cut = name in scores and value is not None and value.shape[-1] != size
        return join_uneven(value, part, size, group) if cut else value

    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(**{name: joined(name, value) for name, value in (*zip(order, args), *kwargs.items())})

    module.__dict__["forward"] = forward


__all__ = ["compute_on_parts", "cut", "own_part"]
