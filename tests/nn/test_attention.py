"""Attention against a softmax written with loops; masks against their definition."""

import math

import pytest
import torch

import nemolet as nl
from nemolet.errors import ShapeError
from nemolet.nn.attention import Attention, AttentionOptions, scaled_dot_product
from nemolet.nn.mask import AttentionMask, attention_mask
from nemolet.nn.rope import RotaryEmbedding


def naive_attention(
    layer: Attention, hidden_TD: torch.Tensor, allowed: list[list[bool]], rope_base: float | None = None
) -> torch.Tensor:
    """One sequence, head by head and position by position."""
    length, group, size = hidden_TD.shape[0], layer.queries_per_group, layer.head_size
    weight = layer.qkv.weight.reshape(layer.kv_heads, group + 2, size, -1)
    bias = None if layer.qkv.bias is None else layer.qkv.bias.reshape(layer.kv_heads, group + 2, size)

    def project(g: int, row: int, t: int) -> torch.Tensor:
        vector = weight[g, row] @ hidden_TD[t]
        return vector if bias is None else vector + bias[g, row]

    def normalise(vector: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
        return vector if norm is None else vector / (vector.square().mean() + norm.eps).sqrt() * norm.weight

    def turn(vector: torch.Tensor, t: int) -> torch.Tensor:
        if rope_base is None:
            return vector
        out, half = vector.clone(), size // 2
        for i in range(half):
            angle = t * rope_base ** (-2 * i / size)
            out[i] = vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle)
            out[i + half] = vector[i + half] * math.cos(angle) + vector[i] * math.sin(angle)
        return out

    mixed = torch.zeros(length, layer.heads, size, dtype=hidden_TD.dtype)
    for head in range(layer.heads):
        g, row = divmod(head, group)
        for t in range(length):
            query = turn(normalise(project(g, row, t), layer.query_norm), t)
            visible = [s for s in range(length) if allowed[t][s]]
            keys = [turn(normalise(project(g, group, s), layer.key_norm), s) for s in visible]
            scores = torch.stack([query @ key for key in keys]) / math.sqrt(size)
            weights = scores.exp() / scores.exp().sum()
            mixed[t, head] = sum(w * project(g, group + 1, s) for w, s in zip(weights, visible))
    out = mixed.reshape(length, -1) @ layer.out.weight.T
    return out if layer.out.bias is None else out + layer.out.bias


def causal(length: int) -> list[list[bool]]:
    return [[s <= t for s in range(length)] for t in range(length)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rope", [None, 100.0])
@pytest.mark.parametrize(("head_size", "bias"), [(None, False), (6, True)])
def test_attention_is_a_loop_over_heads_and_positions(kv_heads, qk_norm, rope, head_size, bias):
    torch.manual_seed(0)
    layer = Attention(
        16, 4, kv_heads, options=AttentionOptions(head_size=head_size), bias=bias, qk_norm=qk_norm, init_std=0.5
    ).double()
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_()
    hidden = torch.randn(2, 5, 16, dtype=torch.float64)
    rotation = None if rope is None else RotaryEmbedding(layer.head_size, base=rope)(torch.arange(5)[None])
    out = layer(hidden, attention_mask(5), rotation)
    expected = torch.stack([naive_attention(layer, row, causal(5), rope) for row in hidden])
    # Angles are float32 in the layer, float64 in the loops.
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6 if rope else 1e-12)
    parameters = list(layer.parameters())
    projection = torch.randn_like(out)
    ours = torch.autograd.grad((out * projection).sum(), parameters)
    for mine, theirs in zip(ours, torch.autograd.grad((expected * projection).sum(), parameters)):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_any_mask_is_obeyed():
    torch.manual_seed(0)
    layer = Attention(8, 4, 2, init_std=0.5).double()
    hidden = torch.randn(1, 6, 8, dtype=torch.float64)
    allowed = torch.rand(6, 6) < 0.5
    allowed |= torch.eye(6, dtype=torch.bool)
    out = layer(hidden, AttentionMask(allowed[None, None], causal=False))
    torch.testing.assert_close(out[0], naive_attention(layer, hidden[0], allowed.tolist()))


