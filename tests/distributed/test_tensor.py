"""Tensor and sequence parallelism against one rank, alone and with data parallelism."""

from __future__ import annotations

import parity
import pytest

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
