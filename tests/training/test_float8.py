"""Products in eight bits, emulated: the numbers are those of torchao's own layer, and models learn with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nemolet as nl
from nemolet.errors import TrainingError
from nemolet.training.float8 import Float8Product, use_float8

float8 = pytest.importorskip("torchao.float8", reason="torchao is an extra")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [32, 7])
def test_a_layer_computes_what_torchaos_layer_computes(autocast, rows):
    ours = nl.nn.Linear("D", "F", 32, 64, bias=True)
    theirs = nn.Linear(32, 64)
    theirs.load_state_dict(ours.state_dict())
    config = float8.Float8LinearConfig(emulate=True, pad_inner_dim=True)
    theirs = float8.convert_to_float8_training(nn.Sequential(theirs), config=config)[0]
    assert use_float8(ours, emulate=True) == []
    plain = torch.randn(2, rows, 32)
    # Their layer asks autocast for a GPU's precision, so it gets what a GPU's autocast would hand it.
    given = plain.bfloat16() if autocast else plain
    inputs = [plain.clone().requires_grad_(), given.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own = ours(inputs[0])
    other = theirs(inputs[1])
    assert own.dtype == other.dtype
    assert torch.equal(own, other)
    assert not torch.equal(own.float(), nn.functional.linear(plain, ours.weight, ours.bias))
    for result in (own, other):
        result.float().square().sum().backward()
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    assert torch.equal(inputs[0].grad, inputs[1].grad.float())


def test_layers_of_other_sizes_are_named_and_stay():
    model = nl.language.CausalLM(vocab_size=30, layers=1, width=16, heads=2, ffn_width=24, context=8)
    odd = use_float8(model, emulate=True)
    eight = [name for name, m in model.named_modules() if isinstance(getattr(m, "product", None), Float8Product)]
    assert odd
    assert all("ffn" in name or "feed" in name for name in odd)
    assert eight
    assert not set(odd) & set(eight)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_model_learns_in_eight_bits_as_in_single(checkpointing):
    tokens = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(1))
    losses = {}
    for eight in (False, True):
        torch.manual_seed(0)
        sizes = {"layers": 2, "width": 32, "heads": 2, "ffn_width": 64, "context": 16}
        model = nl.language.CausalLM(vocab_size=32, checkpointing=checkpointing, **sizes)
        if eight:
            assert use_float8(model, emulate=True) == []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(40):
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[eight] = loss.item()
    assert losses[True] < 1.0
    assert losses[True] == pytest.approx(losses[False], abs=0.25)
    assert losses[True] != losses[False]


def test_without_such_a_gpu_it_is_refused(monkeypatch):
    model = nl.nn.Linear("D", "F", 16, 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="fp8-mixed needs a GPU") as caught:
        use_float8(model)
    assert "no GPU" in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(TrainingError, match=r"found +8\.0"):
        use_float8(model)
