"""Experts and shared sequences through Lightning's Trainer: the same updates, and the same balance, as on one rank."""

from __future__ import annotations

import pytest
import torch
import training_runs as runs
from test_strategy import assert_all_same

from nemolet.nn.router import routers
from nemolet.training import MeshStrategy


def run(strategy):
    found = runs.train(strategy, "moe")
    return runs.result(*found), [router.bias for router in routers(found[0].graph)]


def on_mesh(sizes):
    return run(MeshStrategy(**sizes))


@pytest.fixture(scope="module")
def alone():
    return run("auto")


LAYOUTS = [
    {"dp_shard": 4, "ep": 2},
    {"dp_shard": 2, "tp": 2, "ep": 4},
    {"dp_shard": 2, "cp": 2},
    {"cp": 2, "tp": 2, "ep": 2},
    {"pp": 2, "cp": 2},
    {"pp": 2, "dp_shard": 2, "ep": 2},
]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=lambda sizes: " ".join(f"{k}{v}" for k, v in sizes.items()))
def test_experts_and_shared_sequences_train_as_on_one_rank(ranks, alone, sizes):
    expected, balance = alone
    found = ranks(4, on_mesh, sizes)
    assert_all_same([each for each, _ in found], expected)
    assert any(bias.any() for bias in balance)
    for _, biases in found:  # a stage has some of the routers
        for bias in biases:
            assert any(torch.equal(bias, known) for known in balance)
