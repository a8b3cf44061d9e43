"""Context parallelism: one sequence over several ranks.

Each rank has a part of every sequence and runs the whole model on it. Only attention looks further: it gathers the keys
and values of all ranks, or lets them come by (:mod:`nemolet.parallel.ring`). For that the mask has to say who may see
whom in the whole sequence.

Under a causal mask the end of a sequence is more work than its beginning. So the sequence is cut into twice as many
chunks as ranks, and rank r has the r-th from the front and the r-th from the back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemolet.errors import ParallelError
from nemolet.nn.attention import Attention, AttentionCore, CrossAttention
from nemolet.nn.mask import AttentionMask
from nemolet.nn.router import Router, whole
from nemolet.nn.transformer import Stack
from nemolet.parallel.exchange import Group, all_gather
from nemolet.parallel.experts import SumOver
from nemolet.ports import Port
from nemolet.types import NeuralType, Positions


def spread_context(
    module: nn.Module, group: Group, core: Callable[[Group, AttentionCore], AttentionCore] | None = None
) -> None:
    """Let all attention inside a module look at the whole of a sequence of which each rank has its part.

    What enters the module is to be cut by :func:`own_context`.

    Args:
        module: whose attention it is.
        group: the ranks that share each sequence.
        core: makes what attends over ranks from what attends on one; None for :class:`ContextAttention`.

    Raises:
        ParallelError: for attention whose scores depend on more than the mask can say.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, Stack):
            if layer.relative is not None:
                _refuse(f"{name}.relative", "relative positions", "model.position=rope")
            layer.make_mask = ContextMask(group)
        elif isinstance(layer, CrossAttention):
            _refuse(name, "attention to a memory", "parallel.cp=1")
        elif isinstance(layer, Attention):
            layer.core = (core or ContextAttention)(group, layer.core)
        elif isinstance(layer, Router) and layer.sum_over_sequence is whole:
            layer.sum_over_sequence = SumOver([group])


def _refuse(where: str, what: str, fix: str) -> None:
    raise ParallelError(
        f"{what} cannot look over several ranks yet",
        where=where,
        expected="self-attention with positions in its queries and keys, or in the embedding",
        found=what,
        fix=f"set {fix}",
    )


