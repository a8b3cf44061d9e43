"""Linear, embedding, head, norms and feed-forward against torch.nn, transformers and plain formulas."""

import math

import pytest
import torch
from torch import nn

import nemolet as nl
from nemolet.errors import ConfigError, ShapeError
from nemolet.nn.embedding import Embedding, Head, PositionEmbedding, padded
from nemolet.nn.feed_forward import FeedForward
from nemolet.nn.linear import Linear
from nemolet.nn.norm import LayerNorm, RMSNorm


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(module: nn.Module, out: torch.Tensor, seed: int = 9) -> list[torch.Tensor]:
    """Gradients of a random projection of the output, so that no direction is left out."""
    return list(torch.autograd.grad((out * randn(*out.shape, seed=seed)).sum(), list(module.parameters())))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs(bias):
    ours, reference = Linear("D", "F", 6, 10, bias=bias).double(), nn.Linear(6, 10, bias=bias).double()
    if bias:
        ours.bias.data.normal_()
    reference.load_state_dict(ours.state_dict())
    hidden = randn(2, 3, 6)
    torch.testing.assert_close(ours(hidden), reference(hidden))
    for mine, theirs in zip(gradients(ours, ours(hidden)), gradients(reference, reference(hidden))):
        torch.testing.assert_close(mine, theirs)


def test_linear_starts_with_the_requested_spread_and_no_bias():
    torch.manual_seed(0)
    layer = Linear("D", "F", 400, 300, bias=True)
    assert layer.weight.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert Linear("D", "F", 400, 300, init_std=0.02).weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not layer.bias.any()


def test_linear_declares_composite_axes_with_their_sizes():
    layer = Linear("D", "(G=2 3 K=4)", 8, 24)
    rows, columns = nl.parameter_axes(layer)["weight"]
    assert [f if isinstance(f, int) else (f.letter, f.size) for f in rows] == [("G", 2), 3, ("K", 4)]
    assert [(f.letter, f.size) for f in columns] == [("D", 8)]


@pytest.mark.parametrize(("vocab", "multiple", "rows"), [(10, 1, 10), (10, 8, 16), (16, 8, 16), (65, 64, 128)])
def test_vocabulary_is_padded_to_the_multiple(vocab, multiple, rows):
    assert padded(vocab, multiple) == rows
    assert Embedding("V", "D", vocab, 4, pad_to_multiple_of=multiple).weight.shape == (rows, 4)


def test_embedding_is_torchs():
    ours = Embedding("V", "D", 10, 4, pad_to_multiple_of=8).double()
    reference = nn.Embedding(16, 4).double()
    reference.load_state_dict(ours.state_dict())
    tokens = torch.tensor([[0, 9, 3], [3, 3, 1]])
    torch.testing.assert_close(ours(tokens), reference(tokens), rtol=0, atol=0)
    for mine, theirs in zip(gradients(ours, ours(tokens)), gradients(reference, reference(tokens))):
        torch.testing.assert_close(mine, theirs)


def test_head_never_shows_padding():
    head = Head("D", "V", 4, 10, pad_to_multiple_of=8).double()
    hidden = randn(2, 3, 4)
    logits = head(hidden)
    assert head.weight.shape == (16, 4) and logits.shape == (2, 3, 10)
    torch.testing.assert_close(logits, hidden @ head.weight[:10].T)
    (weight_grad,) = gradients(head, logits)
    assert not weight_grad[10:].any()


def test_tied_head_shares_the_weight_and_adds_up_both_gradients():
    embed = Embedding("V", "D", 10, 4, pad_to_multiple_of=8).double()
    head = Head("D", "V", tied=embed)
    assert head.weight is embed.weight
    tokens = torch.tensor([[0, 9, 3]])
    weight = embed.weight.detach().clone().requires_grad_()
    (ours,) = gradients(embed, head(embed(tokens)))
    expected = torch.autograd.grad(((weight[tokens] @ weight[:10].T) * randn(1, 3, 10, seed=9)).sum(), weight)[0]
    torch.testing.assert_close(ours, expected)


def test_softcap_bounds_the_scores_smoothly():
    embed = Embedding("V", "D", 10, 4).double()
    hidden = 100 * randn(1, 2, 4)
    expected = 5 * torch.tanh(Head("D", "V", tied=embed)(hidden) / 5)
    torch.testing.assert_close(Head("D", "V", tied=embed, softcap=5.0)(hidden), expected)


