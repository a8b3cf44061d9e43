"""Rotary positions against transformers' Llama and against rotation by complex numbers."""

import copy

import pytest
import torch

from nemolet.errors import ConfigError, ShapeError
from nemolet.nn.rope import RotaryEmbedding, rotate

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "none": (None, {"rope_type": "default"}),
    "linear": ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        {"kind": "llama3", **LLAMA3, "original_context": 64},
        {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 64},
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_queries_and_keys_turn_as_in_transformers(name):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling, parameters = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 1000.0, **parameters},
    )
    ours, theirs = RotaryEmbedding(32, base=1000.0, scaling=scaling), llama.LlamaRotaryEmbedding(config)
    if name in ROPE_INIT_FUNCTIONS:
        torch.testing.assert_close(ours.frequencies, ROPE_INIT_FUNCTIONS[name](config, "cpu")[0])
    torch.testing.assert_close(ours.frequencies, theirs.inv_freq)

    generator = torch.Generator().manual_seed(0)
    query_BTHK = torch.randn(2, 7, 2, 32, generator=generator)
    key_BTHK = torch.randn(2, 7, 2, 32, generator=generator)
    positions_BT = torch.stack((torch.arange(7), torch.arange(80, 87)))
    cos, sin = theirs(query_BTHK, positions_BT)
    expected = llama.apply_rotary_pos_emb(query_BTHK.transpose(1, 2), key_BTHK.transpose(1, 2), cos, sin)
    rotation = ours(positions_BT)
    for heads_BTHK, wanted_BHTK in zip((query_BTHK, key_BTHK), expected):
        turned = rotate(heads_BTHK.unsqueeze(3), rotation).squeeze(3)
        torch.testing.assert_close(turned.transpose(1, 2), wanted_BHTK, rtol=1e-5, atol=1e-5)


def test_rotation_is_a_product_of_complex_numbers():
    heads = torch.randn(1, 5, 2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frequencies = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turns = torch.polar(torch.ones(5, 4, dtype=torch.float64), torch.arange(5)[:, None] * frequencies)
    product = torch.complex(heads[..., :4], heads[..., 4:]) * turns[None, :, None, None]
    expected = torch.cat((product.real, product.imag), dim=-1)
    torch.testing.assert_close(
        rotate(heads, RotaryEmbedding(8, base=100.0)(torch.arange(5)[None])), expected, rtol=1e-6, atol=1e-6
    )


def test_scores_depend_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 1, 8, generator=generator, dtype=torch.float64)
    rope = RotaryEmbedding(8)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        turned = rotate(query, rope(torch.tensor([[query_at]]))), rotate(key, rope(torch.tensor([[key_at]])))
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-5)


def test_gradient_of_the_rotation():
    rotation = RotaryEmbedding(4)(torch.arange(3)[None])
    heads = torch.randn(1, 3, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotation), heads)


def test_half_precision_does_not_touch_the_frequencies():
    rope = RotaryEmbedding(64)
    halved = copy.deepcopy(rope).bfloat16()
    assert halved.frequencies.dtype == torch.float32
    torch.testing.assert_close(halved.frequencies, rope.frequencies, rtol=0, atol=0)
    rotation = halved(torch.tensor([[5000]]))
    torch.testing.assert_close(rotation.cos, rope(torch.tensor([[5000]])).cos, rtol=0, atol=0)


def test_a_module_made_without_memory_gets_its_frequencies_when_it_gets_memory():
    with torch.device("meta"):
        rope = RotaryEmbedding(8)
    assert rope.frequencies.is_meta
    torch.testing.assert_close(rope.to_empty(device="cpu").frequencies, RotaryEmbedding(8).frequencies)


def test_frequencies_are_not_saved():
    assert not RotaryEmbedding(8).state_dict()


@pytest.mark.parametrize(
    ("head_size", "scaling"),
    [
        (7, None),
        (8, {"kind": "lineer", "factor": 2.0}),
        (8, {"factor": 2.0}),
        (8, {"kind": "linear"}),
        (8, {"kind": "linear", "factor": 2.0, "slope": 1.0}),
        (8, {"kind": "llama3", "factor": 2.0}),
    ],
)
def test_what_cannot_be_is_refused_with_a_fix(head_size, scaling):
    with pytest.raises((ShapeError, ConfigError)) as caught:
        RotaryEmbedding(head_size, scaling=scaling)
    assert caught.value.where
