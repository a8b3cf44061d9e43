"""Products in eight bits, emulated: the numbers are those of torchao's own layer, and models learn with them."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import nemolet as nl
from nemolet.errors import ShapeError, TrainingError
from nemolet.nn import Adapter, adapt
from nemolet.training import experiment
from nemolet.training.float8 import Float8Product, in_float8

float8 = pytest.importorskip("torchao.float8", reason="torchao is an extra")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [32, 7])
def test_a_layer_computes_what_torchaos_layer_computes(autocast, rows):
    ours = nl.nn.Linear("D", "F", 32, 64, bias=True)
    theirs = nn.Linear(32, 64)
    theirs.load_state_dict(ours.state_dict())
    config = float8.Float8LinearConfig(emulate=True, pad_inner_dim=True)
    theirs = float8.convert_to_float8_training(nn.Sequential(theirs), config=config)[0]
    plain = torch.randn(2, rows, 32)
    # Their layer asks autocast for a GPU's precision, so it gets what a GPU's autocast would hand it.
    given = plain.bfloat16() if autocast else plain
    inputs = [plain.clone().requires_grad_(), given.clone().requires_grad_()]
    with in_float8(ours, emulate=True) as staying, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert staying == []
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
    adapt(model, Adapter(rank=2, targets=("attention.out",)))
    with in_float8(model, emulate=True) as staying:
        eight = [name for name, m in model.named_modules() if isinstance(getattr(m, "product", None), Float8Product)]
    assert [name.split(".blocks.0.")[1] for name in eight] == ["attention.qkv"]
    layers = ["attention.out", "feed_forward.up", "feed_forward.gate", "feed_forward.down"]
    assert [name.split(".blocks.0.")[1] for name in staying] == layers
    assert not any(isinstance(getattr(m, "product", None), Float8Product) for m in model.modules())


def test_a_part_that_no_gpu_multiplies_is_refused():
    """Emulated products take any part; those of a GPU do not."""
    layer = nl.nn.Linear("D", "F", 32, 48)
    with in_float8(layer, emulate=True):
        layer.weight = nn.Parameter(layer.weight[:24].detach())  # as on one of two ranks
        with pytest.raises(ShapeError, match=r"smaller parallel\.tp"):
            layer(torch.ones(2, 32))


def test_training_by_config_multiplies_in_eight_bits_of_bf16(poem, tmp_path, monkeypatch):
    seen, plain = set(), Float8Product.__call__

    def watched(self, hidden, weight, bias):
        result = plain(self, hidden, weight, bias)
        seen.add((weight.dtype, result.dtype))
        return result

    monkeypatch.setattr(Float8Product, "__call__", watched)
    monkeypatch.setattr(experiment, "in_float8", functools.partial(in_float8, emulate=True))
    corpus = nl.data.Corpus(path=str(poem), cache=str(tmp_path), sequence_length=16, batch_size=4)
    data = corpus.prepare(nl.data.TokenizerSpec("char"))
    model = nl.language.CausalLM(vocab_size=data.tokenizer.vocab_size, layers=1, width=16, heads=2, context=16)
    training = nl.training.Training(max_steps=2, precision="fp8-mixed", loggers=(), progress=False)
    schedule = nl.training.Schedule(warmup_steps=1)
    nl.training.fit(
        model, nl.language.CrossEntropy(), data, folder=tmp_path / "run", training=training, schedule=schedule
    )
    assert seen == {(torch.float32, torch.bfloat16)}
    assert all(layer.product is nn.functional.linear for layer in model.modules() if isinstance(layer, nl.nn.Linear))


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_model_learns_in_eight_bits_as_in_single(checkpointing):
    tokens = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(1))
    losses = {}
    for eight in (False, True):
        torch.manual_seed(0)
        sizes = {"layers": 2, "width": 32, "heads": 2, "ffn_width": 64, "context": 16}
        model = nl.language.CausalLM(vocab_size=32, checkpointing=checkpointing, **sizes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with in_float8(model, emulate=True) if eight else nullcontext([]) as staying:
            assert staying == []
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
        in_float8(model).__enter__()
    assert "no GPU" in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(TrainingError, match=r"found +8\.0"):
        in_float8(model).__enter__()
