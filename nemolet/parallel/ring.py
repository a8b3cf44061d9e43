"""Ring attention: keys and values go from rank to rank, and no rank holds those of the whole (Liu et al., 2023).

Each rank attends with its queries to the part that it holds, passes the part on, and merges what it found by the
log-sums of the scores. Backward, the parts go around once more, and their gradients with them, until they are home.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemolet.errors import ParallelError
from nemolet.nn.attention import AttentionCore, scaled_dot_product
from nemolet.nn.mask import AttentionMask
from nemolet.parallel.context import own_places
from nemolet.parallel.exchange import Group


class RingAttention:
    """Attention of this rank's queries to keys and values that come by (final).

    Where it is causal, each rank multiplies half of what it holds with what comes by: the chunks that a rank has are
    one from the front and one from the back, so all ranks have the same work in every step.

    Args:
        group: the ranks that share each sequence.
        inner: what attends on one device, which is to be the usual.

    Raises:
        ParallelError: for attention of another kind, whose results cannot be merged.
    """

    def __init__(self, group: Group, inner: AttentionCore) -> None:
        if inner is not scaled_dot_product:
            _refuse("bounded scores")
        self.group, self.inner = group, inner

    def __call__(
        self, query_BTHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor, mask: AttentionMask, dropout: float
    ) -> Tensor:
        if dropout:
            _refuse("dropout of attention weights")
        both_2BGSK = torch.stack((key_BSGK, value_BSGK)).transpose(2, 3)
        mixed: Tensor = _Ring.apply(query_BTHK.transpose(1, 2), both_2BGSK, mask.allowed, mask.causal, self.group)
        return mixed.transpose(1, 2)


def _refuse(what: str) -> None:
    raise ParallelError(
        f"{what} cannot be had in a ring",
        where="parallel.cp_attention",
        expected="scaled dot-product attention without dropout",
        found=what,
        fix="set parallel.cp_attention=gather",
    )


class _Block(NamedTuple):
    """Which queries of this rank look at which keys of a part, and how."""

    rows: slice
    columns: slice
    allowed: Tensor | None
    causal: bool


class _Walk:
    """The steps of a ring as one rank sees them (final)."""

    def __init__(self, allowed: Tensor | None, causal: bool, group: Group) -> None:
        self.allowed, self.causal, self.group = allowed, causal, group
        members, self.rank = dist.get_process_group_ranks(group), dist.get_rank(group)
        self.ranks = len(members)
        self.ahead, self.behind = members[(self.rank + 1) % self.ranks], members[self.rank - 1]

    def parts(self, own: Tensor) -> Iterator[tuple[Tensor, _Block]]:
        """The part of each rank, beginning with the own one; the next is under way while one is looked at."""
        for step in range(self.ranks):
            passing = self.pass_on(own) if step + 1 < self.ranks else None
            yield own, self._block((self.rank - step) % self.ranks, own.shape[3])
            if passing is not None:
                own = passing.wait()

    def pass_on(self, tensor: Tensor) -> _Passing:
        """Send something ahead, and receive the same from behind."""
        sent, received = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
        ops = [
            dist.P2POp(dist.isend, sent, self.ahead, self.group),
            dist.P2POp(dist.irecv, received, self.behind, self.group),
        ]
        return _Passing(dist.batch_isend_irecv(ops), sent, received)

    def _block(self, source: int, length: int) -> _Block:
        rows = columns = slice(None)
        if self.causal and source < self.rank:  # its second chunk is later than all queries
            columns = slice(0, length // 2)
        elif self.causal and source > self.rank:  # both chunks are later than the first half of the queries
            rows = slice(length // 2, None)
        if self.allowed is None:
            return _Block(rows, columns, None, self.causal and source == self.rank)
        places = own_places(length * self.ranks, self.ranks, source, self.allowed.device)[columns]
        return _Block(rows, columns, self.allowed[:, :, rows].index_select(3, places), False)


class _Passing(NamedTuple):
    """Something under way; what is sent has to stay in memory until it is."""

    works: list[Any]
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        """What has come."""
        for work in self.works:
            work.wait()
        return self.received


class _Ring(torch.autograd.Function):
    """query_BHTK, and keys and values 2BGSK, to mixed_BHTK."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, both: Tensor, allowed: Tensor | None, causal: bool, group: Group) -> Tensor:
        walk, wide = _Walk(allowed, causal, group), _wide(query)
        mixed, log_sum = wide.new_zeros(wide.shape), wide.new_full(wide.shape[:3], -torch.inf)
        with torch.autocast(query.device.type, enabled=False):
            for part, block in walk.parts(both):
                key, value = _wide(part)[..., block.columns, :]
                found, own_sum = _attend(wide[:, :, block.rows], key, value, block)
                before = log_sum[:, :, block.rows]
                total = torch.logaddexp(before, own_sum)  # finite: first of all, each query sees itself
                kept, added = (before - total).exp()[..., None], (own_sum - total).exp()[..., None]
                mixed[:, :, block.rows] = mixed[:, :, block.rows] * kept + found * added
                log_sum[:, :, block.rows] = total
        ctx.walk, ctx.dtypes = walk, (query.dtype, both.dtype)
        ctx.save_for_backward(query, both, mixed, log_sum)
        return mixed.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        query, both, mixed, log_sum = ctx.saved_tensors
        grad, query, walk = _wide(grad), _wide(query), ctx.walk
        of_query, of_own = torch.zeros_like(query), _wide(torch.zeros_like(both))
        passing: _Passing | None = None  # gradients of the part that comes by
        with torch.autocast(query.device.type, enabled=False):
            for step, (part, block) in enumerate(walk.parts(both)):
                key, value = _wide(part)[..., block.columns, :]
                rows = [each[:, :, block.rows] for each in (grad, query, mixed, log_sum)]
                found, *of_both = _attend_backward(rows[0], rows[1], key, value, rows[2], rows[3], block)
                of_query[:, :, block.rows] += found
                of_part = of_own if step == 0 else torch.zeros_like(of_own) if passing is None else passing.wait()
                of_part[..., block.columns, :] += torch.stack(of_both)
                passing = None if step == 0 else walk.pass_on(of_part)
        if passing is not None:
            of_own += passing.wait()
        return of_query.to(ctx.dtypes[0]), of_own.to(ctx.dtypes[1]), None, None, None


