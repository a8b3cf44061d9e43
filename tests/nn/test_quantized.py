"""Additions on weights of four bits: the numbers are those of the published table, and only additions are trained."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

import nemolet as nl
from nemolet.errors import MissingPackageError, ShapeError
from nemolet.nn import Adapter, Linear, adapt, adapted_layers, merge
from nemolet.nn.adapter_files import fingerprint, load_adapter, save_adapter

pytest.importorskip("torchao", reason="the numbers are held by torchao")
from nemolet.nn.quantized import nf4, numbers

# Quantiles of a normal distribution, brought to [-1, 1]: appendix E of Dettmers et al. (2023), as in bitsandbytes.
TABLE = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
TOKENS = torch.arange(12).view(2, 6)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nl.language.CausalLM(vocab_size=20, layers=2, width=64, heads=4, kv_heads=2, bias=True).to(dtype)


def quantized(dtype=torch.float32, **settings):
    adapted = model(dtype)
    adapt(adapted, Adapter(rank=2, quantize="nf4", **settings))
    for _, layer in adapted_layers(adapted):
        layer.up.data.normal_(std=0.3)
    return adapted


def test_each_number_is_the_nearest_of_the_table():
    torch.manual_seed(0)
    weight = torch.randn(96, 128) * torch.rand(96, 1)
    blocks, found = weight.view(-1, 64), numbers(nf4(weight)).view(-1, 64)
    scales = found.abs().amax(1, keepdim=True)

    largest = blocks.abs().amax(1, keepdim=True)

    def nearest(values):
        return (values - TABLE[:, None, None]).abs().argmin(0)

    torch.testing.assert_close(found, TABLE[nearest(found / scales)] * scales, rtol=0, atol=1e-3)  # theirs is rounded
    steps = (nearest(found / scales) - nearest(blocks / largest)).abs()  # on the border of two either may be taken
    assert steps.max() <= 1 and steps.float().mean() < 0.002
    bound = (largest - largest.mean()).abs().max() / 127  # scales have eight bits, less what all have in common
    assert (scales - largest).abs().max() <= bound
    assert 0.05 < ((found - blocks).norm() / blocks.norm()).item() < 0.12


@pytest.mark.parametrize("dora", [False, True])
def test_outputs_and_gradients_are_those_of_the_numbers_that_are_held(dora):
    ours, plain = quantized(dora=dora), model()
    for name, layer in adapted_layers(ours):
        plain.get_submodule(name).weight.data.copy_(numbers(layer.weight))
    adapt(plain, Adapter(rank=2, dora=dora))
    own = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(own[name])
    for each in (ours, plain):
        F.cross_entropy(each(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    torch.testing.assert_close(ours(TOKENS), plain(TOKENS), rtol=0, atol=1e-5)
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert own.keys() == trained.keys() and all(name.endswith(("down", "up", "lengths")) for name in own)
    for name, parameter in trained.items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for name, p in ours.named_parameters() if name not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_the_weights_are_plain(dtype, tmp_path):
    adapted = quantized(dtype)
    expected = adapted(TOKENS)
    merge(adapted)
    assert type(adapted.graph.decoder.blocks[0].attention.qkv.weight.data) is torch.Tensor
    bound = 1e-5 if dtype is torch.float32 else 0.05 * expected.abs().max()
    assert (adapted(TOKENS) - expected).abs().max() <= bound
    loaded = nl.load(nl.save(tmp_path / "m.nemolet", model=adapted)).model
    assert torch.equal(loaded(TOKENS), adapted(TOKENS)) and {p.dtype for p in loaded.parameters()} == {dtype}


def test_weights_take_little_more_than_a_quarter_of_those_in_bf16():
    layer = nl.nn.Linear("D", "F", 512, 2048).to(torch.bfloat16)
    held = nf4(layer.weight.detach())
    names, _ = held.__tensor_flatten__()
    share = sum(getattr(held, name).nbytes for name in names) / layer.weight.nbytes
    assert 0.25 < share < 0.28


def test_an_addition_still_belongs_to_the_model_it_was_trained_on(tmp_path):
    adapted = quantized()
    assert fingerprint(adapted) == fingerprint(model())
    save_adapter(adapted, tmp_path / "adapter")
    again = model()
    load_adapter(again, tmp_path / "adapter")
    assert (again(TOKENS) - adapted(TOKENS)).abs().max() < 2.0
    assert nl.nn.adapters.departures(adapted)["adapter"]["graph.decoder.blocks.0.attention.qkv"]["quantize"] == "nf4"


def test_what_is_missing_is_named(monkeypatch):
    odd = torch.nn.Sequential(Linear("D", "D", 8, 8), Linear("D", "D", 6, 6))
    with pytest.raises(ShapeError, match=r"^1: [\s\S]*multiple of 64"):
        adapt(odd, Adapter(rank=2, quantize="nf4"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingPackageError, match=r"nemolet\[quantize\]"):
        nf4(torch.zeros(64, 64))
    with pytest.raises(MissingPackageError, match=r"nemolet\[quantize\]"):
        adapt(odd, Adapter(rank=2, targets=("0",), quantize="nf4"))
    assert not list(adapted_layers(odd)) and all(p.requires_grad for p in odd.parameters())
