"""A sequence over several ranks gives the losses and gradients of one rank."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

import nemolet as nl
from nemolet.errors import ParallelError
from nemolet.nn.attention import Attention, AttentionOptions, scaled_dot_product
from nemolet.nn.mask import AttentionMask
from nemolet.nn.router import Mixture
from nemolet.parallel import ring
from nemolet.parallel.context import ContextAttention, in_order, own_context, own_places, spread_context
from nemolet.parallel.mesh import MeshSizes, make_mesh
from nemolet.parallel.ring import RingAttention

MODELS = {
    "llama": {"kv_heads": 2, "qk_norm": True},
    "gpt": {"norm": "layer", "activation": "gelu", "gated": False, "position": "learned", "bias": True},
    "window": {"window": 5},
    "capped": {"attention": AttentionOptions(softcap=3.0)},
    "moe": {"experts": Mixture(4, 2, balance_loss=0.5, z_loss=0.1)},
    "recomputed": {"checkpointing": "full"},
}


def make(kind: str) -> nl.Graph:
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=13, layers=2, width=8, heads=4, context=16, **MODELS[kind]).double()
    inputs = {
        "tokens": nl.Input(nl.TokenIdsBT, "tokens"),
        "segments": nl.Input(nl.SegmentsBT, "segments", optional=True),
        "positions": nl.Input(nl.PositionsBT, "positions", optional=True),
        "mask": nl.Input(nl.MaskBT, "mask", optional=True),
    }
    labels = nl.Input(nl.LabelsBT, "labels")
    return nl.Graph(nl.language.CrossEntropy()(logits=model(**inputs), labels=labels), names={"model": model})


def data(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    batch = {"tokens": torch.randint(0, 13, (2, 16)), "labels": torch.randint(0, 13, (2, 16))}
    batch["labels"][0, :3] = -100
    if kind == "packed":
        batch["segments"] = torch.tensor([[1] * 5 + [2] * 11, [1] * 9 + [2] * 4 + [0] * 3])
        batch["positions"] = torch.tensor([[*range(5), *range(11)], [*range(9), *range(4), *range(3)]])
        batch["labels"][1, 13:] = -100
    if kind == "padded":
        batch["mask"] = torch.arange(16)[None] < torch.tensor([[16], [10]])
        batch["labels"][1, 10:] = -100
    return batch


def run(graph: nl.Graph, batch: dict[str, torch.Tensor]):
    loss, count = graph(**batch)
    loss.backward()
    return loss.detach(), count, {name: p.grad for name, p in graph.named_parameters()}


def over_cp(kind: str, packing: str, core=ContextAttention):
    group = make_mesh(MeshSizes(cp=dist.get_world_size()), "cpu").axis("cp").get_group()
    graph = make(kind)
    spread_context(graph, group, core)
    return run(graph, own_context(data(packing), graph.input_ports, group))


def gathered(kinds, packing: str):
    return {kind: over_cp(kind, packing) for kind in kinds}


def in_rings(kinds, packing: str, kernel: bool):
    with mock.patch.object(ring, "_has_kernel", lambda query: kernel):
        return {kind: over_cp(kind, packing, RingAttention) for kind in kinds}


@pytest.mark.parametrize("packing", ["plain", "packed", "padded"])
def test_a_sequence_over_two_ranks(ranks, packing):
    check(ranks(2, gathered, MODELS, packing), packing)


@pytest.mark.parametrize(("kinds", "packing"), [(["llama"], "packed"), (["llama", "moe"], "plain")])
def test_a_sequence_over_four_ranks(ranks, kinds, packing):
    check(ranks(4, gathered, kinds, packing), packing)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain torch"])
@pytest.mark.parametrize("packing", ["plain", "packed", "padded"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_sequence_in_a_ring(ranks, world, packing, kernel):
    kinds = [kind for kind in MODELS if kind not in ("capped", "moe")] if world == 2 else ["llama", "window"]
    check(ranks(world, in_rings, kinds, packing, kernel), packing)


def check(results, packing):
    for kind in results[0]:
        found = [each[kind] for each in results]
        loss, count, grads = run(make(kind), data(packing))
        assert sum(each[1] for each in found) == count, kind
        torch.testing.assert_close(sum(each[0] for each in found), loss, msg=kind)
        for name, grad in grads.items():
            torch.testing.assert_close(sum(each[2][name] for each in found), grad, msg=f"{kind}: {name}")


def drawn(dtype):
    """Queries, keys and values, a mask in which each query sees itself, and a gradient."""
    numbers = torch.Generator().manual_seed(3)
    query, grad = (torch.randn(2, 16, 4, 8, generator=numbers).to(dtype) for _ in range(2))
    key, value = (torch.randn(2, 16, 2, 8, generator=numbers).to(dtype) for _ in range(2))
    allowed = (torch.rand(2, 1, 16, 16, generator=numbers) < 0.3) | torch.eye(16, dtype=torch.bool)
    return [query, key, value], allowed, grad


def attended(core, tensors, mask, grad):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    mixed = core(*tensors, mask, 0.0)
    mixed.backward(grad)
    return [mixed.detach(), *(tensor.grad for tensor in tensors)]


def ring_alone(dtype, masked, kernel):
    """This rank's part of what a ring makes of all, where no query is earlier than another."""
    group = make_mesh(MeshSizes(cp=dist.get_world_size()), "cpu").axis("cp").get_group()
    places = own_places(16, dist.get_world_size(), dist.get_rank())
    tensors, allowed, grad = drawn(dtype)
    mask = AttentionMask(allowed[:, :, places] if masked else None, causal=False)
    with mock.patch.object(ring, "_has_kernel", lambda query: kernel):
        core = RingAttention(group, scaled_dot_product)
        return attended(core, [each[:, places] for each in tensors], mask, grad[:, places])


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain torch"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_a_ring_without_order(ranks, dtype, masked, kernel):
    tensors, allowed, grad = drawn(dtype)
    mask = AttentionMask(allowed if masked else None, causal=False)
    expected = attended(scaled_dot_product, tensors, mask, grad)
    parts = ranks(4, ring_alone, dtype, masked, kernel)
    tolerance = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    for found, whole in zip(zip(*parts), expected):
        torch.testing.assert_close(in_order(torch.cat(found, dim=1), 4, 1), whole, **tolerance)


