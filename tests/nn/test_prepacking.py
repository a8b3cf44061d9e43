"""Weights laid out for a CPU give what they gave before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import nemolet as nl
from nemolet.nn import Adapter, adapt, adapted_layers, merge, prepacking
from nemolet.nn.prepacking import PackedProduct, pack, packed, unpack

pytestmark = pytest.mark.skipif(
    not (prepacking._has_layouts() and prepacking.has_products(torch.float32)),
    reason="this processor has no such products",
)


def layers(*, bias: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    table = nl.nn.Embedding("V", "D", 10, 24, pad_to_multiple_of=16)
    return torch.nn.Sequential(
        nl.nn.Linear("D", "F", 24, 40, bias=bias),
        nl.nn.Linear("F", "D", 40, 24, bias=bias),
        nl.nn.Head("D", "V", tied=table, bias=bias, softcap=3.0),
    )


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 7), (1, 70), (4, 100), (0, 5)])
def test_results_are_the_same(dtype, near, bias, shape):
    model = layers(bias=bias).to(dtype)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    hidden = torch.randn(*shape, 24, dtype=dtype)
    with torch.inference_mode():
        expected = model(hidden)
        with packed(model):
            assert all(isinstance(layer.product, PackedProduct) == prepacking.has_products(dtype) for layer in model)
            first, found = model(hidden), model(hidden)
            for layer in model if prepacking.has_products(dtype) else ():
                gains = layer.product.gains(shape[0] * shape[1], layer.weight.shape[0])
                assert (layer.product.blocks is not None) == gains
    assert torch.equal(first, expected)  # which a layout would not have sped up
    assert found.shape == (*shape, 10) and found.dtype == dtype  # without the table's padding
    torch.testing.assert_close(found, expected, atol=near, rtol=near)
    assert all(layer.product is F.linear for layer in model)


def test_gradients_flow_inside_the_block():
    model, hidden = layers(), torch.randn(2, 3, 24, requires_grad=True)
    model(hidden).sum().backward()
    expected = [hidden.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    model.zero_grad()
    hidden.grad = None
    with packed(model):
        model(hidden).sum().backward()
    for found, wanted in zip([hidden.grad, *(p.grad for p in model.parameters())], expected, strict=True):
        assert torch.equal(found, wanted)


def test_autocast_and_another_type_get_the_ordinary_product():
    model = layers()
    hidden = torch.randn(2, 24)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(hidden)
        with packed(model):
            assert torch.equal(model(hidden), expected)
    with torch.inference_mode(), packed(model), pytest.raises(RuntimeError, match="dtype"):
        model(hidden.double())


def test_rows_of_any_stride():
    model = layers()
    hidden = torch.randn(24, 5, 2).permute(2, 1, 0)
    with torch.inference_mode():
        expected = model(hidden)
        with packed(model):
            model(hidden)
            torch.testing.assert_close(model(hidden), expected)


def changed_by_an_optimizer(model, hidden):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(hidden).square().sum().backward()
    optimizer.step()


def changed_by_loading(model, hidden):
    model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()})


def changed_by_an_adapter(model, hidden):
    adapt(model, Adapter(rank=2))
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.up)
    merge(model)


def test_a_weight_made_in_inference_mode_inside_the_block_is_the_one_that_counts():
    model, hidden = layers(), torch.randn(2, 24)
    with torch.inference_mode(), packed(model):
        model(hidden)
        weight = torch.nn.Parameter(torch.randn(40, 24), requires_grad=False)
        model[0].weight = weight
        assert torch.equal(model[0](hidden), torch.nn.functional.linear(hidden, weight, model[0].bias))


def changed_by_another_weight(model, hidden):
    model[0].weight = torch.nn.Parameter(torch.randn(40, 24))


@pytest.mark.parametrize(
    "change", [changed_by_an_optimizer, changed_by_loading, changed_by_an_adapter, changed_by_another_weight]
)
def test_weights_that_change_inside_the_block_are_laid_out_anew(change):
    model, hidden = layers(), torch.randn(2, 24)
    with packed(model):
        with torch.inference_mode():
            model(hidden)
            before, blocks = model(hidden), model[0].product.blocks
        change(model, hidden)
        with torch.inference_mode():
            again, found = model(hidden), model(hidden)
            assert model[0].product.blocks is not blocks is not None
    assert all(layer.product is F.linear for layer in model)
    with torch.inference_mode():
        torch.testing.assert_close(found, model(hidden))
        torch.testing.assert_close(again, found)
        assert (found - before).abs().max() > 1e-2


def test_adapted_layers_inside_the_block():
    model, hidden = layers(), torch.randn(2, 24)
    with packed(model), torch.inference_mode():
        plain = model(hidden)
    adapt(model, Adapter(rank=2))
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.up)
    with torch.inference_mode():
        expected = model(hidden)
        with packed(model):
            torch.testing.assert_close(model(hidden), expected)
            for _, layer in adapted_layers(model):
                layer.merge()
            torch.testing.assert_close(model(hidden), expected)
            for _, layer in adapted_layers(model):
                layer.unmerge()
            torch.testing.assert_close(model(hidden), expected)
    with packed(model), torch.inference_mode():
        for _, layer in adapted_layers(model):
            torch.nn.init.zeros_(layer.up)
        torch.testing.assert_close(model(hidden), plain)


def test_only_the_outer_of_two_blocks_gives_back():
    model = layers()
    with packed(model):
        with packed(model):
            pass
        assert isinstance(model[0].product, PackedProduct)
    assert model[0].product is F.linear


def test_what_does_not_gain_stays(monkeypatch):
    assert pack(layers().double()) == []
    assert pack(layers().to("meta")) == []
    replaced = layers()
    replaced[0].product = lambda hidden, weight, bias: hidden
    assert pack(replaced) == [replaced[1], replaced[2]]
    unpack(replaced)
    monkeypatch.setattr(prepacking, "_memory", lambda: 1000)  # smaller than four times the weights
    assert pack(layers()) == []


def test_a_text_that_goes_on_stays_the_same():
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=257, context=128, layers=2, width=32, heads=4).eval()
    tokenizer = nl.tokenizers.ByteTokenizer()
    calls = []
    head = next(module for module in model.modules() if isinstance(module, nl.nn.Head))
    head.register_forward_hook(lambda module, *_: calls.append(type(module.product)))
    short = model.generate(tokenizer, ["abc", "d"], max_new_tokens=40, temperature=0)
    assert PackedProduct not in calls
    calls.clear()
    long = model.generate(tokenizer, ["abc", "d"], max_new_tokens=80, temperature=0)
    assert set(calls) == {PackedProduct} and head.product is F.linear
    assert [c.tokens[:40] for c in long] == [c.tokens for c in short]
