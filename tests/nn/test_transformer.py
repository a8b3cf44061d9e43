"""Blocks and decoders: their composition, documents that do not see each other, the cache, checkpointing."""

import pytest
import torch

from nemolet.errors import ConfigError, ShapeError
from nemolet.nn.cache import KVCache
from nemolet.nn.mask import attention_mask
from nemolet.nn.transformer import Decoder

KINDS = {
    "llama": {"norm": "rms", "gated": True, "activation": "silu", "position": "rope", "kv_heads": 2},
    "gpt2": {"norm": "layer", "gated": False, "activation": "gelu_tanh", "position": "learned", "bias": True},
    "modern": {"norm": "rms", "gated": True, "activation": "relu2", "position": "rope", "qk_norm": True, "kv_heads": 1},
    "bare": {"norm": "rms", "gated": False, "activation": "relu", "position": "none"},
}


def make(kind: str, **changes: object) -> Decoder:
    torch.manual_seed(0)
    options = {
        "layers": 2,
        "width": 16,
        "heads": 4,
        "ffn": 24,
        "max_length": 32,
        "init_std": 0.3,
        **KINDS[kind],
        **changes,
    }
    return Decoder(**options).double()


def hiddens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def new_cache(decoder: Decoder, batch: int, capacity: int = 16) -> KVCache:
    attention = decoder.blocks[0].attention
    return KVCache(
        layers=len(decoder.blocks),
        batch=batch,
        kv_heads=attention.kv_heads,
        capacity=capacity,
        head_size=attention.head_size,
        dtype=torch.float64,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_adds_two_branches_to_the_stream(kind):
    block, hidden = make(kind, position="none").blocks[0], hiddens(2, 5)
    mask = attention_mask(5)
    mixed = hidden + block.attention(block.attention_norm(hidden), mask)
    torch.testing.assert_close(block(hidden, mask), mixed + block.feed_forward(block.feed_forward_norm(mixed)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_runs_blocks_and_a_final_norm(kind):
    decoder, hidden = make(kind), hiddens(2, 5)
    expected = hidden if decoder.position is None else hidden + decoder.position.weight[:5]
    rotation = None if decoder.rope is None else decoder.rope(torch.arange(5)[None])
    for block in decoder.blocks:
        expected = block(expected, attention_mask(5), rotation)
    torch.testing.assert_close(decoder(hidden), decoder.norm(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_no_position_sees_a_later_one(kind):
    decoder, hidden = make(kind), hiddens(1, 8)
    edited = hidden.clone()
    edited[:, 5:] += hiddens(1, 3, seed=6)
    torch.testing.assert_close(decoder(edited)[:, :5], decoder(hidden)[:, :5], rtol=0, atol=1e-12)
    assert not torch.allclose(decoder(edited)[:, 5:], decoder(hidden)[:, 5:])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_do_not_see_each_other(kind):
    decoder = make(kind)
    first, second = hiddens(1, 5), hiddens(1, 3, seed=2)
    packing = {
        "segments": torch.tensor([[1] * 5 + [2] * 3]),
        "positions": torch.cat((torch.arange(5), torch.arange(3)))[None],
    }
    packed = decoder(torch.cat((first, second), dim=1), **packing)
    edited_first = decoder(torch.cat((first.flip(1), second), dim=1), **packing)
    edited_second = decoder(torch.cat((first, second.flip(1)), dim=1), **packing)
    assert torch.equal(edited_first[:, 5:], packed[:, 5:])
    assert torch.equal(edited_second[:, :5], packed[:, :5])
    torch.testing.assert_close(packed, torch.cat((decoder(first), decoder(second)), dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_bounds_what_is_seen(kind):
    decoder, hidden = make(kind, window=2), hiddens(1, 8)
    edited = hidden.clone()
    edited[:, 0] += hiddens(1, 1, seed=6)[:, 0]
    # Each of the two layers hands on what is one position back.
    torch.testing.assert_close(decoder(edited)[:, 3:], decoder(hidden)[:, 3:], rtol=0, atol=1e-12)
    assert not torch.allclose(decoder(edited)[:, 2], decoder(hidden)[:, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_nothing(kind):
    decoder, hidden = make(kind), hiddens(1, 5)
    padded = torch.cat((hiddens(1, 3, seed=7), hidden), dim=1)
    mask = torch.tensor([[False] * 3 + [True] * 5])
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
    torch.testing.assert_close(
        decoder(padded, mask=mask, positions=positions)[:, 3:], decoder(hidden), rtol=1e-6, atol=1e-6
    )


# ------------------------------------------------------------------------------------------ cache


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_in_parts_is_reading_at_once(kind, window):
    decoder, hidden = make(kind, window=window), hiddens(2, 9)
    whole = decoder(hidden)
    for parts in ([9], [1] * 9, [4, 1, 3, 1], [2, 7]):
        cache, got = new_cache(decoder, 2), []
        with torch.no_grad():
            for piece in hidden.split(parts, dim=1):
                got.append(decoder(piece, cache=cache))
        assert cache.length == 9
        torch.testing.assert_close(torch.cat(got, dim=1), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_unequal_prompts_with_left_padding(kind):
    decoder = make(kind)
    rows = [hiddens(1, 7), hiddens(1, 4, seed=2), hiddens(1, 6, seed=3)]
    prompts, longest = [5, 2, 4], 5  # each row has two more to decode
    batch = torch.cat([torch.cat((hiddens(1, longest - n, seed=8), row), dim=1) for row, n in zip(rows, prompts)])
    mask = torch.tensor([[i >= longest - n for i in range(longest)] for n in prompts])
    positions = torch.tensor([[max(0, i - longest + n) for i in range(longest + 2)] for n in prompts])
    cache = new_cache(decoder, 3)
    with torch.no_grad():
        decoder(batch[:, :3], mask=mask[:, :3], positions=positions[:, :3], cache=cache)
        got = [decoder(batch[:, 3:5], mask=mask[:, 3:5], positions=positions[:, 3:5], cache=cache)[:, -1]]
        for t in (5, 6):
            got.append(decoder(batch[:, t : t + 1], positions=positions[:, t : t + 1], cache=cache)[:, -1])
        for index, (row, n) in enumerate(zip(rows, prompts)):
            alone = decoder(row)[0, n - 1 :]
            torch.testing.assert_close(torch.stack([step[index] for step in got]), alone, rtol=1e-6, atol=1e-6)


def test_reorder_keeps_rows_in_the_given_order():
    decoder, hidden = make("llama"), hiddens(3, 6)
    mask = torch.tensor([[True] * 5, [False] * 2 + [True] * 3, [True] * 5])
    cache, rows = new_cache(decoder, 3), torch.tensor([2, 1])
    whole_mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.bool)), dim=1)
    with torch.no_grad():
        decoder(hidden[:, :5], cache=cache, mask=mask)
        cache.reorder(rows)
        got = decoder(hidden[rows, 5:], cache=cache)
        torch.testing.assert_close(got, decoder(hidden, mask=whole_mask)[rows, 5:], rtol=1e-6, atol=1e-6)


def test_a_full_cache_is_refused_and_stays_as_it_was():
    decoder = make("llama")
    cache = new_cache(decoder, 1, capacity=4)
    with torch.no_grad():
        decoder(hiddens(1, 3), cache=cache)
        with pytest.raises(ShapeError, match="cache is full") as caught:
            decoder(hiddens(1, 2), cache=cache)
    assert caught.value.fix and cache.length == 3


# ------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", ["full", "every_2"])
def test_checkpointing_gives_the_same_gradients(kind, checkpointing):
    plain, saving = make(kind, layers=3, dropout=0.2), make(kind, layers=3, dropout=0.2, checkpointing=checkpointing)
    saving.load_state_dict(plain.state_dict())
    packing = {"segments": torch.tensor([[1, 1, 1, 2, 2], [1] * 5])}
    outputs = []
    for decoder in (plain, saving):
        hidden = hiddens(2, 5).requires_grad_()
        torch.manual_seed(3)  # dropout draws the same numbers, now and when it is recomputed
        out = decoder.train()(hidden, **packing)
        outputs.append((out, *torch.autograd.grad(out.square().sum(), [hidden, *decoder.parameters()])))
    for mine, theirs in zip(*outputs):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_checkpointing_recomputes_every_nth_block():
    calls: list[int] = []
    decoder = make("bare", layers=4, checkpointing="every_2")
    for index, block in enumerate(decoder.blocks):
        block.feed_forward.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    decoder.train()(hiddens(1, 3).requires_grad_()).sum().backward()
    assert sorted(calls) == [0, 0, 1, 2, 2, 3]


def test_a_cache_is_filled_in_training_mode_too():
    decoder, hidden = make("llama", checkpointing="full").train(), hiddens(1, 6)
    cache = new_cache(decoder, 1)
    with torch.no_grad():
        parts = [decoder(hidden[:, :4], cache=cache), decoder(hidden[:, 4:], cache=cache)]
        torch.testing.assert_close(torch.cat(parts, dim=1), decoder(hidden), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 3},
        {"kv_heads": 3},
        {"width": 12, "heads": 4},
        {"checkpointing": "some"},
        {"checkpointing": "every_0"},
        {"activation": "swish"},
        {"rope_scaling": {"kind": "yarn"}},
    ],
    ids=str,
)
def test_impossible_sizes_are_refused_with_a_fix(changes):
    with pytest.raises((ShapeError, ConfigError)) as caught:
        make("llama", **changes)
    assert caught.value.fix and caught.value.where


def test_a_sequence_longer_than_learned_positions_is_refused():
    decoder = make("gpt2", max_length=4)
    cache = new_cache(decoder, 1)
    with torch.no_grad():
        decoder(hiddens(1, 3), cache=cache)
        for call in (lambda: decoder(hiddens(1, 5)), lambda: decoder(hiddens(1, 2), cache=cache)):
            with pytest.raises(ShapeError, match="longer than its positions") as caught:
                call()
            assert caught.value.fix and caught.value.expected == "at most 4"


def test_what_writes_to_the_stream_starts_smaller():
    torch.manual_seed(0)
    decoder = Decoder(layers=8, width=64, heads=4)
    for block in decoder.blocks:
        assert block.attention.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
        assert block.feed_forward.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
        assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
