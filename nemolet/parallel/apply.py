"""Apply a plan: tensor parallelism, activation checkpointing, compilation, data parallelism, in this order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed._composable.replicate import DDP, replicate
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from nemolet.errors import ParallelError
from nemolet.parallel.context import ContextAttention, spread_context
from nemolet.parallel.deferred import Deferred
from nemolet.parallel.experts import spread_experts
from nemolet.parallel.mesh import Mesh
from nemolet.parallel.plan import Plan
from nemolet.parallel.recompute import recompute
from nemolet.parallel.ring import RingAttention
from nemolet.parallel.tensor import compute_on_parts, cut

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    graph: Model,
    plan: Plan,
    mesh: Mesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard: bool | None = None,
    cpu_offload: bool = False,
    checkpointing: str = "none",
    compile: bool = False,
    cp_attention: Literal["gather", "ring"] = "gather",
    deferred: Deferred | None = None,
    device: torch.device | None = None,
) -> Model:
    """Spread a model over a mesh, in place.

    Afterwards its parameters are DTensors wherever ranks hold parts of them, under the names they had. Gradients
    are sums over all data-parallel ranks, not means: divide by what the loss is counted by.

    Args:
        graph: the model, or the graph that is trained, with the same values on all ranks; or without values, on
            ``meta``.
        plan: of this graph, for the sizes of this mesh.
        mesh: the ranks.
        param_dtype: parameters while they are computed with; None for as they are stored.
        reduce_dtype: gradients while they are summed over ranks; None for as they are.
        reshard: whether parameters are freed between forward and backward; None for yes, unless there is a pipeline.
        cpu_offload: whether parameters, gradients and optimizer state live in the memory of the host.
        checkpointing: of the blocks; ``"none"``, ``"full"``, ``"every_n"`` or ``"selective"``.
        compile: whether each block is compiled.
        cp_attention: whether ranks that share a sequence gather its keys and values, or pass them on in a ring.
        deferred: what knows the values of a graph on ``meta``.
        device: where parameters go; None for where they are, or the device of this process.

    Returns:
        The same graph.

    Raises:
        ParallelError: for a plan of another mesh, values that nobody knows, or an option that this layout lacks.
    """
    if plan.sizes != mesh.sizes:
        raise ParallelError(
            "the plan was made for another mesh", where="parallelize", expected=mesh.sizes, found=plan.sizes
        )
    blocks = [graph.get_submodule(name) for stack in plan.stacks for name in stack]
    if plan.modules:
        compute_on_parts(graph, plan, mesh)
    spread_experts(graph, mesh)
    if mesh.sizes.cp > 1:
        spread_context(
            graph, mesh.axis("cp").get_group(), RingAttention if cp_attention == "ring" else ContextAttention
        )
    recompute(blocks, checkpointing)
    if compile:
        for block in blocks:
            block.compile()
    spread = _spreading(graph, plan, mesh, param_dtype, reduce_dtype, reshard, cpu_offload)
    _place(graph, plan, mesh, _values(graph, deferred), device or _device(mesh), spread)
    return graph


def gradient_sync(graph: nn.Module, on: bool) -> None:
    """Switch the sums of gradients over data-parallel ranks on or off, as for all but the last micro-batch."""
    for module in graph.modules():
        if isinstance(module, (FSDPModule, DDP)):
            module.set_requires_gradient_sync(on)


def _device(mesh: Mesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


# --------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------


def _values(graph: nn.Module, deferred: Deferred | None) -> Iterator[tuple[str, Tensor]]:
    """Whole values by name, of parameters and buffers, in an order in which they can be had."""
    if deferred is not None:
        yield from deferred.values(graph)
        return
    for name, tensor in (*graph.named_parameters(), *graph.named_buffers()):
        if tensor.is_meta:
            raise ParallelError(
                "a parameter has no value",
                where=name,
                expected="a value, or a record of how it is made",
                found="a tensor on meta",
                fix="build the model inside `with Deferred() as deferred:` and pass it on",
            )
        yield name, tensor.detach()


def _place(
    graph: nn.Module,
    plan: Plan,
    mesh: Mesh,
    values: Iterable[tuple[str, Tensor]],
    device: torch.device,
    spread: Callable[[str], None],
) -> None:
    """Put each value where it belongs, and spread a unit as soon as all its values are there."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in graph.modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, key))
    places = {name: owners[id(t)] for name, t in (*graph.named_parameters(), *graph.named_buffers())}
    frozen = {name for name, p in graph.named_parameters() if not p.requires_grad}
    missing = _by_unit(plan, places)
    waiting = list(missing)
    for name, value in values:
        for module, key in places[name]:
            if key in module._buffers:
                module._buffers[key] = value.to(device)
        if name in plan.parameters:
            parameter = cut(value, plan.parameters[name], mesh, device)
            parameter.requires_grad_(name not in frozen)
            for module, key in places[name]:
                module._parameters[key] = parameter
        for names in missing.values():
            names.discard(name)
        while waiting and (ready := next((unit for unit in waiting[:-1] if not missing[unit]), None)) is not None:
            waiting.remove(ready)
            spread(ready)
    for unit in waiting:  # the whole graph is the last of all
        spread(unit)


