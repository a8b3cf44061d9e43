"""Optimizer state in parts over ranks that hold copies of the parameters (ZeRO 1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nemolet.errors import ParallelError
from nemolet.parallel.gradients import local
from nemolet.parallel.mesh import Mesh

_BUCKET = 2**24  # numbers that are gathered at once


class UpdatedParts:
    """The part of each parameter that this rank updates, of parameters that all ranks hold whole (final).

    A part is some rows of a parameter, in the same memory, and a DTensor of the whole shape. An optimizer of the parts
    remembers numbers for these rows only, under shapes that any layout can read.

    Args:
        parameters: by name; the same on all ranks of the mesh.
        mesh: one axis; rank r updates the r-th part of the rows of every parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], mesh: DeviceMesh) -> None:
        self._mesh, self._group = mesh, mesh.get_group()
        self._ranks, self._rank = mesh.size(), mesh.get_local_rank()
        self._whole = list({id(p): p for p in parameters.values() if p.requires_grad and p.ndim}.values())
        self._parts = {id(p): nn.Parameter(self._part(p.detach())) for p in self._whole}

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What is updated in the place of a parameter: its part, or itself where it has no rows."""
        return self._parts.get(id(parameter), parameter)

    def take_gradients(self) -> None:
        """Give every part its rows of the gradient, which all ranks have summed; no memory is used."""
        for parameter in self._whole:
            gradient = parameter.grad
            self._parts[id(parameter)].grad = None if gradient is None else self._part(gradient)

    @torch.no_grad()
    def gather(self) -> None:
        """Send the rows that this rank has updated to all others, and take theirs; gradients are forgotten."""
        for bucket in _buckets(self._whole, _BUCKET):
            size = sum(self._rows(p) * p[0].numel() for p in bucket)
            sent, received = bucket[0].new_zeros(size), bucket[0].new_empty(self._ranks * size)
            for own, room in zip((local(self._parts[id(p)]) for p in bucket), self._places(sent, bucket)):
                room[: own.shape[0]].copy_(own)
            dist.all_gather_into_tensor(received, sent, group=self._group)
            for rank, there in enumerate(received.chunk(self._ranks)):
                for parameter, room in zip(bucket, self._places(there, bucket)):
                    rows = self._slice(parameter, rank)
                    if rank != self._rank:
                        parameter[rows].copy_(room[: rows.stop - rows.start])
        for parameter in self._whole:  # the optimizer knows those of the parts only
            parameter.grad = None

    def _part(self, whole: Tensor) -> DTensor:
        rows = whole[self._slice(whole, self._rank)]
        return DTensor.from_local(
            rows, self._mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _slice(self, whole: Tensor, rank: int) -> slice:
        start = min(rank * self._rows(whole), whole.shape[0])
        return slice(start, min(start + self._rows(whole), whole.shape[0]))

    def _rows(self, whole: Tensor) -> int:
        """Rows of a full part; the last parts may have fewer."""
        return -(-whole.shape[0] // self._ranks)

    def _places(self, buffer: Tensor, bucket: Iterable[Tensor]) -> Iterator[Tensor]:
        """Where a full part of each parameter lies in a buffer."""
        start = 0
        for parameter in bucket:
            size = self._rows(parameter) * parameter[0].numel()
            yield buffer[start : start + size].view(self._rows(parameter), *parameter.shape[1:])
            start += size


def updated_parts(graph: nn.Module, mesh: Mesh) -> UpdatedParts:
    """Spread the optimizer of a graph over the ranks that hold copies of it.

    Raises:
        ParallelError: for a layout in which ranks hold parts of the parameters.
    """
    view = mesh.data_parallel
    if view is None or view.mesh_dim_names != ("dp_replicate",) or mesh.sizes.tp > 1:
        raise ParallelError(
            "the optimizer is spread over ranks that hold copies of all parameters",
            where="parallel.shard_optimizer",
            expected="dp_replicate above 1; dp_shard, cp and tp at 1",
            found=str(mesh.sizes),
            fix="leave shard_optimizer out: with dp_shard the optimizer is in parts already (reshard=false for ZeRO 2)",
        )
    return UpdatedParts(dict(graph.named_parameters()), view)


def _buckets(parameters: Iterable[nn.Parameter], size: int) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type and device, together up to a size."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for alike in kinds.values():
        bucket: list[nn.Parameter] = []
        for parameter in alike:
            if bucket and sum(p.numel() for p in bucket) + parameter.numel() > size:
                yield bucket
                bucket = []
            bucket.append(parameter)
        yield bucket
