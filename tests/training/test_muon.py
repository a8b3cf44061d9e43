"""Muon against torch's, and where a processor lacks products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nemolet.training import muon
from nemolet.training.muon import Muon, orthogonal


def trained(make, *, steps=3, shapes=((6, 4), (4, 6), (5, 5))):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = make(weights)
    for step in range(steps):
        for weight in weights:
            weight.grad = torch.sin(weight.detach() + step)
        optimizer.step()
    return weights


def test_every_bit_is_that_of_torch(monkeypatch):
    monkeypatch.setattr(muon, "has_products", lambda dtype: True)
    ours = trained(lambda weights: Muon(weights, lr=0.1, momentum=0.9, weight_decay=0.2))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}
    theirs = trained(lambda weights: torch.optim.Muon(weights, **options))
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 7)])
def test_without_products_in_bfloat16_it_is_as_exact_as_float32(monkeypatch, shape):
    monkeypatch.setattr(muon, "has_products", lambda dtype: dtype is not torch.bfloat16)
    matrix = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonal(matrix).double(), left @ values.diag() @ right, rtol=0, atol=1e-5)


def test_zeros_have_no_direction():
    still = torch.zeros(3, 2)
    assert torch.equal(orthogonal(still).float(), still)


def test_nothing_moves_without_a_gradient():
    still, moving = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    moving.grad = torch.rand(3, 2)
    Muon([still, moving], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(3, 2)) and not torch.equal(moving, torch.ones(3, 2))
