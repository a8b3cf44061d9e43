"""Experts on several ranks compute what they compute on one; gradients and auxiliary losses too."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nemolet.errors import ParallelError
from nemolet.nn.moe import MixtureOfExperts
from nemolet.nn.router import Mixture, balance_experts
from nemolet.parallel.experts import spread_experts
from nemolet.parallel.mesh import MeshSizes, make_mesh

MIXTURE = Mixture(4, 2, balance_loss=0.5, z_loss=0.1, balance_rate=0.1)


def make() -> MixtureOfExperts:
    torch.manual_seed(0)
    return MixtureOfExperts(8, 6, MIXTURE, init_std=0.5, out_std=0.5).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 6, 8, dtype=torch.float64), torch.randn(4, 6, 8, dtype=torch.float64)


def cut(weight: torch.Tensor, dim: int, mesh) -> nn.Parameter:
    return nn.Parameter(weight.data.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone())


def over_ep(ranks_ep: int):
    """Every rank has sequences of its own and a part of the experts."""
    mesh = make_mesh(MeshSizes(dp_shard=dist.get_world_size(), ep=ranks_ep), "cpu")
    layer, (hidden, projection) = make(), data()
    for name in ("gate", "up", "down"):
        setattr(layer.experts, name, cut(getattr(layer.experts, name), 0, mesh.axis("ep")))
    spread_experts(layer, mesh)
    rank, world = dist.get_rank(), dist.get_world_size()
    own = hidden.chunk(world)[rank].clone().requires_grad_()
    out = layer(own)
    (out * projection.chunk(world)[rank]).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    # As data parallelism does: the sum over ranks with the same part.
    dist.all_reduce(grads["router.weight"])
    for name in ("gate", "up", "down"):
        dist.all_reduce(grads[f"experts.{name}"], group=mesh.axis("efsdp").get_group())
    balance_experts(layer, reduce=summed)
    return out.detach(), own.grad, grads, layer.router.bias


def summed(load: torch.Tensor) -> torch.Tensor:
    load = load.clone()
    dist.all_reduce(load)
    return load


def over_tp():
    """Every rank has all tokens and a share of each expert's width."""
    mesh = make_mesh(MeshSizes(tp=dist.get_world_size()), "cpu")
    layer, (hidden, projection) = make(), data()
    for name, dim in (("gate", 1), ("up", 1), ("down", 2)):
        setattr(layer.experts, name, cut(getattr(layer.experts, name), dim, mesh.axis("tp")))
    spread_experts(layer, mesh)
    hidden.requires_grad_()
    out = layer(hidden)
    (out * projection).sum().backward()
    return out.detach(), hidden.grad, {name: p.grad for name, p in layer.named_parameters()}


@pytest.fixture(scope="module")
def alone():
    layer, (hidden, projection) = make(), data()
    hidden.requires_grad_()
    out = layer(hidden)
    (out * projection).sum().backward()
    balance_experts(layer)
    return out.detach(), hidden.grad, {name: p.grad for name, p in layer.named_parameters()}, layer.router.bias


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2), (4, 4)])
def test_tokens_travel_to_their_experts_and_back(ranks, alone, world, ep):
    out, grad, grads, bias = alone
    results = ranks(world, over_ep, ep)
    torch.testing.assert_close(torch.cat([each[0] for each in results]), out)
    torch.testing.assert_close(torch.cat([each[1] for each in results]), grad)
    for rank, (_, _, theirs, their_bias) in enumerate(results):
        torch.testing.assert_close(their_bias, bias)
        torch.testing.assert_close(theirs["router.weight"], grads["router.weight"])
        for name in ("gate", "up", "down"):
            own = grads[f"experts.{name}"].chunk(ep)[rank % ep]
            torch.testing.assert_close(theirs[f"experts.{name}"], own)


def test_every_rank_computes_a_share_of_each_expert(ranks, alone):
    out, grad, grads, _ = alone
    for rank, (theirs, their_grad, their_grads) in enumerate(ranks(2, over_tp)):
        torch.testing.assert_close(theirs, out)
        torch.testing.assert_close(their_grad, grad)
        torch.testing.assert_close(their_grads["router.weight"], grads["router.weight"])
        for name, dim in (("gate", 1), ("up", 1), ("down", 2)):
            torch.testing.assert_close(their_grads[f"experts.{name}"], grads[f"experts.{name}"].chunk(2, dim)[rank])


def refuse_three():
    layer = MixtureOfExperts(8, 6, Mixture(3, 1))
    spread_experts(layer, make_mesh(MeshSizes(dp_shard=2, ep=2), "cpu"))


def test_experts_that_ranks_do_not_divide_are_refused(ranks):
    with pytest.raises(ParallelError, match=r"experts: the ranks do not divide the experts(.|\n)*parallel.ep=1"):
        ranks(2, refuse_three)
