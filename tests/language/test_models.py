"""Whole language models against transformers, published sizes, and the compiler."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import nemolet as nl
from nemolet.errors import ConfigError, NemoletError, ShapeError
from nemolet.language.losses import CrossEntropy
from nemolet.language.models import CausalLM

PRESETS = Path(__file__).resolve().parents[2] / "conf" / "model"
GPT2 = {"norm": "layer", "activation": "gelu_tanh", "gated": False, "position": "learned", "bias": True, "tied": True}
TINY = {"vocab_size": 37, "layers": 2, "width": 16, "heads": 4, "context": 32}


def tiny(**changes: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(**{**TINY, **changes})


# ----------------------------------------------------------------------------- against transformers


def fuse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_heads: int, size: int) -> torch.Tensor:
    """Lay out three projections, each (heads size) ..., as (G R K) ...: per group queries, key and value."""
    parts = [part.reshape(kv_heads, -1, size, *part.shape[1:]) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def from_llama(model: Any, read: Any) -> dict[str, torch.Tensor]:
    """Our names and layouts of what ``read`` takes from each parameter: its data, or its gradient."""
    config = model.config
    tensors = {name: read(parameter) for name, parameter in model.named_parameters()}
    out = {
        "graph.embed.weight": tensors["model.embed_tokens.weight"],
        "graph.decoder.norm.weight": tensors["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        out["graph.head.weight"] = tensors["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{i}.", f"graph.decoder.blocks.{i}."
        projections = (tensors[f"{theirs}self_attn.{x}_proj.weight"] for x in "qkv")
        out[f"{ours}attention.qkv.weight"] = fuse(*projections, config.num_key_value_heads, config.head_dim)
        out[f"{ours}attention.out.weight"] = tensors[f"{theirs}self_attn.o_proj.weight"]
        for name in ("up", "gate", "down"):
            out[f"{ours}feed_forward.{name}.weight"] = tensors[f"{theirs}mlp.{name}_proj.weight"]
        out[f"{ours}attention_norm.weight"] = tensors[f"{theirs}input_layernorm.weight"]
        out[f"{ours}feed_forward_norm.weight"] = tensors[f"{theirs}post_attention_layernorm.weight"]
    return out


def from_gpt2(model: Any, read: Any) -> dict[str, torch.Tensor]:
    """As :func:`from_llama`; GPT-2 stores its matrices transposed."""
    config = model.config
    tensors = {name.removeprefix("transformer."): read(parameter) for name, parameter in model.named_parameters()}
    out = {"graph.embed.weight": tensors["wte.weight"], "graph.decoder.position.weight": tensors["wpe.weight"]}
    names = {
        "attention_norm": "ln_1",
        "feed_forward_norm": "ln_2",
        "attention.out": "attn.c_proj",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    for kind in ("weight", "bias"):
        out[f"graph.decoder.norm.{kind}"] = tensors[f"ln_f.{kind}"]
        for i in range(config.n_layer):
            for ours, theirs in names.items():
                tensor = tensors[f"h.{i}.{theirs}.{kind}"]
                out[f"graph.decoder.blocks.{i}.{ours}.{kind}"] = tensor.T if tensor.ndim == 2 else tensor
            parts = tensors[f"h.{i}.attn.c_attn.{kind}"].chunk(3, dim=-1)
            size = config.n_embd // config.n_head
            fused = fuse(*(part.T if part.ndim == 2 else part for part in parts), config.n_head, size)
            out[f"graph.decoder.blocks.{i}.attention.qkv.{kind}"] = fused
    return out


def make_llama(tied: bool, kv_heads: int, scaling: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            intermediate_size=24,
            max_position_embeddings=32,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            rope_parameters={"rope_theta": 500.0, **scaling},
            initializer_range=0.3,
        )
    )


def make_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=37,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.3,
        )
    )


def same_model(ours: CausalLM, theirs: Any, translate: Any) -> None:
    """Copy the weights, then compare logits, loss and all gradients; with padding on the left, too."""
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():  # biases and norms as well, which start at zero and one
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    missing = ours.load_state_dict(translate(theirs, lambda p: p.detach().clone()), strict=False)
    # A tied head has the embedding's weight under a second name.
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"graph.head.weight"}

    tokens = torch.randint(0, 37, (3, 12), generator=generator)
    expected = theirs(input_ids=tokens, labels=tokens)
    logits = ours(tokens)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)

    loss, count = CrossEntropy()(logits[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss / count, expected.loss, rtol=1e-5, atol=1e-5)
    (loss / count).backward()
    expected.loss.backward()
    wanted = translate(theirs, lambda p: p.grad)
    for name, parameter in ours.named_parameters():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad, wanted[name], rtol=1e-4, atol=1e-4 * scale, msg=f"gradient of {name}"
        )

    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, :5] = False
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = theirs(input_ids=tokens, attention_mask=mask.long(), position_ids=positions).logits
    torch.testing.assert_close(ours(tokens, mask=mask, positions=positions)[mask], padded[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_llama_is_transformers(tied, kv_heads):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = make_llama(tied, kv_heads, {"rope_type": "default"})
    same_model(tiny(kv_heads=kv_heads, ffn_width=24, rope_base=500.0, tied=tied), theirs, from_llama)


def test_llama_3_is_transformers():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    factors = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = make_llama(False, 2, {"rope_type": "llama3", **factors, "original_max_position_embeddings": 16})
    scaling = {"kind": "llama3", **factors, "original_context": 16}
    ours = tiny(kv_heads=2, ffn_width=24, rope_base=500.0, tied=False, rope_scaling=scaling)
    same_model(ours, theirs, from_llama)


def test_gpt2_is_transformers():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    same_model(tiny(**GPT2), make_gpt2(), from_gpt2)


# ------------------------------------------------------------------------------ declarations, sizes


@pytest.mark.parametrize(
    "changes",
    [{}, GPT2, {"tied": False, "kv_heads": 2, "qk_norm": True, "pad_vocab_to": 8}],
    ids=["llama", "gpt2", "untied"],
)
def test_every_parameter_declares_its_axes(changes):
    model = tiny(**changes)
    axes = nl.parameter_axes(model)
    parameters = dict(model.named_parameters())
    assert axes.keys() == parameters.keys()
    for name, dims in axes.items():
        sizes = []
        for dim in dims:
            size = 1
            for factor in dim:
                known = factor if isinstance(factor, int) else factor.size
                assert known is not None, f"{name} leaves {factor} open"
                size *= known
            sizes.append(size)
        assert tuple(sizes) == tuple(parameters[name].shape), name


def preset(name: str) -> dict[str, Any]:
    """A preset with the presets it is laid over."""
    tree: dict[str, Any] = {}
    own = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    for base in own.pop("defaults", ["_self_"]):
        layer = own if base == "_self_" else preset(base)
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(tree.get(key), dict)
            tree[key] = {**tree[key], **value} if both else value
    return tree


PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama31_8b": 8_030_261_248,
    "llama32_1b": 1_235_814_400,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    options = preset(name)
    assert options.pop("_target_") == "nemolet.language.CausalLM"
    with torch.device("meta"):
        model = CausalLM(**options)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_a_model_made_without_memory_runs_once_it_is_loaded():
    expected = tiny(kv_heads=2)
    with torch.device("meta"):
        model = tiny(kv_heads=2)
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(model(tokens), expected(tokens), rtol=0, atol=0)


def test_a_padded_vocabulary_is_invisible():
    plain, padded = tiny(vocab_size=37), tiny(vocab_size=37, pad_vocab_to=64)
    state = plain.state_dict()
    for name in ("graph.embed.weight", "graph.head.weight"):
        state[name] = torch.cat((state[name], torch.full((27, 16), 1e4)))
    padded.load_state_dict(state)
    tokens = torch.arange(37)[None, :20]
    torch.testing.assert_close(padded(tokens), plain(tokens), rtol=0, atol=0)


# --------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("changes", [{"kv_heads": 2}, GPT2, {"window": 3}], ids=["llama", "gpt2", "window"])
def test_editing_a_document_changes_no_logit_of_another(changes):
    model = tiny(**changes)
    tokens = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[1] * 4 + [2] * 5 + [3] * 3] * 2)
    positions = torch.cat([torch.arange(n) for n in (4, 5, 3)])[None].expand(2, -1)
    before = model(tokens, segments, positions)
    for document in (1, 2, 3):
        edited = torch.where(segments == document, (tokens + 11) % 37, tokens)
        after = model(edited, segments, positions)
        assert torch.equal(after[segments != document], before[segments != document])
        assert not torch.allclose(after[segments == document], before[segments == document])
    torch.testing.assert_close(before[:, 4:9], model(tokens[:, 4:9]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{"kv_heads": 2}, GPT2], ids=["llama", "gpt2"])
def test_gradients_reach_only_the_document_of_the_loss(changes):
    model = tiny(**{**changes, "tied": False})
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    model(tokens, torch.tensor([[1, 1, 1, 2, 2, 2]]))[:, 3:].sum().backward()
    touched = model.graph.embed.weight.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert touched == [4, 5, 6]


# -------------------------------------------------------------------------------------- compiling


@pytest.mark.parametrize("changes", [{"kv_heads": 2, "qk_norm": True}, GPT2], ids=["llama", "gpt2"])
def test_forward_compiles_without_a_graph_break(changes):
    torch._dynamo.reset()
    model = tiny(**changes)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    tokens = torch.randint(0, 37, (2, 9))
    segments = torch.tensor([[1] * 4 + [2] * 5] * 2)
    positions = torch.cat((torch.arange(4), torch.arange(5)))[None].expand(2, -1)
    torch.testing.assert_close(compiled(tokens), model(tokens))
    torch.testing.assert_close(compiled(tokens, segments, positions), model(tokens, segments, positions))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}])
def test_the_loss_compiles_and_is_the_same(options):
    torch._dynamo.reset()
    loss = CrossEntropy(**options)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 37, (2, 9), generator=generator)
    labels[0, :3] = -100
    results = []
    for call in (loss, compiled):
        logits = torch.randn(2, 9, 37, generator=generator.manual_seed(1), requires_grad=True)
        total = call(logits, labels).loss
        results.append((total, *torch.autograd.grad(2 * total, logits)))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs)


# ------------------------------------------------------------------------------- the loss in chunks


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_loss_in_chunks_is_the_loss(monkeypatch, smoothing, z_loss, rows):
    monkeypatch.setattr("nemolet.language.losses._rows", lambda logits_NV: rows)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 11, (2, 7), generator=generator)
    labels[0, :2] = -100
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing
    )
    expected = expected + z_loss * logits.logsumexp(-1)[labels != -100].square().sum()
    total, count = CrossEntropy(label_smoothing=smoothing, z_loss=z_loss)(logits, labels)
    assert count.item() == 12
    torch.testing.assert_close(total, expected)
    (wanted,) = torch.autograd.grad(0.5 * expected, logits)
    for _ in range(2):  # the backward pass may be repeated
        (got,) = torch.autograd.grad(0.5 * total, logits, retain_graph=True)
        torch.testing.assert_close(got, wanted)


def test_the_loss_of_half_precision_logits_is_summed_in_single():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(50, 301, generator=generator)).bfloat16().requires_grad_()
    labels = torch.randint(0, 301, (50,), generator=generator)
    wide = logits.detach().float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, labels, reduction="sum", label_smoothing=0.1)
    total, _ = CrossEntropy(label_smoothing=0.1)(logits[None], labels[None])
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    total.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, wide.grad.bfloat16())


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 3},
        {"heads": 4, "kv_heads": 3},
        {"width": 12},
        {"rope_scaling": {"kind": "linear", "size": 2.0}},
        {"activation": "softmax"},
        {"checkpointing": "half"},
    ],
    ids=str,
)
def test_impossible_models_are_refused_with_a_fix(changes):
    with pytest.raises((ShapeError, ConfigError)) as caught:
        tiny(**changes)
    assert caught.value.fix


def test_a_sequence_longer_than_learned_positions_is_refused():
    with pytest.raises(ShapeError, match="longer than its positions"):
        tiny(**GPT2)(torch.zeros(1, 33, dtype=torch.long))


def test_checks_name_a_tensor_of_the_wrong_rank():
    with nl.checked(), pytest.raises(NemoletError, match="tokens"):
        tiny()(torch.zeros(4, dtype=torch.long))


def test_half_precision_stays_close():
    model, tokens = tiny(context=512), torch.randint(0, 37, (1, 400), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(tokens).float().softmax(-1), expected, rtol=0.05, atol=2e-3)
    torch.testing.assert_close(model.bfloat16()(tokens).float().softmax(-1), expected, rtol=0.05, atol=2e-3)
