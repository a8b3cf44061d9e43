"""Mixtures of experts against a loop over tokens, and against the blocks of transformers."""

import pytest
import torch
import torch.nn.functional as F

import nemolet as nl
from nemolet.errors import ShapeError
from nemolet.nn.moe import Experts, MixtureOfExperts
from nemolet.nn.router import Mixture, Router, balance_experts, seed_auxiliary_losses


def make(mixture: Mixture, *, width: int = 8, hidden: int = 12, seed: int = 0) -> MixtureOfExperts:
    torch.manual_seed(seed)
    return MixtureOfExperts(width, hidden, mixture, init_std=0.5, out_std=0.5).double()


def loop_over_tokens(layer: MixtureOfExperts, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """Every token by itself, every expert written out."""
    mixture, out = layer.router.mixture, []
    for vector in hidden_BTD.flatten(0, 1):
        logits = layer.router.weight @ vector
        scores = torch.softmax(logits, 0) if mixture.scoring == "softmax" else torch.sigmoid(logits)
        best = sorted(range(mixture.number), key=lambda e: -(scores[e] + layer.router.bias[e]).item())
        chosen = best[: mixture.per_token]
        total = sum(scores[e] for e in chosen) if mixture.normalised else 1.0
        mixed = torch.zeros_like(vector)
        for e in chosen:
            gated = F.silu(layer.experts.gate[e] @ vector) * (layer.experts.up[e] @ vector)
            mixed = mixed + mixture.scale * scores[e] / total * (layer.experts.down[e] @ gated)
        if layer.shared is not None:
            mixed = mixed + layer.shared(vector)
        out.append(mixed)
    return torch.stack(out).view_as(hidden_BTD)


@pytest.mark.parametrize(
    "mixture",
    [
        Mixture(4, 2),
        Mixture(6, 3, scoring="sigmoid", scale=2.5),
        Mixture(4, 1, normalised=False),
        Mixture(4, 4, shared_width=10),
        Mixture(5, 2, balance_rate=0.1, scoring="sigmoid"),
    ],
    ids=str,
)
def test_a_mixture_is_a_loop_over_tokens_and_experts(mixture):
    layer = make(mixture)
    layer.router.bias.normal_()
    if not mixture.balance_rate:
        layer.router.bias.zero_()
    hidden = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    with nl.checked():
        out = layer(hidden)
    expected = loop_over_tokens(layer, hidden)
    torch.testing.assert_close(out, expected)
    weights, projection = [hidden, *layer.parameters()], torch.randn_like(out)
    ours = torch.autograd.grad((out * projection).sum(), weights)
    for mine, theirs in zip(ours, torch.autograd.grad((expected * projection).sum(), weights)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_is_the_block_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    if family == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block

        config = transformers.MixtralConfig(
            hidden_size=8, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2
        )
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Block

        config = transformers.Qwen3MoeConfig(
            hidden_size=8, moe_intermediate_size=12, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True
        )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    theirs = Block(config).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    number = theirs.experts.gate_up_proj.shape[0]
    ours = make(Mixture(number, config.num_experts_per_tok))
    gate, up = theirs.experts.gate_up_proj.data.chunk(2, dim=1)
    ours.load_state_dict(
        {
            "router.weight": theirs.gate.weight.data,
            "experts.gate": gate,
            "experts.up": up,
            "experts.down": theirs.experts.down_proj.data,
        }
    )
    hidden = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(hidden), theirs(hidden), rtol=1e-6, atol=1e-6)  # their softmax is in float32


def test_the_auxiliary_loss_is_that_of_transformers():
    """Theirs counts each choice of a token, ours each token; so theirs is k times ours, over tokens a mean."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    torch.manual_seed(0)
    router = Router(8, Mixture(4, 2, balance_loss=1.0), init_std=0.5)
    hidden = torch.randn(1, 9, 8)
    logits = F.linear(hidden, router.weight)
    loss = router.auxiliary_loss(logits, logits.softmax(-1), router(hidden).experts)
    expected = mixtral.load_balancing_loss_func((logits[0],), num_experts=4, top_k=2)
    torch.testing.assert_close(loss / 9, expected / 2)


def test_the_auxiliary_losses_reach_the_gradient_without_a_wire():
    """As if they had been added to the loss, whatever that is divided by."""
    mixture = Mixture(4, 2, balance_loss=0.3, z_loss=0.2)
    layer, plain = make(mixture), make(Mixture(4, 2))
    plain.load_state_dict(layer.state_dict())
    hidden, n = torch.randn(3, 5, 8, dtype=torch.float64), 7.0
    projection = torch.randn(3, 5, 8, dtype=torch.float64)
    seed_auxiliary_losses(layer, 1 / n)
    ((layer(hidden) * projection).sum() / n).backward()

    logits = F.linear(hidden, plain.router.weight)
    chosen = plain.router(hidden).experts
    auxiliary = sum(
        0.3 * 4 * sum((row == e).sum() / row.numel() * share.softmax(-1)[:, e].sum() for e in range(4))
        for row, share in zip(chosen, logits)
    )
    auxiliary = auxiliary + 0.2 * logits.logsumexp(-1).square().sum()
    (((plain(hidden) * projection).sum() + auxiliary) / n).backward()
    for (name, mine), theirs in zip(layer.named_parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name, rtol=1e-6, atol=1e-8)  # the seed is float32
    assert layer.router.weight.grad.any()


def test_the_auxiliary_losses_do_not_depend_on_how_sequences_are_spread():
    layer = make(Mixture(4, 2, balance_loss=0.5, z_loss=0.1))
    hidden = torch.randn(4, 5, 8, dtype=torch.float64)
    layer(hidden).sum().backward()
    whole = layer.router.weight.grad.clone()
    layer.zero_grad()
    for part in hidden.split([1, 3]):
        layer(part).sum().backward()
    torch.testing.assert_close(layer.router.weight.grad, whole)


def test_auxiliary_losses_rest_outside_training():
    layer = make(Mixture(4, 2, balance_loss=0.5, balance_rate=0.1))
    plain = make(Mixture(4, 2))
    hidden = torch.randn(2, 5, 8, dtype=torch.float64)
    for each in (layer.eval(), plain.eval()):
        each(hidden).sum().backward()
    torch.testing.assert_close(layer.router.weight.grad, plain.router.weight.grad)
    assert layer.router.load.sum() == 0


def test_a_recomputed_block_counts_the_auxiliary_loss_once():
    torch.manual_seed(0)
    options = {"layers": 2, "width": 8, "heads": 2, "experts": Mixture(4, 2, balance_loss=0.5)}
    kept, recomputed = nl.nn.Decoder(**options), nl.nn.Decoder(**options, checkpointing="full")
    recomputed.load_state_dict(kept.state_dict())
    hidden = torch.randn(2, 6, 8)
    for each in (kept, recomputed):
        each(hidden).square().sum().backward()
    for mine, theirs in zip(recomputed.parameters(), kept.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_the_bias_evens_out_the_choice_without_a_gradient():
    torch.manual_seed(0)
    router = Router(8, Mixture(8, 2, balance_rate=0.02, scoring="sigmoid"), init_std=1.0)
    hidden = torch.randn(4, 64, 8) + 1.0
    uneven = torch.bincount(router(hidden).experts.flatten(), minlength=8)
    for _ in range(100):
        router(hidden)
        balance_experts(router)
    even = torch.bincount(router(hidden).experts.flatten(), minlength=8)
    assert even.max() < uneven.max() / 1.5 and even.min() > uneven.min()
    assert "bias" in router.state_dict() and "load" not in router.state_dict()


def test_the_bias_moves_by_the_sum_over_ranks():
    router = Router(4, Mixture(2, 1, balance_rate=0.5))
    router.load.copy_(torch.tensor([3.0, 1.0]))
    balance_experts(router, reduce=lambda load: load + torch.tensor([0.0, 10.0]))
    assert router.bias.tolist() == [0.5, -0.5] and router.load.sum() == 0


def test_counts_stay_exact_where_weights_are_halved():
    router = Router(4, Mixture(2, 1, balance_rate=0.5)).bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.load.dtype == router.bias.dtype == router.seed.dtype == torch.float32
    with torch.device("meta"):
        router = Router(4, Mixture(2, 1, balance_rate=0.5))
    router.to_empty(device="cpu")
    assert router.seed == 1 and not router.bias.any() and not router.load.any()


@pytest.mark.parametrize("counts", [[5, 0, 3], [0, 0, 8], [0, 4, 4]])
def test_one_kernel_computes_what_a_loop_does(counts):
    torch.manual_seed(0)
    experts = Experts(16, 24, 3, init_std=0.3, out_std=0.3)
    rows = torch.randn(8, 16, dtype=torch.bfloat16)
    exact = experts(rows.float(), torch.tensor(counts))  # float32: the loop
    grouped = experts.bfloat16()(rows, torch.tensor(counts))
    torch.testing.assert_close(grouped.float(), exact, rtol=0.05, atol=0.05)
    grouped.float().square().sum().backward()
    idle = [e for e, n in enumerate(counts) if n == 0]
    for parameter in experts.parameters():
        assert parameter.grad.isfinite().all()
        assert not parameter.grad[idle].any() and parameter.grad.any()


def test_experts_declare_their_axes():
    layer = make(Mixture(4, 2, shared_width=6))
    written = {name: nl.types.format_dims(dims) for name, dims in nl.parameter_axes(layer).items()}
    assert written["experts.gate"] == written["experts.up"] == "E=4 F=12 D=8"
    assert written["experts.down"] == "E=4 D=8 F=12"
    assert written["router.weight"] == "Any=4 D=8"


def test_a_language_model_of_experts_learns_and_is_rebuilt_from_its_config():
    torch.manual_seed(0)
    model = nl.language.CausalLM(
        vocab_size=11, layers=2, width=8, heads=2, context=16, experts=Mixture(4, 2, balance_loss=0.01)
    )
    again = nl.build(model.config())
    again.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 11, (2, 7))
    torch.testing.assert_close(again(tokens), model(tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        seed_auxiliary_losses(model, 1 / 14)
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"number": 4, "per_token": 5}, "experts.per_token: a token cannot use this many experts"),
        ({"number": 4, "scoring": "soft"}, "experts.scoring: unknown scoring"),
    ],
)
def test_an_impossible_mixture_is_refused(fields, message):
    with pytest.raises(ShapeError, match=message):
        Mixture(**fields)


@pytest.mark.parametrize(
    ("preset", "parameters", "active"),
    [
        ("mixtral_8x7b", 46_702_792_704, 12_879_925_248),
        ("mixtral_8x22b", 140_630_071_296, 39_161_468_928),
        ("qwen3_30b_a3b", 30_532_122_624, 3_353_032_704),
        ("qwen3_235b_a22b", 235_093_634_560, 22_190_763_520),
    ],
)
def test_presets_have_the_published_sizes(preset, parameters, active):
    from nemolet.config import compose

    config, problems = compose("train", [f"model={preset}"])
    assert problems == []
    with torch.device("meta"):
        model = nl.build(config["model"])
    assert sum(p.numel() for p in model.parameters()) == parameters
    mixture = Mixture(**config["model"]["experts"])
    routed = sum(p.numel() for m in model.modules() if isinstance(m, Experts) for p in m.parameters())
    assert parameters - routed + routed * mixture.per_token // mixture.number == active