@pytest.mark.parametrize("length", [9, 300, 600])  # by plain products, and by the kernel of its type
def test_half_precision_in_training_stays_near_float64(length):
    torch.manual_seed(0)
    mask = AttentionMask(None, causal=True)
    query, key, value = (torch.randn(2, length, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    wide = [t.clone().requires_grad_() for t in (query, key, value)]
    half = [t.bfloat16().requires_grad_() for t in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product(*half, mask, 0.0)
    expected = scaled_dot_product(*wide, mask, 0.0)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    weight = torch.randn_like(expected)
    (out.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in zip(half, wide):
        assert (ours.grad.double() - theirs.grad).norm() < 0.01 * theirs.grad.norm()


def test_the_projection_is_grouped_by_key_head():
    rows, columns = nl.parameter_axes(Attention(16, 4, 2))["qkv.weight"]
    assert [f if isinstance(f, int) else (f.letter, f.size) for f in rows] == [("G", 2), 4, ("K", 4)]
    assert [(f.letter, f.size) for f in columns] == [("D", 16)]
    rows, columns = nl.parameter_axes(Attention(16, 4, 2, options=AttentionOptions(head_size=6)))["out.weight"]
    assert [(f.letter, f.size) for f in columns] == [("H", 4), ("K", 6)]


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layer, hidden = Attention(8, 2, dropout=0.5, init_std=0.5), torch.randn(1, 6, 8)
    mask = attention_mask(6)
    plain = layer.eval()(hidden, mask)
    torch.testing.assert_close(layer(hidden, mask), plain)
    assert not torch.allclose(layer.train()(hidden, mask), plain)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "fix"), [(3, None, "heads=2"), (4, 3, "kv_heads=2"), (4, 8, "kv_heads=4")]
)
def test_heads_that_do_not_divide_name_the_nearest(heads, kv_heads, fix):
    with pytest.raises(ShapeError) as caught:
        Attention(16, heads, kv_heads)
    assert fix in caught.value.fix


# ------------------------------------------------------------------------------------------ masks


def definition(
    length: int, offset: int, segments: list[int] | None, valid: list[bool] | None, window: int | None
) -> list[list[bool]]:
    rows = []
    for query in range(offset, offset + length):
        rows.append(
            [
                key == query
                or (
                    key < query
                    and (window is None or key > query - window)
                    and (segments is None or segments[key] == segments[query])
                    and (valid is None or valid[key])
                )
                for key in range(offset + length)
            ]
        )
    return rows


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(
    "valid", [None, [False, False, True, True, True, True], [True, True, True, True, False, False]]
)
@pytest.mark.parametrize(
    ("length", "offset", "segments"), [(6, 0, None), (6, 0, [1, 1, 1, 2, 2, 3]), (2, 4, None), (1, 5, None)]
)
def test_masks_are_their_definition(window, valid, length, offset, segments):
    mask = attention_mask(
        length,
        offset=offset,
        window=window,
        segments_BT=None if segments is None else torch.tensor([segments]),
        valid_BS=None if valid is None else torch.tensor([valid]),
    )
    expected = definition(length, offset, segments, valid, window)
    if mask.allowed is None:
        assert expected == (causal(length) if mask.causal else [[True] * (offset + length)] * length)
    else:
        assert not mask.causal and mask.allowed[0, 0].tolist() == expected


def test_packed_documents_cannot_follow_a_cache():
    with pytest.raises(ShapeError) as caught:
        attention_mask(2, offset=3, segments_BT=torch.ones(1, 2, dtype=torch.long))
    assert caught.value.fix


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("valid", [None, [True, True, True, True, False, False]])
@pytest.mark.parametrize("segments", [None, [1, 1, 1, 2, 2, 3]])
def test_masks_that_look_both_ways_are_their_definition(window, valid, segments):
    mask = attention_mask(
        6,
        causal=False,
        window=window,
        segments_BT=None if segments is None else torch.tensor([segments]),
        valid_BS=None if valid is None else torch.tensor([valid]),
    )
    expected = [
        [
            key == query
            or (
                (window is None or abs(key - query) < window)
                and (segments is None or segments[key] == segments[query])
                and (valid is None or valid[key])
            )
            for key in range(6)
        ]
        for query in range(6)
    ]
    if mask.allowed is None:
        assert all(map(all, expected)) and not mask.causal
    else:
        assert mask.allowed[0, 0].tolist() == expected
