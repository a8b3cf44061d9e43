"""What can be chosen beside the sizes: precision, resharding, memory of the host, compilation."""

from __future__ import annotations

import unittest.mock

import parity
import pytest
import torch
from torch import nn

from nemolet.errors import ParallelError
from nemolet.parallel import MeshSizes, make_mesh, parallelize
from nemolet.parallel.plan import plan


@pytest.mark.parametrize("options", [{"reshard": False}, {"reshard": True}, {"cpu_offload": True}], ids=str)
def test_where_parameters_wait_changes_nothing(ranks, expected, options):
    for found in ranks(2, parity.on_mesh, "llama", {"dp_shard": 2}, **options):
        parity.assert_same(found, expected("llama"))


def first_gradients(sizes, **options):
    """Gradients of one micro-batch, which every rank has a share of."""
    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    graph = parity.build("llama")
    parallelize(graph, plan(graph, sizes=mesh.sizes), mesh, **options)
    micro = next(parity.windows())[0]
    loss, _ = graph(**{name: value.chunk(mesh.data_ranks)[mesh.data_rank] for name, value in micro.items()})
    loss.backward()
    return {name: parity.whole(p.grad) for name, p in graph.named_parameters()}


def by_hand(param_dtype, shares):
    """What low precision should give: computed with rounded parameters, summed over shares in float32."""
    total = {}
    for share in range(shares):
        graph = parity.build("llama").to(param_dtype)
        loss, _ = graph(**{name: value.chunk(shares)[share] for name, value in next(parity.windows())[0].items()})
        loss.backward()
        for name, p in graph.named_parameters():
            total[name] = total.get(name, 0) + p.grad.float()
    return total


@pytest.mark.parametrize("sizes", [{"dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 2}], ids=["fsdp", "hsdp"])
def test_low_precision_is_summed_in_float32(ranks, sizes):
    options = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    world = MeshSizes(**sizes).world
    expected = by_hand(torch.bfloat16, world)
    for found in ranks(world, first_gradients, sizes, **options):
        for name, gradient in expected.items():
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name], gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max().item())


def compiled(sizes):
    """Every block in one graph without breaks; traced only, since making kernels would take minutes."""
    with unittest.mock.patch.object(nn.Module, "compile", _traced):
        found = parity.on_mesh("llama", sizes, {"layers": 1}, compile=True)
    torch._dynamo.reset()
    return found


def _traced(module, _compile=nn.Module.compile):
    _compile(module, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("sizes", [{"dp_shard": 2}, {"tp": 2}, {"dp_shard": 2, "tp": 2}], ids=["fsdp", "tp", "both"])
def test_compiled_blocks_train_as_plain_ones(ranks, expected, sizes):
    for found in ranks(MeshSizes(**sizes).world, compiled, sizes, limit=300):
        parity.assert_same(found, expected("llama", layers=1))


def refused(sizes, **options):
    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    graph = parity.build("gpt")
    parallelize(graph, plan(graph, sizes=options.pop("planned", mesh.sizes)), mesh, **options)


@pytest.mark.parametrize(
    "sizes, options, message",
    [
        ({"dp_replicate": 2}, {"param_dtype": torch.bfloat16}, "bf16-mixed"),
        ({"dp_replicate": 2}, {"cpu_offload": True}, "dp_shard"),
        ({"dp_shard": 2}, {"checkpointing": "every_other"}, "every_2"),
        ({"dp_shard": 2}, {"planned": MeshSizes(tp=2)}, "another mesh"),
        ({"dp_shard": 1}, {}, "start 1 ranks"),
    ],
)
def test_impossible_options_are_refused_on_every_rank(ranks, sizes, options, message):
    with pytest.raises(ParallelError, match=message):
        ranks(2, refused, sizes, **options)
