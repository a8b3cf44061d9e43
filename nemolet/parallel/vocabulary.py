"""A vocabulary of which each rank holds a part: looking up, scoring, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemolet.language.losses import TokenLoss
from nemolet.types import IGNORED


def look_up(read: Callable[[Tensor], Tensor], tokens: Tensor, start: int, rows: int) -> Tensor:
    """Vectors of the tokens whose rows this rank holds, and zeros for all others; the sum over ranks is complete.

    Args:
        read: looks up rows of the part.
        tokens: ids.
        start: id of the first row of this rank.
        rows: how many it has.

    Example:
        >>> table = torch.tensor([[1.0], [2.0]])
        >>> look_up(lambda ids: torch.nn.functional.embedding(ids, table), torch.tensor([3, 4]), 4, 2).tolist()
        [[0.0], [1.0]]
    """
    inner = tokens - start
    missing = (inner < 0) | (inner >= rows)
    return read(inner.masked_fill(missing, 0)).masked_fill(missing[..., None], 0)


def token_loss(
    logits: Tensor, labels: Tensor, *, start: int, group: dist.ProcessGroup, smoothing: float, z_loss: float
) -> TokenLoss:
    """Cross-entropy of scores whose vocabulary lies on several ranks, as :class:`nemolet.language.CrossEntropy`.

    Only a few numbers per token are summed over the ranks: no rank ever sees all scores.

    Args:
        logits: the scores of this rank's part of the vocabulary.
        labels: ids in the whole vocabulary.
        start: id of the first score of this rank.
        group: the ranks that hold the vocabulary.
        smoothing: share of probability spread over the whole vocabulary.
        z_loss: weight of the squared log-partition.

    Shape: [..., part of V], [...] -> scalar, scalar; the same on all ranks.
    """
    flat = labels.flatten()
    loss = _PartedLoss.apply(logits.flatten(0, -2), flat, start, group, smoothing, z_loss)
    return TokenLoss(loss, flat.ne(IGNORED).sum())


class _PartedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, labels_N: Tensor, start: int, group: dist.ProcessGroup, smoothing: float, z: float
    ) -> Tensor:
        wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        counted_N = labels_N.ne(IGNORED)
        here_N = counted_N & (labels_N >= start) & (labels_N < start + logits_NV.shape[1])
        target_N1 = (labels_N - start).masked_fill(~here_N, 0)[:, None]
        top_N = _over(
            wide_NV.amax(-1) if wide_NV.shape[1] else wide_NV.new_full(labels_N.shape, -torch.inf), "max", group
        )
        parts = [torch.exp(wide_NV - top_N[:, None]).sum(-1), _picked(wide_NV, target_N1, here_N)]
        if smoothing:
            parts += [wide_NV.sum(-1), torch.full_like(top_N, wide_NV.shape[1])]
        exp_N, score_N, *spread = _over(torch.stack(parts), "sum", group)
        partition_N = top_N + exp_N.log()
        loss_N: Tensor = partition_N - (1 - smoothing) * score_N
        size_N = spread[1] if smoothing else None
        if smoothing:
            loss_N = loss_N - smoothing * spread[0] / size_N
        if z:
            loss_N = loss_N + z * partition_N.square()
        ctx.save_for_backward(logits_NV, partition_N, target_N1, counted_N, here_N, size_N)
        ctx.smoothing, ctx.z = smoothing, z
        total: Tensor = loss_N.where(counted_N, 0).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, partition_N, target_N1, counted_N, here_N, size_N = ctx.saved_tensors
        each_N = grad * counted_N
        slope_N = each_N * (1 + 2 * ctx.z * partition_N) if ctx.z else each_N
        grad_NV = torch.exp(logits_NV.to(partition_N.dtype) - partition_N[:, None]).mul_(slope_N[:, None])
        if ctx.smoothing:
            grad_NV.sub_((each_N * ctx.smoothing / size_N)[:, None])
        if grad_NV.shape[1]:
            grad_NV.scatter_add_(1, target_N1, (each_N * here_N * (ctx.smoothing - 1))[:, None])
        return grad_NV.to(logits_NV.dtype), None, None, None, None, None


def _picked(wide_NV: Tensor, target_N1: Tensor, here_N: Tensor) -> Tensor:
    if not wide_NV.shape[1]:
        return wide_NV.new_zeros(here_N.shape)
    picked: Tensor = wide_NV.gather(1, target_N1)[:, 0].where(here_N, 0)
    return picked


def _over(tensor: Tensor, what: str, group: dist.ProcessGroup) -> Tensor:
    reduced: Tensor = funcol.wait_tensor(funcol.all_reduce(tensor, what, group))
    return reduced
