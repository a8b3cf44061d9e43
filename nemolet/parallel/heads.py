"""Fewer key/value heads than ranks of tp: every rank holds the projection and computes some queries of one head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nemolet.errors import ParallelError
from nemolet.nn.attention import Attention


def attention_of(projection: str, modules: dict[str, nn.Module]) -> Attention:
    """The attention layer that owns a projection.

    Raises:
        ParallelError: where it is a layer of another kind, whose rows nobody knows how to share.
    """
    owner = modules[projection.rpartition(".")[0]]
    if not isinstance(owner, Attention):
        raise ParallelError(
            "only nemolet.nn.Attention can share key/value heads among ranks",
            where=projection,
            expected="as many key/value heads as ranks of tp, or a multiple",
            found=type(owner).__name__,
            fix="set parallel.tp to the number of key/value heads",
        )
    return owner


def shared_rows(attention: Attention, rank: int, tp: int) -> Tensor:
    """Which rows of the fused projection a rank computes: its queries, and the key and value they look at.

    Example:
        >>> shared_rows(Attention(4, heads=4, kv_heads=1), rank=1, tp=2)
        tensor([2, 3, 4, 5])
    """
    queries = attention.heads // tp
    group, within = divmod(rank, tp // attention.kv_heads)
    per_group = attention.heads // attention.kv_heads
    slots = [*range(within * queries, (within + 1) * queries), per_group, per_group + 1]
    slot = torch.tensor(slots) + group * (per_group + 2)
    return (slot[:, None] * attention.head_size + torch.arange(attention.head_size)).flatten()
