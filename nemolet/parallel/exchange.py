"""Collectives that gradients flow through.

What is copied forward is summed backward, and the other way round. Whether a gradient is complete on every rank, or
only a share of it, is a matter of what the ranks compute; so each function says which it expects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup


def all_gather(part: Tensor, group: Group) -> Tensor:
    """The parts of all ranks, along the first dim. Backward, the shares of the gradient are summed."""
    gathered: Tensor = _AllGather.apply(part, group)
    return gathered


def fork(whole: Tensor, group: Group) -> Tensor:
    """What all ranks have alike, for each to compute a share with. Backward, the shares are summed."""
    same: Tensor = _Fork.apply(whole, group)
    return same


def join(share: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' shares. Every rank goes on alike: backward, each has the complete gradient already."""
    whole: Tensor = _Join.apply(share, group)
    return whole


def all_to_all(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Send the first ``send[0]`` rows to rank 0, and so on; what comes back is in the order of ranks."""
    received: Tensor = _AllToAll.apply(rows, list(send), list(receive), group)
    return received


def _gathered(part: Tensor, group: Group) -> Tensor:
    out = part.new_empty(part.shape[0] * dist.get_world_size(group), *part.shape[1:])
    dist.all_gather_into_tensor(out, part.contiguous(), group=group)
    return out


def _summed_part(whole: Tensor, group: Group) -> Tensor:
    out = whole.new_empty(whole.shape[0] // dist.get_world_size(group), *whole.shape[1:])
    dist.reduce_scatter_tensor(out, whole.contiguous(), group=group)
    return out


def _summed(share: Tensor, group: Group) -> Tensor:
    out = share.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _exchanged(rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gathered(part, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed_part(grad, ctx.group), None


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: Group) -> Tensor:
        return _summed(share, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchanged(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, ctx.receive, ctx.send, ctx.group), None, None, None
