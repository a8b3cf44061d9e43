"""What ranks send to each other: a log of every collective, for debugging and for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from nemolet.parallel.mesh import AXES, EXPERT_AXES, Mesh

# What torch calls a collective, and which of its arguments is the larger side: what goes in, or what comes out.
_NAMES: dict[str, tuple[str, str]] = {
    "allreduce_": ("all-reduce", "in"),
    "all_reduce": ("all-reduce", "in"),
    "all_reduce_": ("all-reduce", "in"),
    "allreduce_coalesced_": ("all-reduce", "in"),
    "allgather_": ("all-gather", "out"),
    "_allgather_base_": ("all-gather", "out"),
    "all_gather_into_tensor": ("all-gather", "result"),
    "reduce_scatter_": ("reduce-scatter", "second"),
    "_reduce_scatter_base_": ("reduce-scatter", "second"),
    "reduce_scatter_tensor": ("reduce-scatter", "in"),
    "alltoall_base_": ("all-to-all", "second"),
    "alltoall_": ("all-to-all", "second"),
    "all_to_all_single": ("all-to-all", "in"),
    "broadcast_": ("broadcast", "in"),
    "broadcast": ("broadcast", "in"),
    "send": ("send", "in"),
    "recv_": ("receive", "in"),
    "gather_": ("gather", "second"),
    "scatter_": ("scatter", "second"),
    "reduce_": ("reduce", "in"),
    "barrier": ("barrier", "none"),
}
_SPACES = ("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd")


@dataclass(frozen=True)
class Collective:
    """One collective of this rank.

    Args:
        op: its name, as in textbooks.
        axis: of the mesh; ``"world"`` for all ranks, or the ranks themselves where no axis has just these.
        ranks: how many take part.
        bytes: of the whole tensor: what is reduced, or what is there once it is gathered.
        module: in which it happens; backward, too.
    """

    op: str
    axis: str
    ranks: int
    bytes: int
    module: str

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in a ring (Thakur et al., 2005)."""
        others = (self.ranks - 1) / self.ranks
        shares = {"all-reduce": 2 * others, "all-gather": others, "reduce-scatter": others, "all-to-all": others}
        return self.bytes * shares.get(self.op, 0.0 if self.op == "receive" else 1.0)


class CollectiveLog(TorchDispatchMode):
    """Write down every collective of this rank (final).

    It sees what goes through torch's dispatcher in the thread that opened it, backward passes included. Collectives of
    one rank alone are left out: nothing is sent.

    Args:
        mesh: gives the groups of ranks their names.

    Example:
        >>> with CollectiveLog() as log:
        ...     pass
        >>> log.collectives
        []
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self._names = {} if mesh is None else _axes_by_ranks(mesh)
        self._experts = mesh is not None and mesh.sizes.ep > 1
        self._tracker = ModuleTracker()

    def __enter__(self) -> CollectiveLog:
        self._tracker.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._tracker.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in _SPACES and func._opname in _NAMES:
            name, side = _NAMES[func._opname]
            group = _group(args)
            ranks = tuple(dist.get_process_group_ranks(group))
            if len(ranks) > 1:
                module = max(self._tracker.parents - {"Global"}, key=len, default="")
                self.collectives.append(
                    Collective(name, self._axis(name, ranks), len(ranks), _bytes(args, result, side), module)
                )
        return result

    def _axis(self, op: str, ranks: tuple[int, ...]) -> str:
        if op == "all-to-all" and self._experts:  # the same ranks may be an axis of parameters, too
            return "ep"
        if ranks in self._names:
            return self._names[ranks]
        return "world" if len(ranks) == dist.get_world_size() else str(list(ranks))

    def totals(self) -> dict[tuple[str, str], int]:
        """Bytes by collective and axis; what is received is counted where it was sent."""
        found: dict[tuple[str, str], int] = {}
        for each in self.collectives:
            if each.op not in ("receive", "barrier"):
                found[each.op, each.axis] = found.get((each.op, each.axis), 0) + each.bytes
        return found

    def table(self) -> str:
        """All collectives, those of one kind in one module together."""
        rows: dict[tuple[str, str, str], tuple[int, int]] = {}
        for each in self.collectives:
            key = (each.op, each.axis, each.module)
            number, size = rows.get(key, (0, 0))
            rows[key] = (number + 1, size + each.bytes)
        head = f"{'collective':<15} {'axis':<12} {'times':>5} {'bytes':>12}  module"
        lines = [f"{op:<15} {axis:<12} {n:>5} {size:>12,}  {module}" for (op, axis, module), (n, size) in rows.items()]
        return "\n".join([head, *lines])


def _axes_by_ranks(mesh: Mesh) -> dict[tuple[int, ...], str]:
    """Axes by the ranks that lie on them with this one; single axes before those that are several in one."""
    sizes = mesh.sizes
    wanted: list[tuple[str, ...]] = [(axis,) for axis in AXES if sizes.of(axis) > 1]
    if sizes.ep > 1:
        wanted += [(axis,) for axis in EXPERT_AXES if sizes.of(axis) > 1]
    if sizes.dp_shard > 1 and sizes.cp > 1:
        wanted.append(("dp_shard", "cp"))
    tokens = tuple(axis for axis in ("dp_replicate", "dp_shard", "cp") if sizes.of(axis) > 1)
    if len(tokens) > 1 and tokens not in wanted:
        wanted.append(("dp_replicate", "dp_shard", "cp"))
    found: dict[tuple[int, ...], str] = {}
    for axes in wanted:
        ranks = tuple(dist.get_process_group_ranks(mesh.axis(*axes).get_group()))
        found.setdefault(ranks, " x ".join(axes))
    return found


def _group(args: Any) -> dist.ProcessGroup:
    """The group of a collective: by its name, or itself, wrapped for the dispatcher."""
    for arg in reversed(args):
        if isinstance(arg, str):
            try:
                return dist.distributed_c10d._resolve_process_group(arg)  # type: ignore[attr-defined, arg-type]
            except (LookupError, RuntimeError, ValueError):
                continue  # another string, such as the kind of reduction
    for arg in args:
        if type(arg).__name__ == "ScriptObject" and "ProcessGroup" in arg._type().qualified_name():
            return dist.ProcessGroup.unbox(arg)
    return dist.group.WORLD  # type: ignore[return-value]


def _bytes(args: Any, result: Any, side: str) -> int:
    if side == "none":
        return 0
    if side == "result":
        chosen = result
    elif side == "second":
        chosen = args[1]
    else:
        chosen = args[0]
    return sum(t.numel() * t.element_size() for t in tree_leaves(chosen) if isinstance(t, Tensor))
