"""An adapter of PEFT on every architecture, both ways: its layers are those of the table of the conversion."""

from __future__ import annotations

import copy

import pytest
import torch

from nemolet.archive import load
from nemolet.convert import read
from nemolet.convert.adapters import export_adapter, import_adapter
from nemolet.errors import ConversionError
from nemolet.nn import Adapter, adapt, adapted_layers

from .conftest import nl, transformers
from .tiny_models import example, first

peft = pytest.importorskip("peft", reason="peft is the reference")
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def outputs(model, theirs, kind):
    """What ours and theirs say of the same; theirs has the blank of recognizers first, and is heard as it is."""
    ours, call = example(kind)
    expected = theirs(**call)[0]
    if kind == "CTCRecognizer":
        hidden = model.encoder(ours["audio"][..., None]).hidden
        return model.frame_logits(hidden).roll(1, -1).log_softmax(-1), expected.log_softmax(-1)
    return first(model(**ours)), expected[:, 0] if kind == "RewardModel" else expected


def linear_layers(theirs):
    """Their names; without heads of a vocabulary."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    tables = {id(module.weight) for module in theirs.modules() if isinstance(module, torch.nn.Embedding)}
    found = {name: module for name, module in theirs.named_modules() if isinstance(module, kinds)}
    return [name for name, module in found.items() if id(module.weight) not in tables and name != "lm_head"]


def disturb(model):
    """As if the additions were trained."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if "magnitude" in name:
            parameter.mul_(1.2)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.up, std=0.3)
        if layer.lengths is not None:
            layer.lengths.mul_(1.2)


@torch.no_grad()
def test_theirs_becomes_ours_and_theirs_again(pair, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=linear_layers(pair.theirs))
    theirs = peft.get_peft_model(copy.deepcopy(pair.theirs), config).eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    archive = read(pair.folder)
    before, _ = outputs(archive.model, pair.theirs, pair.kind)
    import_adapter(archive.model, tmp_path / "adapter", extra=archive.extra)
    found, expected = outputs(archive.model, theirs, pair.kind)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - before).abs().max() > 1e-2
    export_adapter(archive.model, tmp_path / "back", extra=archive.extra)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(pair.theirs), str(tmp_path / "back")).eval()
    torch.testing.assert_close(outputs(archive.model, again, pair.kind)[1], expected, **CLOSE)


@torch.no_grad()
def test_ours_becomes_theirs(pair, tmp_path):
    archive = read(pair.folder)
    adapt(archive.model, Adapter(rank=2, alpha=3, dora=True))
    disturb(archive.model)
    export_adapter(archive.model, tmp_path / "adapter", extra=archive.extra)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.theirs), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(*outputs(archive.model, theirs, pair.kind), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(("name", "body"), [("llama2", "LlamaModel"), ("bert", "BertModel")])
def test_an_adapter_of_the_body_fits_the_model_with_a_head(name, body, pairs, tmp_path):
    """Its names lack the prefix that those of the whole model have."""
    pair = pairs(name)
    theirs = getattr(transformers, body).from_pretrained(pair.folder).eval()
    targets = [n for n in linear_layers(theirs) if "pooler" not in n]
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=targets)).eval()
    disturb(adapted)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    whole = copy.deepcopy(pair.theirs)
    whole.base_model.load_state_dict(adapted.merge_and_unload().state_dict(), strict=False)
    archive = read(pair.folder)
    import_adapter(archive.model, tmp_path / "adapter", extra=archive.extra)
    torch.testing.assert_close(*outputs(archive.model, whole, pair.kind), **CLOSE)


def test_what_lies_in_one_weight_is_written_for_one_architecture_only(pairs, tmp_path):
    """A Llama may be a Phi-3 too, whose projections have other names: it is not guessed."""
    archive = read(pairs("llama2").folder)
    adapt(archive.model, Adapter(rank=2, targets=("attention.qkv",)))
    with pytest.raises(ConversionError, match=r"several architectures[\s\S]*Phi3ForCausalLM[\s\S]*architecture="):
        export_adapter(archive.model, tmp_path / "unsaid")
    names = {}
    for name, said in {"phi": {"architecture": "phi3"}, "llama": {"extra": archive.extra}}.items():
        export_adapter(archive.model, tmp_path / name, **said)
        names[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert b"qkv_proj" in names["phi"] and b"k_proj" in names["llama"] and b"qkv_proj" not in names["llama"]


def test_an_archive_knows_what_it_came_from(pairs, tmp_path):
    archive = read(pairs("phi3").folder)
    adapt(archive.model, Adapter(rank=2, targets=("attention.qkv",)))
    export_adapter(archive.model, tmp_path / "said", extra=archive.extra)
    nl.save(tmp_path / "phi.nemolet", model=read(pairs("phi3").folder).model, tokenizer=None, extra=archive.extra)
    kept = load(tmp_path / "phi.nemolet")
    import_adapter(kept.model, tmp_path / "said", extra=kept.extra)
    assert len(list(adapted_layers(kept.model))) == 3


def refused(folder, archive):
    with pytest.raises(ConversionError, match="these additions do not fit this base model") as caught:
        import_adapter(archive.model, folder, extra=archive.extra)
    assert not list(adapted_layers(archive.model))
    return str(caught.value)


def test_additions_that_do_not_fit_are_named_with_the_reason(pairs, tmp_path):
    llama = pairs("llama2")
    wide = transformers.LlamaConfig(**{**llama.theirs.config.to_dict(), "hidden_size": 48, "num_hidden_layers": 4})
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    wide = transformers.LlamaForCausalLM(wide)
    wide.config._name_or_path = wide.name_or_path = "acme/wide"
    peft.get_peft_model(wide, config).save_pretrained(tmp_path / "wide")
    message = refused(tmp_path / "wide", read(llama.folder))
    assert "model.layers.3.self_attn.q_proj: no linear layer of LlamaForCausalLM" in message
    assert "model.layers.0.self_attn.q_proj: for a weight of (32, 48), here it is (32, 32)" in message
    assert "acme/wide" in message
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    untied = peft.get_peft_model(copy.deepcopy(llama.theirs), config)
    untied.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    assert "lm_head: a part of Head here, not a linear layer" in refused(tmp_path / "head", read(llama.folder))
    config = peft.LoraConfig(r=2, target_modules=["proj_out"])
    peft.get_peft_model(copy.deepcopy(pairs("whisper").theirs), config).save_pretrained(tmp_path / "tied")
    assert "proj_out: tied to the embedding" in refused(tmp_path / "tied", read(pairs("whisper").folder))
    config = peft.LoraConfig(r=2, target_modules=["conv_layers.1.conv"])
    peft.get_peft_model(copy.deepcopy(pairs("hubert").theirs), config).save_pretrained(tmp_path / "conv")
    with pytest.raises(nl.errors.ConfigError, match="no addition to a matrix"):
        import_adapter(read(pairs("hubert").folder).model, tmp_path / "conv")
