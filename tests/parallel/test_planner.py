"""Bytes on a rank, and costs of layers, against counting by hand."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import nemolet as nl
from nemolet.errors import ParallelError
from nemolet.nn.router import Mixture
from nemolet.parallel.costs import balanced, layer_costs
from nemolet.parallel.mesh import MeshSizes
from nemolet.parallel.plan import plan
from nemolet.parallel.planner import memory, saved_bytes
from nemolet.parallel.recompute import recompute
from nemolet.parallel.rules import Rules
from nemolet.parallel.settings import Parallel
from nemolet.training.graphs import training_graph
from nemolet.training.optim import Optim, states

BATCH = {name: torch.zeros(2, 8, dtype=torch.long, device="meta") for name in ("tokens", "labels")}


def graph(**changes):
    base = {"vocab_size": 64, "layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 64, "tied": False}
    with torch.device("meta"):
        return training_graph(nl.language.CausalLM(**{**base, **changes}), nl.language.CrossEntropy())


def test_parameters_gradients_and_states_are_exact():
    whole = graph()
    numbers = sum(p.numel() for p in whole.parameters())
    (alone,) = memory(whole, plan(whole), BATCH)
    assert (alone.numbers, alone.parameters, alone.gradients) == (numbers, 4 * numbers, 4 * numbers)
    assert alone.optimizer == 8 * numbers and alone.gathered == 0
    kept = states(Optim("muon"), whole)  # two numbers for embeddings and norms, one for matrices
    assert memory(whole, plan(whole), BATCH, states=kept)[0].optimizer == 4 * sum(kept.values()) < 8 * numbers
    (half,) = memory(whole, plan(whole, sizes=MeshSizes(dp_shard=2)), BATCH)
    assert half.numbers == numbers / 2
    block = sum(p.numel() for p in whole.get_submodule("model.graph.decoder.blocks.0").parameters())
    assert half.gathered == 12 * block


def test_copies_remember_their_rows_only():
    whole = graph()
    numbers = sum(p.numel() for p in whole.parameters())
    sizes = MeshSizes(dp_replicate=4)
    (part,) = memory(whole, plan(whole, sizes=sizes), BATCH, parallel=Parallel(dp_replicate=4, shard_optimizer=True))
    assert (part.parameters, part.gradients, part.optimizer) == (4 * numbers, 4 * numbers, 2 * numbers)


def test_stages_hold_all_parameters_once():
    whole = graph()
    numbers = sum(p.numel() for p in whole.parameters())
    stages = memory(whole, plan(whole, sizes=MeshSizes(pp=2)), BATCH)
    assert sum(stage.numbers for stage in stages) == numbers and [s.layers for s in stages] == [2, 2]
    assert stages[0].activations > stages[1].activations  # the first holds more micro-batches at once
    given = memory(whole, plan(whole, sizes=MeshSizes(pp=2)), BATCH, parallel=Parallel(pp=2, layers=[1, 3]))
    assert [s.layers for s in given] == [1, 3]
    woven = memory(whole, plan(whole, sizes=MeshSizes(pp=2)), BATCH, parallel=Parallel(pp=2, schedule="interleaved"))
    assert sum(stage.numbers for stage in woven) == numbers and [s.layers for s in woven] == [2, 2]


def test_activations_are_those_that_autograd_keeps():
    """A feed-forward keeps what enters, the two wide results, the activated one and the product."""
    layer = nl.nn.FeedForward(32, 64, activation="silu", gated=True)
    with torch.device("meta"):
        block = nl.nn.FeedForward(32, 64, activation="silu", gated=True)
    hidden = torch.zeros(2, 8, 32, requires_grad=True)
    seen, weights = {}, {p.data_ptr() for p in layer.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            seen[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden)
    real = sum(t.untyped_storage().nbytes() for t in seen.values())
    counted = saved_bytes(block, plan(block), {"hidden": hidden.detach().to("meta").requires_grad_()})
    assert sum(counted.values()) == real == 4 * 2 * 8 * (32 + 4 * 64)


def test_activations_are_divided_as_the_plan_cuts_them():
    whole = graph(layers=1)
    name = "model.graph.decoder.blocks.0"
    alone = saved_bytes(whole, plan(whole), BATCH)
    cut = saved_bytes(whole, plan(whole, sizes=MeshSizes(tp=2)), BATCH)
    some = saved_bytes(whole, plan(whole, Rules.of({"activations": {"T": "cp"}}), MeshSizes(tp=2)), BATCH)
    shared = saved_bytes(whole, plan(whole, sizes=MeshSizes(cp=2)), BATCH)
    entry = 4 * 2 * 8 * 32
    # All is halved but what the two branches gather, which a column keeps whole.
    assert cut[name] == (alone[name] - 2 * entry) / 2 + 2 * entry
    assert cut[name] < some[name] < alone[name]
    assert abs(shared[name] - alone[name] / 2) < 0.01 * alone[name]
    assert alone["entry"] == entry and cut["entry"] == entry / 2


def test_recomputing_keeps_what_enters_a_block():
    whole, options = graph(), {}
    for name in ("none", "every_2", "full"):
        (options[name],) = memory(whole, plan(whole), BATCH, parallel=Parallel(dp_replicate=2, checkpointing=name))
    assert options["full"].activations < options["every_2"].activations < options["none"].activations
    (low,) = memory(whole, plan(whole, sizes=MeshSizes(dp_shard=2)), BATCH, parallel=Parallel(param_dtype="bfloat16"))
    assert low.activations < options["none"].activations


def test_experts_count_as_often_as_they_are_used():
    whole = graph(experts=Mixture(number=8, per_token=2))
    costs = layer_costs(whole, plan(whole))
    attention, router, expert = 32 * 32 * 2 + 2 * 2 * 8 * 32, 8 * 32, 3 * 64 * 32
    assert costs["model.graph.decoder.blocks.0"] == attention + router + 2 * expert
    assert costs["last"] == 64 * 32 and costs["first"] == 0
    assert memory(whole, plan(whole, sizes=MeshSizes(dp_shard=4, ep=2)), BATCH)[0].activations > 0


@pytest.mark.parametrize(
    "costs, stages, ends, expected",
    [
        ([1] * 8, 4, {}, [2, 2, 2, 2]),
        ([1] * 10, 4, {"last": 2}, [3, 3, 3, 1]),
        ([1] * 6, 2, {"first": 2, "last": 2}, [3, 3]),
        ([4, 1, 1, 1, 1], 2, {}, [1, 4]),
    ],
)
def test_layers_are_split_evenly(costs, stages, ends, expected):
    assert balanced(costs, stages, **ends) == expected


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ParallelError, match=r"model\.layers"):
        balanced([1.0], 2)


@pytest.mark.parametrize("checkpointing", ["none", "full", "every_2", "selective"])
def test_activations_are_those_that_stay_in_memory(checkpointing):
    """What two more blocks leave behind in the forward pass, by the profiler's account of the memory."""

    def left_behind(layers):
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 64, "layers": layers}
        model = training_graph(nl.language.CausalLM(**sizes, norm="layer"), nl.language.CrossEntropy())
        recompute([model.get_submodule(name) for stack in plan(model).stacks for name in stack], checkpointing)
        batch = {name: torch.zeros(2, 16, dtype=torch.long) for name in ("tokens", "labels")}
        model(**batch).loss.backward()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            kept = model(**batch)
        del kept
        return sum(event.self_cpu_memory_usage for event in seen.events())

    def counted(layers):
        on_meta = graph(layers=layers, tied=True, norm="layer")
        batch = {name: torch.zeros(2, 16, dtype=torch.long, device="meta") for name in ("tokens", "labels")}
        (stage,) = memory(on_meta, plan(on_meta), batch, parallel=Parallel(dp_replicate=2, checkpointing=checkpointing))
        return stage.activations

    recomputed = {"none": 0, "every_2": 1}.get(checkpointing, 2)  # each keeps the random state it began with
    measured = left_behind(6) - left_behind(4) - recomputed * torch.get_rng_state().numel()
    assert counted(6) - counted(4) == measured


def test_selective_checkpointing_keeps_less_than_all_and_more_than_the_entries():
    whole = graph()
    kept = {}
    for checkpointing in ("none", "selective", "full"):
        for tp in (1, 2):
            derived = plan(whole, sizes=MeshSizes(tp=tp))
            layout = Parallel(dp_replicate=2, tp=tp, checkpointing=checkpointing)
            (stage,) = memory(whole, derived, BATCH, parallel=layout)
            kept[checkpointing, tp] = stage.activations
    for tp in (1, 2):
        assert kept["none", tp] > kept["selective", tp] > kept["full", tp]
    assert kept["selective", 2] < kept["selective", 1]
