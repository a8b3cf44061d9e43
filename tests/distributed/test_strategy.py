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
    for name, weight in found["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], rtol=rtol, atol=atol, msg=name)


def assert_all_same(results, expected, **tolerance):
    """Every rank saw the same, and together they hold all weights (a stage of a pipeline holds some)."""
    for found in results:
        assert_same(found, expected, **tolerance)
    assert {name for found in results for name in found["weights"]} == set(expected["weights"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "gpt", "own"])
def test_every_layout_equals_one_rank(ranks, layout, kind):
    if kind == "own" and "pp" in layout:
        pytest.skip("it has no blocks to lay on stages")
    assert_all_same(ranks(4, one_layout, LAYOUTS[layout], kind), reference(kind))


@pytest.mark.parametrize("layout", ["fsdp", "tp", "tp_fsdp"])
def test_muon_sees_whole_matrices(ranks, layout):
    optim = Optim("muon", lr=1e-2)
    assert_all_same(
        ranks(4, one_layout, LAYOUTS[layout], "llama", optim), reference("llama", optim), rtol=1e-5, atol=1e-7
    )
