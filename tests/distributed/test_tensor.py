"""Tensor and sequence parallelism against one rank, alone and with data parallelism."""

from __future__ import annotations

import string

import parity
import pytest
import torch
import torch.distributed as dist

import nemolet as nl
from nemolet.errors import ParallelError
from nemolet.metrics import TokenAccuracy
from nemolet.parallel import MeshSizes, make_mesh, parallelize
from nemolet.parallel.plan import plan
from nemolet.tokenizers import CharTokenizer
from nemolet.training.graphs import training_graph

TOKENS = torch.arange(16).view(2, 8)

WHOLE_SEQUENCE = {"activations": {"T": ["cp"]}}


@pytest.mark.parametrize("rules", [None, WHOLE_SEQUENCE], ids=["sequence", "no_sequence"])
@pytest.mark.parametrize("model", ["gpt", "llama", "padded"])
def test_tensor_parallelism_trains_as_one_rank(ranks, expected, model, rules):
    for found in ranks(2, parity.on_mesh, model, {"tp": 2}, rules=rules):
        parity.assert_same(found, expected(model))


@pytest.mark.parametrize("rules", [None, WHOLE_SEQUENCE], ids=["sequence", "no_sequence"])
def test_each_rank_has_a_query_head_where_key_value_heads_are_fewer(ranks, expected, rules):
    for found in ranks(2, parity.on_mesh, "multi_query", {"tp": 2}, rules=rules, kv_heads="replicate"):
        parity.assert_same(found, expected("multi_query"))
    for found in ranks(4, parity.on_mesh, "llama", {"tp": 4}, rules=rules, kv_heads="replicate"):
        parity.assert_same(found, expected("llama"))


@pytest.mark.parametrize("rules", [None, WHOLE_SEQUENCE], ids=["sequence", "no_sequence"])
def test_a_layer_can_be_kept_whole(ranks, expected, rules):
    overrides = {"*.blocks.1.attention": "replicate", "*.head": "replicate"}
    for found in ranks(2, parity.on_mesh, "llama", {"tp": 2}, rules=rules, overrides=overrides):
        parity.assert_same(found, expected("llama"))


@pytest.mark.parametrize(
    "model, sizes, options",
    [
        ("gpt", {"dp_shard": 2, "tp": 2}, {}),
        ("llama", {"dp_shard": 2, "tp": 2}, {"rules": WHOLE_SEQUENCE}),
        ("multi_query", {"dp_shard": 2, "tp": 2}, {"kv_heads": "replicate"}),
        ("padded", {"dp_replicate": 2, "tp": 2}, {}),
        ("llama", {"dp_replicate": 2, "dp_shard": 2, "tp": 2}, {}),
    ],
    ids=["gpt", "llama", "multi_query", "copies", "three"],
)
def test_tensor_and_data_parallelism_together(ranks, expected, model, sizes, options):
    for found in ranks(parity.MeshSizes(**sizes).world, parity.on_mesh, model, sizes, **options):
        parity.assert_same(found, expected(model))


@pytest.mark.parametrize("checkpointing", ["full", "every_2", "selective"])
def test_recomputing_activations_changes_nothing(ranks, expected, checkpointing):
    for found in ranks(4, parity.on_mesh, "llama", {"dp_shard": 2, "tp": 2}, checkpointing=checkpointing):
        parity.assert_same(found, expected("llama"))


@pytest.mark.parametrize("rules", [None, WHOLE_SEQUENCE], ids=["sequence", "no_sequence"])
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"tp": 2, "dp_shard": 2}], ids=["tp", "tp_fsdp"])
def test_modules_of_a_user_train_as_on_one_rank(ranks, expected, rules, sizes):
    overrides = {"stack.blocks.1": "replicate"}
    world = parity.MeshSizes(**sizes).world
    for found in ranks(world, parity.on_mesh, "users", sizes, rules=rules, overrides=overrides):
        parity.assert_same(found, expected("users"))


@pytest.mark.parametrize("rules", [None, WHOLE_SEQUENCE], ids=["sequence", "no_sequence"])
def test_a_decoder_with_a_memory_trains_as_on_one_rank(ranks, expected, rules):
    for found in ranks(2, parity.on_mesh, "memory", {"tp": 2}, rules=rules):
        parity.assert_same(found, expected("memory"))


def test_a_rank_may_have_padding_only(ranks, expected):
    """48 rows for 33 tokens: the last of four ranks has no token to score."""
    for found in ranks(4, parity.on_mesh, "padded", {"tp": 4}, kv_heads="replicate"):
        parity.assert_same(found, expected("padded"))


def scores(name):
    """What a model answers that is not trained: all scores, on every rank."""
    mesh = make_mesh(MeshSizes(tp=dist.get_world_size()), "cpu")
    model = parity.build(name).model
    parallelize(model, plan(model, sizes=mesh.sizes, kv_heads="replicate"), mesh)
    return model(TOKENS).detach()


@pytest.mark.parametrize("name, world", [("gpt", 2), ("padded", 4)])
def test_every_rank_sees_all_scores_of_a_model_without_a_loss(ranks, name, world):
    expected = parity.build(name).model(TOKENS)
    for found in ranks(world, scores, name):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def too_long():
    mesh = make_mesh(MeshSizes(tp=2), "cpu")
    graph = parity.build("llama")
    parallelize(graph, plan(graph, sizes=mesh.sizes), mesh)
    graph(tokens=TOKENS[:, :7], labels=TOKENS[:, :7])


def test_a_sequence_that_tp_does_not_divide_is_refused(ranks):
    with pytest.raises(ParallelError, match=r"data\.sequence_length"):
        ranks(2, too_long)


def continued(name, tp):
    graph = parity.build(name).eval()
    if tp > 1:
        mesh = make_mesh(MeshSizes(tp=tp), "cpu")
        parallelize(graph.model, plan(graph.model, sizes=mesh.sizes, kv_heads="replicate"), mesh)
    characters = CharTokenizer(string.ascii_lowercase + " .,!?:;")
    prompts = ["abc", "hello world"]
    return [c.text for c in graph.model.generate(characters, prompts, max_new_tokens=4, temperature=0.0)]


@pytest.mark.parametrize("name, world", [("gpt", 2), ("multi_query", 2)])
def test_generation_is_that_of_one_rank(ranks, name, world):
    expected = continued(name, 1)
    assert ranks(world, continued, name, world) == [expected] * world


def measured(tp):
    """Loss and accuracy, with and without gradients."""
    torch.manual_seed(1)
    model = nl.language.CausalLM(**{**parity.TINY, "pad_vocab_to": 16})
    graph = training_graph(model, nl.language.CrossEntropy(), {"accuracy": TokenAccuracy()})
    if tp > 1:
        mesh = make_mesh(MeshSizes(tp=tp), "cpu")
        derived = plan(graph, sizes=mesh.sizes)
        parallelize(graph, derived, mesh)
    trained = graph(tokens=TOKENS, labels=TOKENS % 5)
    trained["loss"].backward()
    gradient = parity.whole(model.graph.head.weight.grad)
    with torch.no_grad():
        seen = graph(tokens=TOKENS[:, :7], labels=TOKENS[:, :7] % 5)
    return {n: v.item() for n, v in trained.items()}, {n: v.item() for n, v in seen.items()}, gradient


def test_metrics_see_whole_scores_while_the_loss_is_in_parts(ranks):
    expected = measured(1)
    for found in ranks(2, measured, 2):
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
