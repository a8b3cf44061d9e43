"""What happens to an activation, or a gradient, where it crosses the boundary of a module that is cut over tp."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemolet.errors import ParallelError
from nemolet.parallel.layout import Boundary

_STEPS = {  # forward, backward
    Boundary.COPY: ("keep", "sum"),
    Boundary.SUM: ("sum", "keep"),
    Boundary.GATHER: ("gather", "scatter"),
    Boundary.SCATTER: ("scatter", "gather"),
    Boundary.SPLIT: ("own", "gather"),
    Boundary.JOIN: ("gather", "own"),
}


# Without gradients the sequence stays whole: the same is sent, and any length will do, such as one token.
_WHOLE = {
    Boundary.GATHER: Boundary.COPY,
    Boundary.SCATTER: Boundary.SUM,
    Boundary.SPLIT: Boundary.KEEP,
    Boundary.JOIN: Boundary.KEEP,
}


def cross(tensor: Tensor, boundary: Boundary, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Take an activation over a boundary, with the adjoint step in the backward pass.

    Args:
        tensor: the part of this rank.
        boundary: what happens.
        dim: of T, where that is cut.
        group: the ranks of tp.
    """
    if not torch.is_grad_enabled():
        boundary = _WHOLE.get(boundary, boundary)
    if boundary is Boundary.KEEP:
        return tensor
    crossed: Tensor = _Cross.apply(tensor, *_STEPS[boundary], dim, group)
    return crossed


def sum_gradient(parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A copy of a parameter whose gradients are parts of a sum."""
    return cross(parameter, Boundary.COPY, 0, group)


def join_uneven(tensor: Tensor, part: int, size: int, group: dist.ProcessGroup) -> Tensor:
    """Join the last dim of parts of which the last may be smaller; each rank has its own part's gradient.

    Args:
        tensor: the part of this rank.
        part: the size of a full part.
        size: the size of the whole.
        group: the ranks.
    """
    joined: Tensor = _JoinUneven.apply(tensor, part, size, group)
    return joined


def part_size(size: int, group: dist.ProcessGroup) -> int:
    """How much of a dim each rank has; the last may have less."""
    return -(-size // group.size())


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ahead: str, back: str, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.back, ctx.dim, ctx.group = back, dim, group
        return _step(tensor, ahead, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _step(grad, ctx.back, ctx.dim, ctx.group), None, None, None, None


def _step(tensor: Tensor, step: str, dim: int, group: dist.ProcessGroup) -> Tensor:
    if step == "keep":
        return tensor.view_as(tensor)
    if step == "sum":
        return _wait(funcol.all_reduce(tensor.contiguous(), "sum", group))
    if step == "gather":
        return _wait(funcol.all_gather_tensor(tensor.contiguous(), dim % tensor.ndim, group))
    ranks = group.size()
    if tensor.shape[dim] % ranks:
        raise ParallelError(
            "tp does not divide the sequence",
            where="a batch",
            expected=f"a length that is a multiple of parallel.tp={ranks}",
            found=tensor.shape[dim],
            fix="change data.sequence_length, or set parallel.rules.activations.T=[cp]",
        )
    if step == "scatter":
        return _wait(funcol.reduce_scatter_tensor(tensor.contiguous(), "sum", dim % tensor.ndim, group))
    return tensor.chunk(ranks, dim)[dist.get_rank(group)].contiguous()


def _wait(tensor: Tensor) -> Tensor:
    waited: Tensor = funcol.wait_tensor(tensor)
    return waited


class _JoinUneven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, part: int, size: int, group: dist.ProcessGroup) -> Tensor:
        ctx.start, ctx.length = min(dist.get_rank(group) * part, size), tensor.shape[-1]
        padded = torch.nn.functional.pad(tensor, (0, part - tensor.shape[-1]))
        return _step(padded, "gather", -1, group)[..., :size].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.narrow(-1, ctx.start, ctx.length).contiguous(), None, None, None
