"""Nothing changes on the way there and back: tensors, configs, files; whole models and streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import nemolet as nl
from nemolet.cli import main
from nemolet.config import build
from nemolet.convert import convert, read, write
from nemolet.convert.architecture import fitting
from nemolet.errors import ConversionError

from .conftest import MODELS, VOCAB, Pair
from .tiny_models import example, first

TOKENS = torch.arange(4, 24)[None]
SMALL = {"vocab_size": VOCAB, "layers": 2, "width": 32, "heads": 4, "context": 64}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def assert_equal_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def run(model: torch.nn.Module) -> torch.Tensor:
    ours, _ = example(type(model).__name__)
    with torch.no_grad():
        return first(model(**ours))


def test_there_and_back_is_equal(pair: Pair, tmp_path, table):
    out = write(tmp_path / "out", model=pair.ours.model, extra=pair.ours.extra)
    assert_equal_tensors(tensors(pair.folder), tensors(out))
    table.equal(pair.name, "bytes", True)
    for name in ("config.json", "generation_config.json"):
        if (pair.folder / name).exists():
            assert json.loads((out / name).read_text()) == json.loads((pair.folder / name).read_text())


def test_there_and_back_by_files_is_equal(pair: Pair, tmp_path):
    file = convert(pair.folder, tmp_path / "m.nemolet")
    out = convert(file, tmp_path / "out")
    assert_equal_tensors(tensors(pair.folder), tensors(out))
    assert (out / "config.json").read_bytes() == (pair.folder / "config.json").read_bytes()
    loaded = nl.load(file)
    assert loaded.config["model"] == pair.ours.config["model"]
    assert torch.equal(run(loaded.model), run(pair.ours.model))
    assert loaded.extra["config.json"] == (pair.folder / "config.json").read_bytes()


def test_a_config_that_is_derived_is_understood(pair: Pair, tmp_path):
    """Without the config it came with, ours alone gives one from which transformers builds the same model."""
    model_class, _, _ = MODELS[pair.name]
    out = write(tmp_path / "out", model=pair.ours.model, architecture=model_class)
    assert_equal_tensors(tensors(pair.folder), tensors(out))
    theirs = getattr(transformers, model_class).from_pretrained(out, attn_implementation="eager").eval()
    _, inputs = example(pair.kind)
    with torch.no_grad():
        found, known = theirs(**inputs)[0], pair.theirs(**inputs)[0]
    torch.testing.assert_close(found, known, rtol=0, atol=1e-6)
    again = read(out)
    assert torch.equal(run(again.model), run(pair.ours.model))


def test_the_architecture_is_found_without_being_named(pair: Pair, tmp_path):
    """The first that fits need not be the one it came from, but computes the same."""
    config = pair.ours.model.config()
    chosen = fitting(config)
    out = write(tmp_path / "out", model=pair.ours.model)
    assert json.loads((out / "config.json").read_text())["architectures"] == [chosen.name]
    assert torch.equal(run(read(out).model), run(pair.ours.model))


NATIVE = {
    "gpt2": ({"norm": "layer", "activation": "gelu_tanh", "gated": False, "position": "learned", "bias": True}, "GPT2"),
    "llama": ({"kv_heads": 2, "tied": False}, "Llama"),
    "scaled": (
        {"rope_scaling": {"kind": "linear", "factor": 4.0}, "rope_base": 5000.0, "norm_eps": 1e-6, "tied": True},
        "Llama",
    ),
    "window": ({"window": 8, "tied": False}, "Mistral"),
    "wide": ({"window": 100, "tied": False}, "Mistral"),  # wider than the context, which is no error there either
    "local": (
        {"window": 8, "qk_norm": True, "local": {"layers": [False, True]}, "attention": {"head_size": 12}},
        "Qwen3",
    ),
    "padded": ({"pad_vocab_to": 64, "tied": False}, "Llama"),
    "gemma": (
        {
            "norm": "rms_zero",
            "activation": "gelu_tanh",
            "residual": {"order": "sandwich"},
            "embedding_scale": 32**0.5,
            "attention": {"softcap": 5.0, "scale": 0.25},
            "softcap": 7.0,
        },
        "Gemma2",
    ),
}


@pytest.mark.parametrize("name", NATIVE)
def test_a_model_of_ours_goes_to_transformers_and_back(name, tmp_path):
    options, family = NATIVE[name]
    torch.manual_seed(0)
    ours = build({"_target_": "nemolet.language.CausalLM", **SMALL, **options}).eval()
    out = write(tmp_path / "out", model=ours)
    assert json.loads((out / "config.json").read_text())["architectures"][0].startswith(family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS), rtol=0, atol=1e-5)
    again = read(out).model
    own = {
        n: t[:VOCAB] if n in ("graph.embed.weight", "graph.head.weight") else t for n, t in ours.state_dict().items()
    }
    assert own.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, own[n]) for n, tensor in again.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_as_it_is(dtype, pairs, tmp_path):
    pair = pairs("llama3")
    folder = tmp_path / "half"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(pair.folder).to(dtype)
    theirs.save_pretrained(folder)
    ours = read(folder).model
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    assert_equal_tensors(tensors(folder), tensors(convert(convert(folder, tmp_path / "m.nemolet"), tmp_path / "out")))
    assert_equal_tensors(tensors(folder), tensors(write(tmp_path / "plain", model=ours)))
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]
    wide = read(folder, dtype=torch.float32).model
    torch.testing.assert_close(run(wide), run(ours).float(), rtol=0.1, atol=0.1)


def test_shards(pairs, tmp_path):
    pair = pairs("llama2")
    folder = tmp_path / "sharded"
    pair.theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert torch.equal(run(read(folder).model), run(pair.ours.model))
    out = write(tmp_path / "out", model=pair.ours.model, extra=pair.ours.extra, shard_bytes=20_000)
    assert len(list(out.glob("*.safetensors"))) > 3 and not (out / "model.safetensors").exists()
    assert_equal_tensors(tensors(out), tensors(pair.folder))
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert_equal_tensors(dict(again.state_dict()), dict(pair.theirs.state_dict()))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(pair.folder).values())


def test_a_model_that_learned_is_written_with_what_it_learned(pairs, tmp_path):
    pair = pairs("qwen2")
    model = read(pair.folder).model.train()
    model(TOKENS).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    out = write(tmp_path / "out", model=model, extra=pair.ours.extra)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model.eval()(TOKENS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_old_names_of_norms_and_a_missing_prefix_are_read(prefix, pairs, tmp_path):
    pair = pairs("bert")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors(pair.folder).items()
    }
    (tmp_path / "config.json").write_bytes((pair.folder / "config.json").read_bytes())
    moved = {prefix + n.removeprefix("bert.") if n.startswith("bert.") else n: t for n, t in renamed.items()}
    safetensors.torch.save_file(moved, tmp_path / "model.safetensors")
    assert torch.equal(run(read(tmp_path).model), run(pair.ours.model))


def test_a_tied_weight_stays_one(pairs):
    model = pairs("gpt2").ours.model
    assert model.graph.head.weight is model.graph.embed.weight
    assert len(list(model.parameters())) == len(tensors(pairs("gpt2").folder))


def test_loading_a_folder_is_loading(pairs):
    loaded = nl.load(pairs("gpt2").folder)
    assert not loaded.model.training
    assert torch.equal(run(loaded.model), run(pairs("gpt2").ours.model))


def test_what_cannot_be_expressed_says_why(tmp_path):
    odd = nl.language.CausalLM(**SMALL, activation="relu2", gated=False, position="none")
    with pytest.raises(ConversionError, match="no known architecture") as caught:
        write(tmp_path / "out", model=odd)
    assert "LlamaForCausalLM" in caught.value.found and "gated" in caught.value.found
    with pytest.raises(ConversionError, match="cannot express") as caught:
        write(tmp_path / "out", model=nl.language.CausalLM(**SMALL, window=8), architecture="llama")
    assert "local" in str(caught.value.found)
    partial = nl.language.CausalLM(**SMALL, attention=nl.nn.AttentionOptions(rotary=0.5, softcap=3.0))
    for name in ("llama", "mistral", "qwen3"):  # which rotate whole heads, whatever their config says
        with pytest.raises(ConversionError, match="cannot express") as caught:
            write(tmp_path / "out", model=partial, architecture=name)
        assert "attention.rotary: 0.5 and 1.0" in str(caught.value.found)
        assert "attention.softcap: 3.0 and None" in str(caught.value.found)
    with pytest.raises(ConversionError, match="not known"):
        write(tmp_path / "out", model=nl.language.CausalLM(**SMALL), architecture="lama")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.safetensors").touch()
    with pytest.raises(ConversionError, match="not empty"):
        write(tmp_path / "full", model=nl.language.CausalLM(**SMALL))


def test_the_verb_goes_both_ways(pairs, tmp_path, capsys):
    file, out = tmp_path / "m.nemolet", tmp_path / "out"
    assert main(["convert", f"from={pairs('qwen3').folder}", f"to={file}"]) == 0
    assert str(file) in capsys.readouterr().out
    assert main(["convert", f"from={file}", f"to={out}", "architecture=qwen3", "shard_gb=0.00002"]) == 0
    assert "model-00001-of-" in capsys.readouterr().out
    assert_equal_tensors(tensors(pairs("qwen3").folder), tensors(out))
