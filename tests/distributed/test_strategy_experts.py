"""Experts and shared sequences through Lightning's Trainer: the same updates, and the same balance, as on one rank."""

from __future__ import annotations

import pytest
import torch
import training_runs as runs
from test_strategy import assert_all_same

import nemolet as nl
from nemolet.nn.router import Mixture, routers
from nemolet.training import MeshStrategy, training_graph

_others = runs.make_graph


def make_graph(kind="llama"):
    if kind != "moe":
        return _others(kind)
    torch.manual_seed(0)
    mixture = Mixture(4, 2, balance_loss=0.1, z_loss=0.01, balance_rate=0.01)
    model = nl.language.CausalLM(vocab_size=12, layers=2, width=16, heads=4, kv_heads=2, context=32, experts=mixture)
    return training_graph(model, nl.language.CrossEntropy())


runs.make_graph = make_graph  # here and in the workers, which import this file too


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
