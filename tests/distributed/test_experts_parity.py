"""Whole models of experts, and whole models on shared sequences, train as on one rank in every layout."""

import parity
import pytest

from nemolet.nn.router import Mixture

EXPERTS = {"kv_heads": 2, "tied": False, "experts": Mixture(4, 2, balance_loss=0.1, z_loss=0.01)}


def on_mesh(sizes, options):
    parity.MODELS["moe"] = EXPERTS
    return parity.on_mesh("moe", sizes, **options)


@pytest.fixture(scope="module")
def alone():
    parity.MODELS["moe"] = EXPERTS
    return parity.train(parity.build("moe"))


WHOLE = {"rules": {"activations": {"T": "cp"}}}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"dp_shard": 2}, {}),
        ({"dp_shard": 2, "ep": 2}, {}),
        ({"dp_shard": 4, "ep": 2}, {}),
        ({"dp_replicate": 2, "dp_shard": 2, "ep": 2}, {}),
        ({"tp": 2}, {}),
        ({"tp": 2}, WHOLE),
        ({"tp": 2, "ep": 2}, {}),
        ({"tp": 2, "ep": 2}, WHOLE),
        ({"dp_shard": 2, "tp": 2, "ep": 2}, {}),
        ({"dp_shard": 2, "tp": 2, "ep": 4}, WHOLE),
    ],
    ids=lambda value: " ".join(f"{k}{v}" for k, v in value.items()) if "rules" not in value else "whole",
)
def test_experts_train_as_on_one_rank(ranks, alone, sizes, options):
    world = parity.MeshSizes(**sizes).world
    for found in ranks(world, on_mesh, sizes, options):
        parity.assert_same(found, alone)
