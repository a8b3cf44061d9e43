"""The mesh of all ranks, with named axes, and the views that are cut from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemolet.errors import ParallelError, did_you_mean

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # slowest first: neighbours in a mesh differ in tp
EXPERT_AXES = ("efsdp", "ep")  # another view of dp_shard, cp and tp together


@dataclass(frozen=True)
class MeshSizes:
    """How many ranks each mesh axis has.

    Args:
        dp_replicate: copies of the parameters, each on other data.
        dp_shard: parts of the parameters, each rank on other data; -1 for what is left of the world.
        cp: parts of each sequence.
        tp: parts of each layer.
        pp: stages of layers.
        ep: parts of the experts, over the ranks of dp_shard, cp and tp together.

    Example:
        >>> MeshSizes(dp_shard=-1, tp=2).resolve(8)
        MeshSizes(dp_replicate=1, dp_shard=4, cp=1, tp=2, pp=1, ep=1)
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return prod(getattr(self, axis) for axis in AXES)

    @property
    def efsdp(self) -> int:
        """Over how many ranks the parameters of an expert are sharded."""
        return self.dp_shard * self.cp * self.tp // self.ep

    def of(self, axis: str) -> int:
        """The size of one axis, by name; also of the expert view."""
        size: int = getattr(self, axis)
        return size

    def resolve(self, world: int) -> MeshSizes:
        """Fill in what is left of the world, and check that all sizes multiply to it.

        Raises:
            ParallelError: naming the setting to change.
        """
        for axis in (*AXES, "ep"):
            size = self.of(axis)
            if size < 1 and not (size == -1 and axis in ("dp_replicate", "dp_shard")):
                raise ParallelError(
                    "a mesh axis has at least one rank",
                    where=f"parallel.{axis}",
                    expected="a positive number; dp_shard or dp_replicate may be -1",
                    found=size,
                )
        open_axes = [axis for axis in AXES if self.of(axis) == -1]
        known = prod(self.of(axis) for axis in AXES if self.of(axis) != -1)
        if len(open_axes) > 1 or (open_axes and world % known) or (not open_axes and known != world):
            start = known * max(1, round(world / known)) if open_axes else known
            raise ParallelError(
                "the mesh does not fill the world",
                where="parallel",
                expected=f"sizes that multiply to {world} ranks",
                found=" x ".join(f"{axis}={self.of(axis)}" for axis in AXES if self.of(axis) != 1) or "1",
                fix="set one of dp_shard and dp_replicate, not both, to -1"
                if len(open_axes) > 1
                else f"choose sizes that divide {world}, or start {start} ranks",
            )
        resolved = replace(self, **dict.fromkeys(open_axes, world // known)) if open_axes else self
        shared = resolved.dp_shard * resolved.cp * resolved.tp
        if shared % resolved.ep:
            raise ParallelError(
                "experts are spread over the ranks of dp_shard, cp and tp",
                where="parallel.ep",
                expected=f"a divisor of dp_shard x cp x tp = {shared}",
                found=resolved.ep,
                fix="change parallel.ep or parallel.dp_shard",
            )
        return resolved

    def __str__(self) -> str:
        return " x ".join(f"{axis} {self.of(axis)}" for axis in (*AXES, "ep") if self.of(axis) != 1) or "one rank"


class Mesh:
    """The ranks of a run on a grid with named axes (final; made by :func:`make_mesh`).

    Two views of the same axes are the same object, because torch compares meshes by identity.

    Args:
        sizes: resolved sizes.
        world: the grid of all ranks, with the axes of ``AXES``.
    """

    def __init__(self, sizes: MeshSizes, world: DeviceMesh) -> None:
        self.sizes, self.world = sizes, world
        self.device_type: str = world.device_type
        self._views: dict[tuple[str, ...], DeviceMesh] = {}

    def axis(self, *names: str) -> DeviceMesh:
        """The ranks that differ from this one in the named axes only, as one axis.

        Raises:
            ParallelError: for an unknown axis.
        """
        if names not in self._views:
            for name in names:
                if name not in (*AXES, *EXPERT_AXES):
                    raise ParallelError(
                        "there is no such mesh axis",
                        where=name,
                        expected=", ".join((*AXES, *EXPERT_AXES)),
                        found=name,
                        fix=did_you_mean(name, (*AXES, *EXPERT_AXES)),
                    )
            if set(names) & set(EXPERT_AXES):
                view = self._experts()[names[0] if len(names) == 1 else names]
            elif len(names) == 1:
                view = self.world[names[0]]
            else:
                view = self.world[names]._flatten("_".join(names))
            self._views[names] = view
        return self._views[names]

    def _experts(self) -> DeviceMesh:
        key = ("experts",)
        if key not in self._views:
            whole = self.axis("dp_shard", "cp", "tp")
            self._views[key] = whole._unflatten(0, (self.sizes.efsdp, self.sizes.ep), EXPERT_AXES)
        return self._views[key]

    @property
    def data_parallel(self) -> DeviceMesh | None:
        """Where parameters are sharded or copied: one axis, or copies x parts; None for neither.

        The ranks of ``cp`` hold the same parameters on other tokens, so parameters are sharded over them too.
        """
        shards, copies = self.sizes.dp_shard * self.sizes.cp, self.sizes.dp_replicate
        if shards == copies == 1:
            return None
        if copies == 1:
            return self.axis("dp_shard", "cp")
        if shards == 1 and self.sizes.tp == 1:
            return self.axis("dp_replicate")
        key = ("dp_replicate", "dp_shard x cp")
        if key not in self._views:
            self.axis("dp_shard", "cp")
            self._views[key] = self.world["dp_replicate", "dp_shard_cp"]
        return self._views[key]

    @property
    def expert_parallel(self) -> DeviceMesh:
        """Where the parameters of the experts of one rank of ep are sharded, and copied."""
        if self.sizes.dp_replicate == 1:
            return self.axis("efsdp")
        key = ("dp_replicate", "efsdp")
        if key not in self._views:
            self._views[key] = DeviceMesh._concatenate([self.axis("dp_replicate"), self.axis("efsdp")])
        return self._views[key]

    @property
    def data_rank(self) -> int:
        """Which share of the samples this rank reads."""
        return self.axis("dp_replicate", "dp_shard").get_local_rank()

    @property
    def data_ranks(self) -> int:
        """Into how many shares the samples are split."""
        return self.sizes.dp_replicate * self.sizes.dp_shard

    def rank_of(self, axis: str) -> int:
        """The coordinate of this rank on one axis."""
        return self.axis(axis).get_local_rank()

    def __repr__(self) -> str:
        return f"Mesh({self.sizes})"


def make_mesh(sizes: MeshSizes, device_type: str) -> Mesh:
    """Build the mesh of a running process group.

    Args:
        sizes: of the axes; -1 is filled in.
        device_type: ``"cpu"`` or ``"cuda"``.

    Raises:
        ParallelError: where the sizes do not multiply to the world, or no process group runs.
    """
    if not dist.is_initialized():
        raise ParallelError("no process group runs", where="make_mesh", fix="start with torchrun, or through a trainer")
    resolved = sizes.resolve(dist.get_world_size())
    shape = tuple(resolved.of(axis) for axis in AXES)
    return Mesh(resolved, init_device_mesh(device_type, shape, mesh_dim_names=AXES))
