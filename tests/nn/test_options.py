"""What architectures do beside the usual: each option against loops, formulas or transformers."""

import math

import pytest
import torch

import nemolet as nl
from nemolet.errors import ConfigError
from nemolet.nn.attention import Attention, AttentionOptions, CrossAttention
from nemolet.nn.block import ResidualOptions
from nemolet.nn.cache import KVCache
from nemolet.nn.embedding import Embedding, Head, PositionEmbedding, RelativePositions, SinusoidalPositions
from nemolet.nn.mask import AttentionMask, attention_mask, memory_mask
from nemolet.nn.norm import RMSNorm
from nemolet.nn.rope import RotaryEmbedding, rotate
from nemolet.nn.transformer import Decoder, Encoder, LocalLayers, PositionOptions


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stack(kind: type, **options: object) -> Decoder | Encoder:
    torch.manual_seed(0)
    settings = {"layers": 2, "width": 16, "heads": 4, "ffn": 24, "max_length": 32, "init_std": 0.3, **options}
    return kind(**settings).double()


def shake(module: torch.nn.Module) -> None:
    """Norms and biases away from the values they start with."""
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_a_zero_centred_norm_is_gemmas():
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    ours, theirs = RMSNorm("D", 6, eps=1e-3, zero_centred=True), gemma.Gemma2RMSNorm(6, eps=1e-3)
    assert not ours.weight.any()
    ours.weight.data.normal_()
    theirs.load_state_dict(ours.state_dict())
    hidden = randn(2, 5, 6).float()
    torch.testing.assert_close(ours(hidden), theirs(hidden), rtol=1e-6, atol=1e-6)
    mine, other = (torch.autograd.grad(m(hidden).square().sum(), m.weight)[0] for m in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [attention_mask(5), attention_mask(5, window=2), attention_mask(5, causal=False)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_scale_and_softcap_are_their_formula(mask, kv_heads):
    torch.manual_seed(0)
    options = AttentionOptions(head_size=6, scale=0.7, softcap=1.5)
    layer, hidden = Attention(16, 4, kv_heads, options=options, init_std=0.5).double(), randn(2, 5, 16)
    per = 4 // kv_heads
    query, key, value = layer.qkv(hidden).view(2, 5, kv_heads, per + 2, 6).split((per, 1, 1), dim=3)
    scores = torch.einsum("btgrk,bsgik->bgrts", query, key) * 0.7
    scores = 1.5 * torch.tanh(scores / 1.5)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril() if mask.causal else mask.allowed
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    mixed = torch.einsum("bgrts,bsgik->btgrk", scores.softmax(-1), value).reshape(2, 5, 24)
    torch.testing.assert_close(layer(hidden, mask), layer.out(mixed))
    plain = Attention(16, 4, kv_heads, options=AttentionOptions(head_size=6, scale=0.7), init_std=0.5).double()
    wide = Attention(16, 4, kv_heads, options=AttentionOptions(head_size=6, scale=0.7, softcap=1e6)).double()
    wide.load_state_dict(plain.state_dict())
    torch.testing.assert_close(wide(hidden, mask), plain(hidden, mask))


def test_single_biases():
    layer = Attention(8, 2, bias=False, options=AttentionOptions(bias=True))
    assert layer.qkv.bias is not None and layer.out.bias is None
    layer = Attention(8, 2, bias=True, options=AttentionOptions(out_bias=False))
    assert layer.qkv.bias is not None and layer.out.bias is None


def test_part_of_a_head_is_rotated():
    heads, rope = randn(2, 5, 3, 2, 8), RotaryEmbedding(4)
    rotation = rope(torch.arange(5)[None])
    turned = rotate(heads, rotation)
    torch.testing.assert_close(turned[..., :4], rotate(heads[..., :4].contiguous(), rotation))
    assert torch.equal(turned[..., 4:], heads[..., 4:])


def test_cross_attention_is_a_loop_over_heads():
    torch.manual_seed(0)
    layer = CrossAttention(8, 4, 2, bias=True, options=AttentionOptions(scale=1.0), init_std=0.5).double()
    shake(layer)
    hidden, memory = randn(2, 3, 8), randn(2, 5, 8, seed=1)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    query = layer.query(hidden).view(2, 3, 4, 2)
    key_value = layer.kv(memory).view(2, 5, 2, 2, 2)
    mixed = torch.zeros(2, 3, 4, 2, dtype=torch.float64)
    for row in range(2):
        for head in range(4):
            key, value = key_value[row, :, head // 2, 0], key_value[row, :, head // 2, 1]
            scores = (query[row, :, head] @ key.T).masked_fill(~valid[row], -math.inf)
            mixed[row, :, head] = scores.softmax(-1) @ value
    expected = layer.out(mixed.flatten(2))
    torch.testing.assert_close(layer(hidden, memory, memory_mask(valid)), expected)
    cache = KVCache(layers=1, batch=2, kv_heads=2, capacity=3, head_size=2, dtype=torch.float64)
    torch.testing.assert_close(layer(hidden, memory, memory_mask(valid), cache), expected)
    again = layer(hidden, memory * 0, memory_mask(valid), cache)  # the memory was read once
    torch.testing.assert_close(again, expected)
    cache.reorder(torch.tensor([1]))
    torch.testing.assert_close(layer(hidden[1:], memory, memory_mask(valid[1:]), cache), expected[1:])
    dims = {name: nl.types.format_dims(dims) for name, dims in nl.parameter_axes(layer).items()}
    assert dims["query.weight"] == "(H=4 K=2) D=8" and dims["kv.weight"] == "(G=2 2 K=2) D=8"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20)])
