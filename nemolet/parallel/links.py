"""What the stages of a pipeline send to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemolet.parallel.mesh import Mesh

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def group_of_each_column(mesh: Mesh, chosen: slice) -> dist.ProcessGroup:
    """A new group of the chosen ranks of a pipeline; all ranks of the world make theirs at the same time."""
    columns = mesh.world.mesh.flatten(1).t()[:, chosen].tolist()
    group, _ = dist.new_subgroups_by_enumeration(columns)
    return group  # type: ignore[no-any-return]


class Links:
    """The ways between neighbouring stages (final).

    Hidden states and gradients, and the way from the last rank back to the first, have groups of their own: within
    one, a pair of ranks sends in one direction only and in one order, so nobody waits in a circle.

    Args:
        mesh: of all ranks.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.members = dist.get_process_group_ranks(mesh.axis("pp").get_group())
        self.ranks = len(self.members)
        ways = ("ahead", "back") if self.ranks == 1 else ("ahead", "ahead around", "back", "back around")
        self._groups = {way: group_of_each_column(mesh, slice(None)) for way in ways}
        self._waiting: list[tuple[Any, Tensor]] = []
        self._known: dict[tuple[Any, ...], Tensor] = {}

    def send(self, hidden: Tensor, stage: int, batch: Mapping[str, Any]) -> None:
        """Send hidden states to the stage after; their form first, where a batch of this form is new."""
        key = ("sent", stage, *_form(batch))
        if key not in self._known:
            self._known[key] = header_of(hidden)
            self._send(self._known[key], stage, stage + 1, "ahead")
        self._send(hidden.contiguous(), stage, stage + 1, "ahead")

    def receive(self, stage: int, batch: Mapping[str, Any]) -> Tensor:
        """Receive hidden states from the stage before."""
        key = ("received", stage, *_form(batch))
        device = next(v.device for v in batch.values() if isinstance(v, Tensor))
        if key not in self._known:
            header = torch.zeros(8, dtype=torch.int64, device=device)
            self._known[key] = self._receive(header, stage - 1, stage, "ahead").cpu()
        return self._receive(empty_as(self._known[key]).to(device), stage - 1, stage, "ahead")

    def send_gradient(self, gradient: Tensor, stage: int) -> None:
        """Send the gradient of what was received to the stage before."""
        self._send(gradient.contiguous(), stage, stage - 1, "back")

    def receive_gradient(self, stage: int, hidden: Tensor) -> Tensor:
        """Receive the gradient of what was sent from the stage after."""
        return self._receive(torch.empty_like(hidden, memory_format=torch.contiguous_format), stage + 1, stage, "back")

    def finish(self) -> None:
        """Wait for all that was sent."""
        while self._waiting:
            self._waiting.pop()[0].wait()

    def _send(self, tensor: Tensor, stage: int, to: int, way: str) -> None:
        work = dist.isend(tensor, self.members[to % self.ranks], group=self._way(stage, to, way))
        self._waiting.append((work, tensor))  # the memory has to stay until it is sent

    def _receive(self, into: Tensor, source: int, stage: int, way: str) -> Tensor:
        dist.recv(into, self.members[source % self.ranks], group=self._way(source, stage, way))
        return into

    def _way(self, source: int, to: int, way: str) -> dist.ProcessGroup:
        around = abs(source % self.ranks - to % self.ranks) != 1 or (to > source) != (
            to % self.ranks > source % self.ranks
        )
        return self._groups[f"{way} around" if around else way]


def _form(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((name, *value.shape) for name, value in batch.items() if isinstance(value, Tensor))


def header_of(tensor: Tensor) -> Tensor:
    """The dtype and shape of a tensor, as a tensor."""
    numbers = [_DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
    return torch.tensor(numbers + [0] * (8 - len(numbers)), device=tensor.device)


def empty_as(header: Tensor) -> Tensor:
    """A tensor of the dtype and shape that a header says."""
    dtype, ndim, *shape = header.tolist()
    return torch.empty(shape[:ndim], dtype=_DTYPES[dtype], device=header.device)
