"""Models built without memory for their weights."""

from __future__ import annotations

import gc

import parity
import pytest
import torch

from nemolet.errors import ParallelError
from nemolet.parallel import MeshSizes, make_mesh, parallelize
from nemolet.parallel.deferred import Deferred
from nemolet.parallel.plan import plan


def weights(name, sizes):
    """Whole weights of a model that was built on no device, and the random state it left."""
    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    with Deferred() as deferred:
        graph = parity.build(name)
    assert all(parameter.is_meta for parameter in graph.parameters())
    parallelize(graph, plan(graph, sizes=mesh.sizes), mesh, deferred=deferred)
    found = {name: parity.whole(parameter) for name, parameter in graph.named_parameters()}
    return found, dict(graph.named_buffers()), torch.get_rng_state()


@pytest.mark.parametrize("name", ["gpt", "llama", "padded"])
@pytest.mark.parametrize(
    "sizes", [{"dp_shard": 2}, {"tp": 2}, {"dp_shard": 2, "tp": 2}], ids=lambda sizes: " ".join(sizes)
)
def test_weights_are_those_of_one_rank(ranks, name, sizes):
    alone = parity.build(name)
    state = torch.get_rng_state()
    for found, buffers, random in ranks(MeshSizes(**sizes).world, weights, name, sizes):
        assert found.keys() == dict(alone.named_parameters()).keys()
        for key, parameter in alone.named_parameters():
            assert torch.equal(found[key], parameter), key
        for key, buffer in alone.named_buffers():
            assert torch.equal(buffers[key], buffer), key
        assert torch.equal(random, state)


def trained(name, sizes):
    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    with Deferred() as deferred:
        graph = parity.build(name)
    parallelize(graph, plan(graph, sizes=mesh.sizes), mesh, deferred=deferred)
    return parity.train(graph, mesh.data_rank, mesh.data_ranks)


def test_a_model_built_so_trains_as_one_rank(ranks, expected):
    for found in ranks(4, trained, "gpt", {"dp_shard": 2, "tp": 2}):
        parity.assert_same(found, expected("gpt"))


def test_only_one_whole_weight_exists_at_a_time():
    with Deferred() as deferred:
        model = torch.nn.Sequential(*(torch.nn.Linear(9, 7) for _ in range(5)))

    def alive():
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        return len({t.data_ptr() for t in tensors if t.shape == (7, 9) and not t.is_meta})

    most = 0
    for _ in deferred.values(model):
        most = max(most, alive())
    assert most == 1


def test_values_nobody_knows_are_refused():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(ParallelError, match="nobody knows the value"):
        list(Deferred().values(model))


def test_seeds_sown_again_inside_are_kept():
    def make():
        torch.manual_seed(3)
        first = torch.nn.Linear(3, 3)
        torch.manual_seed(3)
        return torch.nn.Sequential(first, torch.nn.Linear(3, 3), torch.nn.Dropout())

    with Deferred() as deferred:
        model = make()
    there = dict(make().named_parameters())
    for name, value in deferred.values(model):
        assert torch.equal(value, there[name])