def test_relative_positions_are_t5s(causal, buckets, far):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    ours = RelativePositions(3, buckets=buckets, max_distance=far, causal=causal)
    query, key = torch.arange(40, 60), torch.arange(200)
    expected = t5.T5Attention._relative_position_bucket(
        key - query[:, None], bidirectional=not causal, num_buckets=buckets, max_distance=far
    )
    torch.testing.assert_close(ours(query[None], key[None])[0], ours.weight[expected].permute(2, 0, 1))
    assert nl.types.format_dims(nl.parameter_axes(ours)["weight"]) == f"{buckets} H=3"


def test_sinusoids_are_marians():
    marian = pytest.importorskip("transformers.models.marian.modeling_marian")
    theirs = marian.MarianSinusoidalPositionalEmbedding(20, 6)
    expected = theirs.create_weight()
    ours = SinusoidalPositions(20, 6)
    zero = torch.zeros(1, 4, 6)
    torch.testing.assert_close(ours(zero, start=3)[0], expected[3:7], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ours(zero, torch.tensor([[3, 3, 0, 9]]))[0], expected[[3, 3, 0, 9]], rtol=1e-5, atol=1e-6
    )


def test_scaled_embeddings_offset_positions_and_head_bias():
    embed = Embedding("V", "D", 10, 4, scale=3.0, pad_to_multiple_of=8).double()
    tokens = torch.tensor([[1, 9]])
    torch.testing.assert_close(embed(tokens), 3 * embed.weight[tokens])
    table = PositionEmbedding(6, 4, offset=2).double()
    assert table.weight.shape == (8, 4)
    hidden = randn(1, 3, 4)
    torch.testing.assert_close(table(hidden, start=1)[0], hidden[0] + table.weight[3:6])
    torch.testing.assert_close(table(hidden, torch.tensor([[1, 2, 3]]))[0], hidden[0] + table.weight[3:6])
    head = Head("D", "V", tied=embed, bias=True, scale=0.5).double()
    head.bias.data.normal_()
    torch.testing.assert_close(head(hidden), (0.5 * hidden) @ embed.weight[:10].T + head.bias[:10])


@pytest.mark.parametrize("kind", [Decoder, Encoder])
@pytest.mark.parametrize("order", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("input_norm", [True, False])
def test_where_the_stream_is_normalised(kind, order, input_norm):
    layers = stack(kind, position="none", residual=ResidualOptions(order, input_norm), bias=True, norm="layer")
    shake(layers)
    hidden, mask = randn(2, 5, 16), attention_mask(5, causal=kind is Decoder)
    expected = hidden if not input_norm else layers.input_norm(hidden)
    for block in layers.blocks:
        if order == "post":
            expected = block.attention_norm(expected + block.attention(expected, mask))
            expected = block.feed_forward_norm(expected + block.feed_forward(expected))
            continue
        after = (block.attention_out_norm, block.feed_forward_out_norm) if order == "sandwich" else (lambda x: x,) * 2
        expected = expected + after[0](block.attention(block.attention_norm(expected), mask))
        expected = expected + after[1](block.feed_forward(block.feed_forward_norm(expected)))
    assert (layers.norm is None) == (order == "post")
    torch.testing.assert_close(layers(hidden), expected if layers.norm is None else layers.norm(expected))


def test_the_first_block_may_lack_its_norm():
    layers = stack(Encoder, residual=ResidualOptions(first_norm=False))
    assert layers.blocks[0].attention_norm is None and layers.blocks[1].attention_norm is not None
    assert layers(randn(1, 3, 16)).isfinite().all()


@pytest.mark.parametrize("kind", [Decoder, Encoder])
def test_local_layers_obey_the_window_and_have_their_own_base(kind):
    local = LocalLayers((True, False, True), rope_base=50.0)
    layers = stack(kind, layers=3, window=2, local=local, rope_base=1000.0)
    hidden = randn(1, 6, 16)
    causal, at = kind is Decoder, torch.arange(6)
    near = (at[:, None] - at).abs() < 2
    masks = {True: AttentionMask((near & (at <= at[:, None]) if causal else near)[None, None], False)}
    masks[False] = attention_mask(6, causal=causal)
    ropes = {True: RotaryEmbedding(4, base=50.0)(at[None]), False: RotaryEmbedding(4, base=1000.0)(at[None])}
    expected = hidden
    for block, bound in zip(layers.blocks, local.layers):
        expected = block(expected, masks[bound], ropes[bound])
    torch.testing.assert_close(layers(hidden), layers.norm(expected))


@pytest.mark.parametrize("layers", [(True,), (True, False, True)])
def test_local_layers_that_do_not_fit_are_refused(layers):
    with pytest.raises(ConfigError, match="one value for each layer") as caught:
        stack(Decoder, window=2, local=LocalLayers(layers))
    assert caught.value.fix
    with pytest.raises(ConfigError, match="window=None"):
        stack(Decoder, local=LocalLayers((True, False)))


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "relative", "none"])
def test_an_encoder_looks_both_ways_but_not_at_padding(position):
    encoder, hidden = stack(Encoder, position=position), randn(1, 5, 16)
    edited = hidden.clone()
    edited[:, 4] += 1
    assert not torch.allclose(encoder(edited)[:, 0], encoder(hidden)[:, 0])
    padded = torch.cat((hidden, randn(1, 3, 16, seed=7)), dim=1)
    mask = torch.tensor([[True] * 5 + [False] * 3])
    torch.testing.assert_close(encoder(padded, mask=mask)[:, :5], encoder(hidden), rtol=1e-6, atol=1e-6)