# --------------------------------------------------------------------------------------------------
# One part
# --------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _has_kernel(query: Tensor) -> bool:
    """Whether torch has a kernel that gives log-sums, for any mask and forward and backward alike: on a CPU."""
    return query.device.type == "cpu"


def _attend(query: Tensor, key: Tensor, value: Tensor, block: _Block) -> tuple[Tensor, Tensor]:
    """What queries find in a part, and the log-sum of their scores: minus infinity where they see nothing."""
    if _has_kernel(query):
        bias, causal = _bias(query, block), block.causal
        found, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias
        )
        seen = None if block.allowed is None else block.allowed.any(-1)
        return found, log_sum if seen is None else log_sum.masked_fill(~seen, -torch.inf)
    scores = _scores(query, key, block)
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum.clamp(min=torch.finfo(scores.dtype).min)[..., None]).exp()
    return (weights @ value[:, :, None]).flatten(1, 2), log_sum.flatten(1, 2)


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, log_sum: Tensor, block: _Block
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, from what the queries found in all parts together."""
    if _has_kernel(query):
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, mixed, log_sum, 0.0, block.causal, attn_mask=_bias(query, block)
        )
        return gradients
    groups, scale = (key.shape[1], -1), query.shape[-1] ** -0.5
    weights = (_scores(query, key, block) - log_sum.unflatten(1, groups)[..., None]).exp()
    of_mixed = grad.unflatten(1, groups)
    correction = (grad * mixed).sum(-1, keepdim=True).unflatten(1, groups)
    of_scores = weights * (of_mixed @ value[:, :, None].transpose(-1, -2) - correction) * scale
    of_query = (of_scores @ key[:, :, None]).flatten(1, 2)
    of_key = (of_scores.transpose(-1, -2) @ query.unflatten(1, groups)).sum(2)
    return of_query, of_key, (weights.transpose(-1, -2) @ of_mixed).sum(2)


def _scores(query: Tensor, key: Tensor, block: _Block) -> Tensor:
    """[B, G, H/G, T, S]; minus infinity where a query does not look."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = grouped @ key[:, :, None].transpose(-1, -2) * query.shape[-1] ** -0.5
    if block.causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(later, -torch.inf)
    return scores if block.allowed is None else scores.masked_fill(~block.allowed[:, :, None], -torch.inf)


def _bias(query: Tensor, block: _Block) -> Tensor | None:
    if block.allowed is None:
        return None
    return torch.zeros_like(block.allowed, dtype=query.dtype).masked_fill_(~block.allowed, -torch.inf)