def in_a_ring(kind: str, dropout: float):
    model = make(kind).model
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.dropout = dropout
    group = make_mesh(MeshSizes(cp=2), "cpu").axis("cp").get_group()
    spread_context(model, group, RingAttention)
    model(torch.zeros(1, 4, dtype=torch.long), positions=torch.arange(4)[None])


def test_what_a_ring_cannot_do_is_refused(ranks):
    with pytest.raises(ParallelError, match=r"bounded scores cannot be had(.|\n)*cp_attention=gather"):
        ranks(2, in_a_ring, "capped", 0.0)
    with pytest.raises(ParallelError, match=r"dropout of attention weights cannot be had(.|\n)*cp_attention=gather"):
        ranks(2, in_a_ring, "llama", 0.1)


def test_every_rank_has_the_same_work():
    """Under a causal mask the place of a token says how many keys it sees."""
    for ranks in (1, 2, 4):
        work = {int((own_places(32, ranks, rank) + 1).sum()) for rank in range(ranks)}
        assert len(work) == 1
        places = torch.cat([own_places(32, ranks, rank) for rank in range(ranks)])
        assert in_order(places, ranks, 0).tolist() == list(range(32))


def refuse(length: int, positions: bool):
    group = make_mesh(MeshSizes(cp=2), "cpu").axis("cp").get_group()
    ports = dict(make("llama").input_ports)
    if not positions:
        del ports["positions"]
    own_context({"tokens": torch.zeros(1, length, dtype=torch.long)}, ports, group)


def continue_from_a_cache():
    group = make_mesh(MeshSizes(cp=2), "cpu").axis("cp").get_group()
    model = make("llama").model
    spread_context(model, group)
    cache = model.new_cache(1, 16)
    cache.advance(4, None)
    model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_what_cannot_be_shared_is_refused(ranks):
    with pytest.raises(ParallelError, match=r"batch.tokens: the sequence cannot be shared(.|\n)*sequence_length=8"):
        ranks(2, refuse, 10, True)
    with pytest.raises(ParallelError, match="the graph takes no positions"):
        ranks(2, refuse, 8, False)
    with pytest.raises(ParallelError, match="cannot be continued from a cache"):
        ranks(2, continue_from_a_cache)