def test_padding_is_skipped_when_positions_are_counted():
    options = PositionOptions(offset=2, skip_padding=True)
    encoder, hidden = stack(Encoder, position="learned", positions=options), randn(1, 5, 16)
    padded = torch.cat((randn(1, 3, 16, seed=7), hidden), dim=1)
    mask = torch.tensor([[False] * 3 + [True] * 5])
    torch.testing.assert_close(encoder(padded, mask=mask)[:, 3:], encoder(hidden))


def test_narrow_vectors_are_normalised_then_widened():
    options = {"input_width": 6, "position": "learned", "residual": ResidualOptions("post", True), "bias": True}
    encoder, hidden = stack(Encoder, **options), randn(1, 3, 6)
    entered = encoder.input_proj(encoder.input_norm(hidden + encoder.position.weight[:3]))
    mask = attention_mask(3, causal=False)
    for block in encoder.blocks:
        entered = block(entered, mask)
    torch.testing.assert_close(encoder(hidden), entered)
    assert str(encoder.input_ports["hidden"].type) == "B T D=6 Hidden"
    assert str(encoder.output_ports["output"].type) == "B T D=16 Hidden"


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "relative"])
def test_a_decoder_with_a_memory_reads_in_parts_as_at_once(position):
    decoder = stack(Decoder, position=position, cross=True)
    hidden, memory = randn(2, 6, 16), randn(2, 4, 16, seed=3)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    whole = decoder(hidden, memory=memory, memory_mask=valid)
    cache = KVCache(layers=2, batch=2, kv_heads=4, capacity=6, head_size=4, dtype=torch.float64)
    with torch.no_grad():
        parts = [decoder(p, memory=memory, memory_mask=valid, cache=cache) for p in hidden.split([3, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-6)
    other = memory.clone()
    other[1, 2:] += 1  # padding of the memory
    torch.testing.assert_close(decoder(hidden, memory=other, memory_mask=valid), whole)


def test_checkpointing_changes_nothing_with_a_memory():
    hidden, memory = randn(2, 6, 16), randn(2, 4, 16, seed=3)
    gradients = []
    for kind in ("none", "full"):
        decoder = stack(Decoder, cross=True, checkpointing=kind).train()
        loss = decoder(hidden, memory=memory).square().sum()
        gradients.append(torch.autograd.grad(loss, list(decoder.parameters())))
    for plain, again in zip(*gradients):
        torch.testing.assert_close(plain, again)


def test_options_survive_configs():
    made = stack(
        Decoder,
        window=3,
        local=LocalLayers((True, False), rope_base=5.0),
        attention=AttentionOptions(head_size=6, softcap=2.0, rotary=2 / 3),
        residual=ResidualOptions("sandwich"),
        norm="rms_zero",
    )
    config = made.config()
    options = {"head_size": 6, "softcap": 2.0, "rotary": 2 / 3, "bias": None, "out_bias": None, "scale": None}
    assert config["attention"] == options
    assert config["residual"]["order"] == "sandwich" and config["local"]["layers"] == [True, False]
    again = nl.build(config).double()
    again.load_state_dict(made.state_dict())
    hidden = randn(1, 5, 16)
    assert torch.equal(again(hidden), made(hidden)) and again.config() == config


@pytest.mark.parametrize("kind", [Decoder, Encoder])
def test_a_bound_goes_with_relative_positions(kind):
    """A bound far away changes nothing, whatever is added to the scores."""
    plain = stack(kind, position="relative", kv_heads=2)
    bound = stack(kind, position="relative", kv_heads=2, attention=AttentionOptions(softcap=1e5))
    hidden, mask = randn(2, 5, 16), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    torch.testing.assert_close(bound(hidden, mask=mask)[mask], plain(hidden, mask=mask)[mask], rtol=0, atol=1e-5)
