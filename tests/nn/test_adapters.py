"""Additions of low rank: those of peft, merged and unmerged alike, and nothing else is trained."""

from __future__ import annotations

import copy

import pytest
import torch

import nemolet as nl
from nemolet.errors import ConfigError
from nemolet.nn import AdaptedLinear, Adapter, Linear, adapt, adapted_layers, freeze, merge
from nemolet.training import Optim

TOKENS = torch.arange(12).view(2, 6)


def model():
    torch.manual_seed(0)
    return nl.language.CausalLM(vocab_size=20, layers=2, width=16, heads=4, kv_heads=2)


def disturbed(adapted):
    for index, (_, layer) in enumerate(adapted_layers(adapted)):
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            layer.up.normal_(generator=generator, std=0.3)
            if layer.lengths is not None:
                layer.lengths.mul_(1 + 0.3 * torch.rand(layer.lengths.shape, generator=generator))
    return adapted


@pytest.mark.parametrize("dora", [False, True])
def test_an_addition_is_nothing_at_first(dora):
    plain, adapted = model(), model()
    adapt(adapted, Adapter(rank=2, dora=dora))
    assert torch.allclose(plain(TOKENS), adapted(TOKENS), atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_and_unmerged_are_the_same(dora):
    adapted = model()
    adapt(adapted, Adapter(rank=3, dora=dora))
    before = {name: layer.weight.clone() for name, layer in adapted_layers(adapted)}
    expected = disturbed(adapted)(TOKENS)
    for _, layer in adapted_layers(adapted):
        layer.merge()
    assert (adapted(TOKENS) - expected).abs().max() < 1e-5
    for name, layer in adapted_layers(adapted):
        layer.unmerge()
        assert torch.equal(layer.weight, before[name])
    assert (adapted(TOKENS) - expected).abs().max() < 1e-5
    merge(adapted)
    assert (adapted(TOKENS) - expected).abs().max() < 1e-5
    assert set(adapted.state_dict()) == set(model().state_dict())
    assert all(p.requires_grad for p in adapted.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_unmerging_gives_back_every_bit_and_checkpoints_do_not_know_of_merging(dora, dtype):
    adapted = model().to(dtype)
    adapt(adapted, Adapter(rank=3, alpha=300, dora=dora))
    disturbed(adapted)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    expected = adapted(TOKENS)
    for _, layer in adapted_layers(adapted):
        layer.merge()
        assert not torch.equal(layer.weight, layer.unmerged)
    kept = adapted.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    adapted.double().to(dtype)
    for _, layer in adapted_layers(adapted):
        layer.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())
    for _, layer in adapted_layers(adapted):
        layer.merge()
    adapted.load_state_dict(before)
    assert not any(layer.merged for _, layer in adapted_layers(adapted))
    assert torch.equal(adapted(TOKENS), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_outputs_and_gradients_are_those_of_peft(dora):
    peft = pytest.importorskip("peft", reason="peft is the reference")
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5)
    layer = Linear("D", "F", 6, 5, bias=True)
    with torch.no_grad():
        layer.weight.copy_(base.weight)
        layer.bias.copy_(base.bias)
    theirs = peft.get_peft_model(
        torch.nn.Sequential(base), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], use_dora=dora)
    )
    ours = AdaptedLinear(layer, rank=2, scale=3.0, dora=dora)
    inner = theirs.base_model.model[0]
    torch.nn.init.normal_(inner.lora_B["default"].weight)
    with torch.no_grad():
        ours.down.copy_(inner.lora_A["default"].weight)
        ours.up.copy_(inner.lora_B["default"].weight)
    hidden = torch.randn(3, 6)
    assert torch.allclose(ours(hidden), theirs(hidden), atol=1e-5)
    ours(hidden).square().sum().backward()
    theirs(hidden).square().sum().backward()
    assert torch.allclose(ours.down.grad, inner.lora_A["default"].weight.grad, atol=1e-3)
    assert torch.allclose(ours.up.grad, inner.lora_B["default"].weight.grad, atol=1e-3)
    if dora:
        assert torch.allclose(ours.lengths.grad, inner.lora_magnitude_vector["default"].weight.grad, atol=1e-3)


def test_only_additions_are_trained_and_all_declare_their_axes():
    adapted = model()
    names = adapt(adapted, Adapter(rank=2, targets=("attention.qkv", "feed_forward.*")))
    assert len(names) == 2 * 4
    trained = {name.rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"down", "up"}
    axes = nl.parameter_axes(adapted)
    qkv = "graph.decoder.blocks.0.attention.qkv"
    assert [str(dim[0]) for dim in axes[f"{qkv}.up"]] == ["G=2", "2"]
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    optimizer = Optim(lr=0.1).make(adapted)
    adapted(TOKENS).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in adapted.named_parameters() if name in frozen)


def test_generation_with_a_cache_is_that_of_the_merged_model():
    adapted = disturbed_model()
    merged = merge(copy.deepcopy(adapted))
    tokenizer = nl.tokenizers.CharTokenizer([chr(97 + i) for i in range(20)])
    texts = [m.generate(tokenizer, "abc", max_new_tokens=12, temperature=0.0)[0].text for m in (adapted, merged)]
    assert texts[0] == texts[1]


def disturbed_model():
    adapted = model()
    adapt(adapted, Adapter(rank=2))
    return disturbed(adapted)


def test_targets_that_nothing_matches_are_refused():
    with pytest.raises(ConfigError, match=r"no linear layer has this name[\s\S]*attention.qkv"):
        adapt(model(), Adapter(targets=("q_proj",)))
    with pytest.raises(ConfigError, match="adapted already"):
        adapt(disturbed_model(), Adapter())
    with pytest.raises(ConfigError, match="no parameter has this name"):
        freeze(model(), ["nothing"])


def test_frozen_parameters_stay():
    plain = model()
    frozen = freeze(plain, [r"blocks\.0\..*", "embed.weight"])
    assert frozen
    assert {n for n, p in plain.named_parameters() if not p.requires_grad} == set(frozen)