def _by_unit(plan: Plan, places: Iterable[str]) -> dict[str, set[str]]:
    """Which values each unit waits for: its own, and those of the units inside it, which come first."""
    return {unit: {name for name in places if not unit or name.startswith(f"{unit}.")} for unit in plan.units}


# --------------------------------------------------------------------------------------------------
# Data parallelism
# --------------------------------------------------------------------------------------------------


def _spreading(
    graph: nn.Module,
    plan: Plan,
    mesh: Mesh,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    reshard: bool | None,
    cpu_offload: bool,
) -> Callable[[str], None]:
    """What spreads one unit over the data-parallel ranks."""
    view = mesh.data_parallel
    if view is None or view.mesh_dim_names == ("dp_replicate",):
        wanted = {"param_dtype": param_dtype, "reduce_dtype": reduce_dtype, "cpu_offload": cpu_offload or None}
        if any(value is not None for value in wanted.values()):
            option = next(key for key, value in wanted.items() if value is not None)
            raise ParallelError(
                "this option needs sharded parameters",
                where=f"parallel.{option}",
                expected="dp_shard above 1",
                found=str(mesh.sizes),
                fix="set parallel.dp_shard, or trainer.precision=bf16-mixed for lower precision",
            )
        return partial(_copy, graph, mesh)
    options: dict[str, Any] = {
        "reshard_after_forward": reshard,
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy(),
    }
    return partial(_shard, graph, plan, mesh, options)


def _shard(graph: nn.Module, plan: Plan, mesh: Mesh, options: dict[str, Any], unit: str) -> None:
    """Shard what a unit's inner units have left over."""
    module = graph.get_submodule(unit)
    dims = {id(p): plan.parameters[name].shards for name, p in graph.named_parameters() if name in plan.parameters}
    expert = any("ep" in dims[id(p)] for p in module.parameters(recurse=False) if id(p) in dims)
    if options["reshard_after_forward"] is None:  # what is left over is needed again at once
        options = {**options, "reshard_after_forward": bool(unit) and mesh.sizes.pp == 1}
    axis, view = ("efsdp", mesh.expert_parallel) if expert else ("fsdp", mesh.data_parallel)
    fully_shard(
        module,
        mesh=view,
        shard_placement_fn=lambda parameter: Shard(dims[id(parameter)].get(axis, 0)),
        **options,
    )
    assert isinstance(module, FSDPModule)
    module.set_force_sum_reduction_for_comms(True)
    module.set_gradient_divide_factor(1.0)


def _copy(graph: nn.Module, mesh: Mesh, unit: str) -> None:
    """Copies of the whole graph, whose gradients are summed in buckets while the backward pass goes on."""
    if unit or mesh.data_parallel is None:
        return
    # Otherwise torch sorts the buckets anew after the first step, and a run that resumes sums in another order.
    replicate(graph, process_group=mesh.axis("dp_replicate").get_group(), find_unused_parameters=True)
    assert isinstance(graph, DDP)
    graph.register_comm_hook(mesh.axis("dp_replicate").get_group(), _sum_bucket)


def _sum_bucket(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    done: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return done


# torch looks at the annotations themselves, not at their text.
_sum_bucket.__annotations__.update({"bucket": GradBucket, "return": torch.futures.Future[Tensor]})
