"""A sequence over several ranks gives the losses and gradients of one rank."""

import pytest
import torch
import torch.distributed as dist

import nemolet as nl
from nemolet.errors import ParallelError
from nemolet.nn.attention import AttentionOptions
from nemolet.nn.router import Mixture
from nemolet.parallel.context import in_order, own_context, own_places, spread_context
from nemolet.parallel.mesh import MeshSizes, make_mesh

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


def over_cp(kind: str, packing: str):
    group = make_mesh(MeshSizes(cp=dist.get_world_size()), "cpu").axis("cp").get_group()
    graph = make(kind)
    spread_context(graph, group)
    return run(graph, own_context(data(packing), graph.input_ports, group))


@pytest.mark.parametrize("packing", ["plain", "packed", "padded"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_sequence_over_two_ranks(ranks, kind, packing):
    check(ranks(2, over_cp, kind, packing), kind, packing)


@pytest.mark.parametrize(("kind", "packing"), [("llama", "packed"), ("llama", "plain"), ("moe", "plain")])
def test_a_sequence_over_four_ranks(ranks, kind, packing):
    check(ranks(4, over_cp, kind, packing), kind, packing)


def check(results, kind, packing):
    loss, count, grads = run(make(kind), data(packing))
    assert sum(each[1] for each in results) == count
    torch.testing.assert_close(sum(each[0] for each in results), loss)
    for name, grad in grads.items():
        torch.testing.assert_close(sum(each[2][name] for each in results), grad, msg=name)


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
