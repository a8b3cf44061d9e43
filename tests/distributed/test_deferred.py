"""Models built without memory for their weights."""

from __future__ import annotations

import csv
import gc

import parity
import pytest
import torch

from nemolet.cli import main
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


# ---------------------------------------------------------------- in `nemolet train`


def command(folder, poem, overrides):
    """Train by the command line; the losses, and whether the weights came from a record of how they are made."""
    replayed = []

    class Seen(Deferred):
        def values(self, module):
            replayed.append(all(p.is_meta for p in module.get_submodule("model").parameters()))
            return super().values(module)

    from nemolet.cli import train

    before, train.Deferred = train.Deferred, Seen
    try:
        model = ["model=llama_tiny", "model.layers=2", "model.width=16", "model.heads=2", "model.kv_heads=2"]
        sizes = ["model.context=8", "data.sequence_length=8", "tokenizer=char", "sample.max_new_tokens=0"]
        steps = ["trainer.max_steps=3", "trainer.log_every=1", "trainer.valid_every=3", "schedule.warmup_steps=1"]
        places = [f"data.path={poem}", f"data.cache={folder.parent / 'tokens'}", f"folder={folder}"]
        quiet = ["trainer.loggers=[]", "trainer.accelerator=cpu", "trainer.progress=false"]
        assert main(["train", *model, *sizes, *steps, *places, *quiet, *overrides]) == 0
    finally:
        train.Deferred = before
    with (folder / "metrics.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]], replayed


def test_training_by_config_builds_on_each_rank_only_its_part(ranks, poem, tmp_path):
    alone, replayed = command(tmp_path / "one", poem, ["data.batch_size=4"])
    assert not replayed and len(alone) == 3
    for name, batch in {"fsdp": 2, "tp": 4, "pp": 4}.items():
        overrides = [f"parallel={name}", "trainer.devices=2", f"data.batch_size={batch}"]
        if name != "fsdp":
            overrides.append(f"parallel.{name}=2")
        for losses, replayed in ranks(2, command, tmp_path / name, poem, overrides):
            assert replayed == [True]
            assert losses == pytest.approx(alone, rel=1e-5)


def test_a_model_is_filled_on_one_rank():
    torch.manual_seed(0)
    expected = parity.build("gpt")
    torch.manual_seed(0)
    with Deferred() as deferred:
        model = parity.build("gpt")
    deferred.fill(model)
    assert len(list(model.parameters())) == len(list(expected.parameters()))  # tied weights are one
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
