"""Experts on several devices.

Where experts are spread over the axis ``ep``, tokens travel to the ranks that have their experts and back. Where they
are not, but layers are split over ``tp``, every rank has a share of each expert's width F. Either way the router
and the experts compute as on one device; only the dispatch between them is another one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemolet.errors import ParallelError
from nemolet.nn.moe import Experts, MixtureOfExperts, combine, dispatch_on_one_device, sort_by_expert
from nemolet.parallel.exchange import Group, all_to_all, fork, join
from nemolet.parallel.mesh import Mesh


def spread_experts(module: nn.Module, mesh: Mesh) -> None:
    """Give every mixture of experts inside a module the dispatch of this mesh.

    What enters a mixture is as its plan says: where ``ep`` is more than 1, every rank of ``tp`` has tokens of its own;
    else they have the same. The experts' parameters are cut as their axes say: E over ``ep``, or else F over ``tp``.
    The gradient of an expert is the sum over the tokens of all ranks of ``ep``.

    Args:
        module: a whole model, or a part of it.
        mesh: of this run.

    Raises:
        ParallelError: where ``ep`` does not divide the number of experts.
    """
    sizes = mesh.sizes
    apart = [axis for axis in ("cp", "tp") if sizes.of(axis) > 1 and (axis == "cp" or sizes.ep > 1)]
    for name, layer in module.named_modules():
        if not isinstance(layer, MixtureOfExperts):
            continue
        _check_divides(name, layer.experts.number, sizes.ep)
        if sizes.ep > 1:
            layer.dispatch = ToTheirExperts(mesh.axis("ep").get_group())
        elif sizes.tp > 1:
            layer.dispatch = ToAllShares(mesh.axis("tp").get_group())
        if apart:
            layer.router.sum_over_sequence = SumOver([mesh.axis(axis).get_group() for axis in apart])


def _check_divides(name: str, number: int, ranks: int) -> None:
    if number % ranks:
        raise ParallelError(
            "the ranks do not divide the experts",
            where=f"{name}.experts",
            expected=f"parallel.ep to divide {number}",
            found=ranks,
            fix=f"set parallel.ep={max(d for d in range(1, ranks + 1) if number % d == 0)}",
        )


class ToTheirExperts:
    """Send each token to the ranks that have its experts (final).

    Args:
        group: the ranks over which experts are spread; each has tokens of its own.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)

    def __call__(self, hidden_ND: Tensor, chosen: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        order, counts_E = sort_by_expert(chosen, experts.number)
        wanted = counts_E.view(self.ranks, -1)  # [rank, experts of it]: what this rank sends
        given = torch.empty_like(wanted)  # [rank, own experts]: what it gets
        dist.all_to_all_single(given, wanted, group=self.group)
        send, receive = wanted.sum(1).tolist(), given.sum(1).tolist()
        rows = all_to_all(hidden_ND[order // chosen.shape[-1]], send, receive, self.group)
        # What arrives is sorted by rank and then by expert; experts want theirs together.
        expert = torch.arange(given.shape[1], device=rows.device).repeat(self.ranks)
        arrival = expert.repeat_interleave(given.flatten(), output_size=sum(receive)).argsort(stable=True)
        computed = experts(rows[arrival], given.sum(0))
        back = torch.empty_like(arrival)
        back[arrival] = torch.arange(arrival.numel(), device=rows.device)
        return combine(all_to_all(computed[back], receive, send, self.group), order, weights)


class ToAllShares:
    """Compute every token on all ranks, each with its share of the experts' width, and add (final).

    Adding once all experts of a token are combined sends one row for each token, not one for each expert of it.

    Args:
        group: the ranks over which F is cut; all have the same tokens.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(self, hidden_ND: Tensor, chosen: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        share = dispatch_on_one_device(fork(hidden_ND, self.group), chosen, fork(weights, self.group), experts)
        return join(share, self.group)


class SumOver:
    """Add what several ranks counted; nothing is differentiated."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups

    def __call__(self, counts: Tensor) -> Tensor:
        for group in self.groups:
            dist.all_reduce(counts, group=group)
        return counts
