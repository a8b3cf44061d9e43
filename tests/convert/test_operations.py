"""Operations on tensors: each is undone exactly by its way back, and means what its name says."""

from __future__ import annotations

import pytest
import torch

import nemolet as nl
from nemolet.convert.mapping import Rule, expand, expected_shapes, rules
from nemolet.convert.operations import (
    Flatten,
    Halves,
    Heads,
    Interleaved,
    Layout,
    Rows,
    Same,
    Stack,
    Stacked,
    Transpose,
    chain,
)
from nemolet.errors import ConversionError
from nemolet.nn.rope import RotaryEmbedding, rotate
from nemolet.types import parse_dims

GROUPS, PER, SIZE = 2, 3, 4
FUSED = Layout(parse_dims(f"(G={GROUPS} {PER + 2} K={SIZE}) D=5"))
PAIRED = Layout(parse_dims(f"(G={GROUPS} 2 K={SIZE}) D=5"))
TABLE = Layout(parse_dims("V=16 D=5"), vocab=10)
PLAIN = Layout(parse_dims("F=6 D=5"))


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


QUERY, KEY, VALUE = numbers(24, 5), 100 + numbers(8, 5), 200 + numbers(8, 5)
CASES = {
    "same": (Same(), [numbers(6, 5)], PLAIN),
    "transpose": (Transpose(), [numbers(5, 6), numbers(6)], PLAIN),
    "flatten": (Flatten(), [numbers(1, 16)], TABLE),
    "rows": (Rows(), [numbers(10, 5)], TABLE),
    "heads": (Heads(), [QUERY, KEY, VALUE], FUSED),
    "heads of a bias": (Heads(), [QUERY[:, 0], KEY[:, 0], VALUE[:, 0]], FUSED),
    "heads without keys": (Heads(keyless=True), [QUERY[:, 0], VALUE[:, 0]], FUSED),
    "keys and values": (Heads(paired=True), [KEY, VALUE], PAIRED),
    "stacked": (Stacked(), [torch.cat((QUERY, KEY, VALUE))], FUSED),
    "halves": (Halves(), [numbers(12, 5)], PLAIN),
    "stack": (Stack(), [numbers(3, 2), 9 + numbers(3, 2)], PLAIN),
    "interleaved": (Interleaved(4), [numbers(8, 5)], PLAIN),
    "chain": (chain(Transpose(), Stacked()), [torch.cat((QUERY, KEY, VALUE)).T], FUSED),
}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_the_same(name):
    operation, theirs, layout = CASES[name]
    ours = operation.take(theirs, layout)
    back = operation.give(ours, layout)
    assert len(back) == len(theirs) and all(map(torch.equal, back, theirs))
    shapes = [t.shape for t in operation.give([torch.empty(t.shape, device="meta") for t in ours], layout)]
    assert shapes == [t.shape for t in theirs]  # also without data


def test_heads_are_grouped_as_attention_reads_them():
    (fused,) = Heads().take([QUERY, KEY, VALUE], FUSED)
    groups = fused.view(GROUPS, PER + 2, SIZE, 5)
    for group in range(GROUPS):
        assert torch.equal(groups[group, :PER].flatten(0, 1), QUERY.view(GROUPS, PER * SIZE, 5)[group])
        assert torch.equal(groups[group, PER], KEY.view(GROUPS, SIZE, 5)[group])
        assert torch.equal(groups[group, PER + 1], VALUE.view(GROUPS, SIZE, 5)[group])


def test_missing_keys_are_zeros():
    (fused,) = Heads(keyless=True).take([QUERY[:, 0], VALUE[:, 0]], FUSED)
    assert not fused.view(GROUPS, PER + 2, SIZE)[:, PER].any()


def test_padded_rows_are_zeros_and_are_cut():
    (table,) = Rows().take([numbers(10, 5)], TABLE)
    assert table.shape == (16, 5) and not table[10:].any()
    assert torch.equal(Rows().take([numbers(16, 5)], TABLE)[0], numbers(16, 5))


def test_interleaved_pairs_give_the_same_scores_as_halves():
    """Rotating pairs that lie side by side, or the halves that they become: the same products."""
    generator = torch.Generator().manual_seed(0)
    query, key, hidden = (torch.randn(2, 8, 5, generator=generator).flatten(0, 1)[:8] for _ in range(3))
    hidden = torch.randn(6, 5, generator=generator)
    angles = torch.arange(6.0)[:, None] * RotaryEmbedding(8).frequencies
    turn = torch.polar(torch.ones_like(angles), angles)

    def pairs(weight: torch.Tensor) -> torch.Tensor:
        complex_heads = torch.view_as_complex((hidden @ weight.T).unflatten(1, (4, 2)).contiguous())
        return torch.view_as_real(complex_heads * turn).flatten(1)

    def halves(weight: torch.Tensor) -> torch.Tensor:
        (moved,) = Interleaved(8).take([weight], PLAIN)
        rotation = RotaryEmbedding(8)(torch.arange(6)[None])
        return rotate((hidden @ moved.T)[None, :, None, None], rotation)[0, :, 0, 0]

    torch.testing.assert_close(halves(query) @ halves(key).T, pairs(query) @ pairs(key).T)


def model() -> nl.NeuralModule:
    return nl.nn.FeedForward(4, 6, gated=True, bias=True)


LINES = {"up.@": "wi.@", "down.@": "wo.@", "gate.@": "wg.@"}


def test_wildcards_follow_what_the_model_has():
    entries = expand(rules("", "ff.", LINES), model(), vocab=0)
    assert {name for entry in entries for name in entry.theirs} == {
        f"ff.{name}.{kind}" for name in ("wi", "wo", "wg") for kind in ("weight", "bias")
    }
    assert expected_shapes(entries, model())["ff.wi.weight"] == (6, 4)
    bare = expand(rules("", "ff.", LINES), nl.nn.FeedForward(4, 6), vocab=0)
    assert {name for entry in bare for name in entry.theirs} == {"ff.wi.weight", "ff.wo.weight"}


def test_of_several_rules_the_first_counts():
    both = Rule(("gate.weight", "up.weight"), "fused", Halves())
    entries = expand([both, *rules("", "ff.", LINES)], model(), vocab=0)
    assert "ff.wi.weight" not in {name for entry in entries for name in entry.theirs}
    plain = expand([both, *rules("", "ff.", LINES)], nl.nn.FeedForward(4, 6), vocab=0)
    assert {name for entry in plain for name in entry.theirs} == {"ff.wi.weight", "ff.wo.weight"}


def test_a_table_that_forgets_something_is_refused():
    with pytest.raises(ConversionError, match=r"down.bias, down.weight"):
        expand(rules("", "ff.", {"up.@": "wi.@", "gate.@": "wg.@"}), model(), vocab=0)
