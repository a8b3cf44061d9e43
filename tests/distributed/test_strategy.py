"""MeshStrategy through Lightning's Trainer: every layout makes the same updates as one rank."""

from __future__ import annotations

import pytest
import torch
from runs import LAYOUTS, reference, result, train

from nemolet.training import MeshStrategy, Optim


def one_layout(sizes, kind, optim=None, **options):
    return result(*train(MeshStrategy(**sizes), kind, optim=optim, **options))


def assert_same(found, expected, rtol=1e-6, atol=1e-8):
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-7)
    assert found["valid"] == pytest.approx(expected["valid"], rel=1e-6)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "gpt", "own"])
def test_every_layout_equals_one_rank(ranks, layout, kind):
    for found in ranks(4, one_layout, LAYOUTS[layout], kind):
        assert_same(found, reference(kind))


@pytest.mark.parametrize("layout", ["fsdp", "tp", "tp_fsdp"])
def test_muon_sees_whole_matrices(ranks, layout):
    optim = Optim("muon", lr=1e-2)
    for found in ranks(4, one_layout, LAYOUTS[layout], "llama", optim):
        assert_same(found, reference("llama", optim), rtol=1e-5, atol=1e-7)