def test_last_only_scores_the_last_position():
    head, hidden = Head("D", "V", 4, 10), randn(2, 5, 4, dtype=torch.float32)
    torch.testing.assert_close(head(hidden, last_only=True), head(hidden)[:, -1:])


def test_a_head_without_sizes_is_refused():
    with pytest.raises(ShapeError) as caught:
        Head("D", "V", width=4)
    assert caught.value.fix


def test_position_embedding_adds_rows_by_position_or_by_offset():
    layer, hidden = PositionEmbedding(8, 4).double(), randn(2, 3, 4)
    positions = torch.tensor([[2, 3, 4]])
    expected = hidden + layer.weight[2:5]
    torch.testing.assert_close(layer(hidden, positions), expected)
    torch.testing.assert_close(layer(hidden, start=2), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_torchs(bias):
    ours, reference = LayerNorm("D", 6, eps=1e-3, bias=bias), nn.LayerNorm(6, eps=1e-3, bias=bias)
    for parameter in ours.parameters():
        parameter.data.normal_()
    reference.load_state_dict(ours.state_dict())
    ours, reference, hidden = ours.double(), reference.double(), 3 * randn(2, 5, 6)
    torch.testing.assert_close(ours(hidden), reference(hidden))
    for mine, theirs in zip(gradients(ours, ours(hidden)), gradients(reference, reference(hidden))):
        torch.testing.assert_close(mine, theirs)


def test_rms_norm_is_llamas():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    ours, reference = RMSNorm("D", 6, eps=1e-3), llama.LlamaRMSNorm(6, eps=1e-3)
    ours.weight.data.normal_()
    reference.load_state_dict(ours.state_dict())
    hidden = 3 * randn(2, 5, 6, dtype=torch.float32)
    torch.testing.assert_close(ours(hidden), reference(hidden), rtol=1e-6, atol=1e-6)


def test_rms_norm_and_its_gradients_are_the_formula():
    norm = RMSNorm("D", 6, eps=1e-3).double()
    norm.weight.data.normal_()
    hidden, weight = randn(2, 5, 6).requires_grad_(), norm.weight.detach().clone().requires_grad_()
    expected = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    projection, out = randn(2, 5, 6, seed=1), norm(hidden)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad((out * projection).sum(), [hidden, norm.weight])
    for mine, theirs in zip(ours, torch.autograd.grad((expected * projection).sum(), [hidden, weight])):
        torch.testing.assert_close(mine, theirs)


def test_norms_of_zero_are_finite():
    for norm in (RMSNorm("D", 4), LayerNorm("D", 4)):
        hidden = torch.zeros(1, 4, requires_grad=True)
        norm(hidden).sum().backward()
        assert norm(hidden).isfinite().all() and hidden.grad.isfinite().all()


def erf_gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "gelu": erf_gelu,
    "gelu_tanh": tanh_gelu,
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_is_the_formula(activation, gated, bias):
    layer = FeedForward(4, 6, activation=activation, gated=gated, bias=bias).double()
    for parameter in layer.parameters():
        parameter.data.normal_()
    hidden = randn(2, 3, 4)

    def affine(linear: Linear, x: torch.Tensor) -> torch.Tensor:
        return x @ linear.weight.T + (linear.bias if bias else 0)

    activated = affine(layer.gate if gated else layer.up, hidden).detach().clone().apply_(FORMULAS[activation])
    expected = affine(layer.down, activated * affine(layer.up, hidden) if gated else activated)
    torch.testing.assert_close(layer(hidden), expected)


def test_feed_forward_drops_out_in_training_only():
    layer, hidden = FeedForward(8, 16, dropout=0.5), randn(4, 8, 8, dtype=torch.float32)
    layer.eval()
    whole = layer(hidden)
    torch.testing.assert_close(layer(hidden), whole)
    layer.train()
    torch.manual_seed(0)
    dropped = layer(hidden)
    zero = dropped == 0
    assert 0.3 < zero.float().mean() < 0.7
    torch.testing.assert_close(dropped[~zero], 2 * whole[~zero])


def test_an_unknown_activation_names_the_nearest():
    with pytest.raises(ConfigError, match="silu") as caught:
        FeedForward(4, 8, activation="sillu")
    assert caught.value.fix == "did you mean 'silu'?"
