"""How many bytes a layout takes on each rank, for a cluster that need not be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from nemolet.nn.attention import Attention, CrossAttention
from nemolet.nn.mask import AttentionMask
from nemolet.nn.moe import Experts, MixtureOfExperts
from nemolet.parallel.costs import balanced, layer_costs
from nemolet.parallel.layout import Boundary, ModulePlan
from nemolet.parallel.patterns import Pattern
from nemolet.parallel.plan import Plan
from nemolet.parallel.settings import Parallel

_WIDTH = {None: 4, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage, at most; ``numbers`` are parameters, not bytes."""

    layers: int
    numbers: int
    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

    @property
    def peak(self) -> int:
        """All together, in the backward pass."""
        return self.parameters + self.gradients + self.optimizer + self.gathered + self.activations


def memory(
    graph: nn.Module,
    plan: Plan,
    batch: Mapping[str, Tensor],
    *,
    parallel: Parallel | None = None,
    states: Mapping[str, int] | None = None,
) -> list[StageMemory]:
    """Bytes on a rank of each pipeline stage.

    Parameters, gradients and optimizer state are exact, in float32. ``gathered`` are two units of whole parameters
    and one of gradients. Activations are what the backward pass keeps of the micro-batches that a stage holds at
    once, counted on shapes alone and divided where the plan cuts them.

    Args:
        graph: the graph that is trained, on ``meta``.
        plan: of this graph.
        batch: one micro-batch of one data-parallel rank; its values do not matter.
        parallel: precision, checkpointing and pipeline.
        states: how many numbers the optimizer keeps for each whole parameter, by name, as
            :func:`nemolet.training.optim.states` finds; None for two for each number, as AdamW does.
    """
    parallel = parallel or Parallel()
    blocks, ranks = [name for stack in plan.stacks for name in stack], plan.sizes.pp
    counts = parallel.layers or _split(graph, plan, blocks, parallel)
    kept = saved_bytes(graph, plan, batch, _WIDTH[parallel.param_dtype])
    owner = _owners(plan, blocks, counts, ranks)
    found = []
    for rank in range(ranks):
        own = {n: p for n, p in plan.parameters.items() if owner[n] == rank}
        numbers = sum(p.local_size for p in own.values())
        kept_of = {n: 2 * p.size if states is None else states[n] for n, p in own.items()}
        inside = [block for block in blocks if owner[block] == rank]
        once = _kept_by(inside, kept, parallel.checkpointing)
        once += kept["first"] * (rank == 0) + kept["last"] * (rank == ranks - 1)
        again = max((kept[b] for b in inside), default=0) if parallel.checkpointing in ("full", "selective") else 0
        found.append(
            StageMemory(
                layers=len(inside),
                numbers=numbers,
                parameters=4 * numbers,
                gradients=4 * numbers,
                optimizer=sum(4 * -(-kept_of[n] * p.local_size // p.size) for n, p in own.items()),
                gathered=_gathered(plan, owner, rank, _WIDTH[parallel.param_dtype]),
                activations=_in_flight(parallel, ranks, rank) * once + again,
            )
        )
    return found


def _split(graph: nn.Module, plan: Plan, blocks: list[str], parallel: Parallel) -> list[int]:
    costs = {name: float(cost) for name, cost in layer_costs(graph, plan).items()}
    stages = plan.sizes.pp * (2 if parallel.schedule == "interleaved" and plan.sizes.pp > 1 else 1)
    return balanced([costs[block] for block in blocks], stages, first=costs["first"], last=costs["last"])


def _owners(plan: Plan, blocks: list[str], counts: list[int], ranks: int) -> dict[str, int]:
    """The pipeline rank of each block and parameter: what is looked up lies first, the rest last."""
    stages = [stage for stage, count in enumerate(counts) for _ in range(count)]
    found = {block: stage % ranks for block, stage in zip(blocks, stages)}
    for name in plan.parameters:
        words = name.split(".")
        block = next((".".join(words[:i]) for i in range(len(words)) if ".".join(words[:i]) in found), None)
        first = bool({"embed", "position"} & set(words))
        found[name] = found[block] if block is not None else 0 if first else ranks - 1
    return found


def _gathered(plan: Plan, owner: Mapping[str, int], rank: int, width: int) -> int:
    """Bytes of the largest unit of a rank, twice as parameters and once as gradients."""
    if plan.sizes.dp_shard * plan.sizes.cp == 1:
        return 0
    sizes = dict.fromkeys(plan.units, 0)
    inner = [unit for unit in plan.units if unit]
    for name, parameter in plan.parameters.items():
        if owner[name] == rank:
            unit = next((u for u in inner if name.startswith(f"{u}.")), "")
            cut = prod(plan.sizes.of(axis) for axis in parameter.shards if axis in ("tp", "ep"))
            sizes[unit] += parameter.size // cut
    return max(sizes.values()) * (2 * width + 4)


def _in_flight(parallel: Parallel, ranks: int, rank: int) -> int:
    """How many micro-batches a pipeline rank holds at once."""
    batches = parallel.microbatches or 2 * ranks
    if ranks == 1:
        return 1
    if parallel.schedule == "1f1b":
        return min(batches, ranks - rank)
    return batches if parallel.schedule == "gpipe" else min(batches, 2 * ranks - rank)


def _kept_by(blocks: list[str], kept: Mapping[str, int], checkpointing: str) -> int:
    every = {"none": 0, "full": 1, "selective": 1}.get(checkpointing, 0)
    if checkpointing.startswith("every_"):
        every = int(checkpointing[6:])
    return sum(kept["entry"] if every and index % every == 0 else kept[b] for index, b in enumerate(blocks))


# --------------------------------------------------------------------------------------------------
# Activations
# --------------------------------------------------------------------------------------------------


def saved_bytes(graph: nn.Module, plan: Plan, batch: Mapping[str, Tensor], width: int = 4) -> dict[str, int]:
    """Bytes that the backward pass keeps of one micro-batch on a rank, counted on shapes alone.

    Returns:
        By block; what comes before them as ``"first"``, after them as ``"last"``; what enters one as ``"entry"``.
    """
    blocks = {name for stack in plan.stacks for name in stack}
    found = {**dict.fromkeys(blocks, 0), "first": 0, "last": 0, "entry": 0}
    seen: dict[int, Tensor] = {}  # by memory; the tensors are kept, so that no address comes twice
    known = {p.untyped_storage()._cdata for p in graph.parameters()}
    path: list[str] = [""]
    tp = plan.sizes.tp

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage in known or storage in seen:
            return tensor
        seen[storage] = tensor
        block = next((name for name in path if name in blocks), None)
        place = block or ("last" if any(found[name] for name in blocks) else "first")
        size = width if tensor.is_floating_point() else tensor.element_size()
        found[place] += tensor.numel() * size // (tp if _is_cut(plan, path, block) else 1)
        return tensor

    def enter(name: str, args: tuple[Any, ...]) -> None:
        path.append(name)
        if name in blocks and args and isinstance(args[0], Tensor):
            found["entry"] = args[0].numel() * width // (tp if plan.rules.sequence else 1)

    short = {name: value.narrow(-1, 0, -(-value.shape[-1] // plan.sizes.cp)) for name, value in batch.items()}
    count = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _shapes_only(graph), _followed(graph, enter, path), torch.enable_grad(), count:
        graph(**short)
    return found


def _is_cut(plan: Plan, path: list[str], block: str | None) -> bool:
    """Whether tp cuts what the innermost module keeps."""
    if plan.sizes.tp == 1:
        return False
    here = plan.modules.get(path[-1], ModulePlan())
    if here.pattern in (Pattern.COLUMN, Pattern.HEAD):
        return False  # it keeps what enters, which is whole
    if here.apart or here.pattern in (Pattern.ROW, Pattern.EXPERTS, Pattern.BETWEEN):
        return True
    branches = (Boundary.GATHER, Boundary.COPY)
    within = any(plan.modules.get(name, ModulePlan()).enter in branches for name in path)
    return within or (block is not None and plan.rules.sequence)


@contextmanager
def _followed(graph: nn.Module, enter: Callable[[str, tuple[Any, ...]], None], path: list[str]) -> Iterator[None]:
    """Know which modules are running, by name."""
    with ExitStack() as hooks:
        for name, module in graph.named_modules():
            before = module.register_forward_pre_hook(lambda _, args, name=name: enter(name, args))
            after = module.register_forward_hook(lambda *_: path.pop() and None)
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        yield


@contextmanager
def _shapes_only(graph: nn.Module) -> Iterator[None]:
    """Replace what keeps other things on shapes alone than a device would: attention, and the choice of experts."""
    before: list[tuple[nn.Module, str, Any]] = []
    for module in graph.modules():
        if isinstance(module, (Attention, CrossAttention)):
            before.append((module, "core", module.core))
            module.core = _mix
        elif isinstance(module, MixtureOfExperts):
            before.append((module, "dispatch", module.dispatch))
            module.dispatch = _dispatch
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _mix(query_BTHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor, mask: AttentionMask, dropout: float) -> Tensor:
    mixed: Tensor = _Mix.apply(query_BTHK, key_BSGK, value_BSGK)
    return mixed


class _Mix(torch.autograd.Function):
    """Keeps what a fused kernel keeps: queries, keys, values and the result, but no scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _dispatch(hidden_ND: Tensor, chosen: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Every choice meets one expert, as if they were spread evenly."""
    rows = hidden_ND.repeat_interleave(chosen.shape[-1], 0)
    wide = experts.activate(rows @ experts.gate[0].T) * (rows @ experts.up[0].T)
    each: Tensor = (wide @ experts.down[0].T).unflatten(0, chosen.shape) * weights[..., None]
    return each.sum(1)


__all__ = ["StageMemory", "balanced", "layer_costs", "memory", "saved_bytes"]