def own_context(batch: Mapping[str, Tensor], ports: Mapping[str, Port], group: Group) -> dict[str, Tensor]:
    """This rank's part of a batch, cut along T as the ports of the graph declare it.

    Positions are added where the batch has none, since a model would count them from 0 on every rank.

    Args:
        batch: by name, the same on all ranks of the group.
        ports: the inputs of the graph.
        group: the ranks that share each sequence.

    Raises:
        ParallelError: where the sequence cannot be cut into twice as many chunks as ranks, or the graph takes no
            positions.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    dims = {name: dim for name in batch if (dim := _dim_of_time(ports[name])) is not None}
    first = next(iter(dims))
    length = batch[first].shape[dims[first]]
    if length % (2 * ranks):
        raise ParallelError(
            "the sequence cannot be shared evenly",
            where=f"batch.{first}",
            expected=f"a multiple of 2 x parallel.cp = {2 * ranks} positions",
            found=length,
            fix=f"set data.sequence_length={max(1, round(length / 2 / ranks)) * 2 * ranks}, or change parallel.cp",
        )
    places = own_places(length, ranks, rank, batch[first].device)
    own = {name: value.index_select(dims[name], places) if name in dims else value for name, value in batch.items()}
    positions = _port_of_positions(ports)
    if positions is None:
        raise ParallelError(
            "the graph takes no positions",
            where="parallel.cp",
            expected="an input of type PositionsBT",
            found=", ".join(map(str, ports.values())),
            fix='add nl.Input(nl.PositionsBT, "positions", optional=True) to the graph, or set parallel.cp=1',
        )
    if own.get(positions) is None:
        own[positions] = places.expand(batch[first].shape[0], -1)
    return own


def own_places(length: int, ranks: int, rank: int, device: torch.device | None = None) -> Tensor:
    """The places of a sequence that a rank has.

    Example:
        >>> [own_places(8, 2, rank).tolist() for rank in range(2)]
        [[0, 1, 6, 7], [2, 3, 4, 5]]
    """
    chunks = torch.arange(length, device=device).chunk(2 * ranks)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))


def in_order(gathered: Tensor, ranks: int, dim: int) -> Tensor:
    """Put what all ranks gave, one after the other along a dim, in the order of the sequence."""
    parts = gathered.unflatten(dim, (ranks, 2, -1))
    front, back = parts.select(dim + 1, 0), parts.select(dim + 1, 1)
    return torch.cat((front, back.flip(dim)), dim=dim).flatten(dim, dim + 1)


def _dim_of_time(port: Port) -> int | None:
    letters = [axis.letter for axis in port.type.axes] if isinstance(port.type, NeuralType) else []
    return letters.index("T") if "T" in letters else None


def _port_of_positions(ports: Mapping[str, Port]) -> str | None:
    found = (n for n, p in ports.items() if isinstance(p.type, NeuralType) and isinstance(p.type.element, Positions))
    return next(found, None)


class ContextMask:
    """Makes the mask of this rank's queries and the keys of the whole sequence (final).

    Args:
        group: the ranks that share each sequence.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def __call__(
        self,
        length: int,
        *,
        offset: int = 0,
        segments_BT: Tensor | None = None,
        valid_BS: Tensor | None = None,
        window: int | None = None,
        causal: bool = True,
        device: torch.device | None = None,
    ) -> AttentionMask:
        if offset:
            raise ParallelError(
                "a sequence that lies on several ranks cannot be continued from a cache",
                where="parallel.cp",
                expected="no cached tokens",
                found=offset,
                fix="generate with parallel.cp=1",
            )
        keys = length * self.ranks
        windowed = window is not None and window < keys
        if segments_BT is None and valid_BS is None and not windowed:
            return AttentionMask(None, causal)
        places_T1 = own_places(keys, self.ranks, self.rank, device)[:, None]
        key_S = torch.arange(keys, device=device)
        allowed = (key_S <= places_T1 if causal else key_S < places_T1 + keys)[None]
        if windowed and window is not None:
            allowed = allowed & (key_S > places_T1 - window) & (key_S < places_T1 + window)
        if segments_BT is not None:
            allowed = allowed & (segments_BT[:, :, None] == self._all(segments_BT)[:, None, :])
        if valid_BS is not None:
            allowed = (allowed & self._all(valid_BS)[:, None, :]) | (key_S == places_T1)
        return AttentionMask(allowed[:, None], causal)

    def _all(self, own_BT: Tensor) -> Tensor:
        """The whole sequence, in its order."""
        gathered_TB = all_gather(own_BT.t().to(torch.int64), self.group)
        return in_order(gathered_TB, self.ranks, 0).t().to(own_BT.dtype)


class ContextAttention:
    """Attention of this rank's queries to the keys of the whole sequence (final).

    Where it is causal, each of the two chunks looks only at the keys up to its own end: every rank computes the same
    number of products.

    Args:
        group: the ranks that share each sequence.
        inner: what mixes once the keys are there.
    """

    def __init__(self, group: Group, inner: AttentionCore) -> None:
        self.group, self.inner = group, inner
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def __call__(
        self, query_BTHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor, mask: AttentionMask, dropout: float
    ) -> Tensor:
        both_TCBGK = torch.stack((key_BSGK, value_BSGK)).permute(2, 0, 1, 3, 4)
        whole_SCBGK = in_order(all_gather(both_TCBGK, self.group), self.ranks, 0)
        key_BSGK, value_BSGK = whole_SCBGK.permute(1, 2, 0, 3, 4).unbind(0)
        chunk, keys = query_BTHK.shape[1] // 2, key_BSGK.shape[1]
        ends = ((self.rank + 1) * chunk, (2 * self.ranks - self.rank) * chunk) if mask.causal else (keys, keys)
        mixed = []
        for half, (query, end) in enumerate(zip(query_BTHK.split(chunk, dim=1), ends)):
            if mask.allowed is not None:
                rows: Tensor | None = mask.allowed[:, :, half * chunk : (half + 1) * chunk, :end]
            else:  # the queries are the last of the keys
                rows = _causal(chunk, end, query.device) if mask.causal else None
            mixed.append(self.inner(query, key_BSGK[:, :end], value_BSGK[:, :end], AttentionMask(rows, False), dropout))
        return torch.cat(mixed, dim=1)


def _causal(length: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(1, 1, length, keys, dtype=torch.bool, device=device).tril(keys - length)
