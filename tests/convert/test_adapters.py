"""Adapters of PEFT both ways: equal logits on both sides."""

from __future__ import annotations

import json

import pytest
import torch

import nemolet as nl
from nemolet.cli import main
from nemolet.convert import read
from nemolet.convert.adapters import export_adapter, import_adapter
from nemolet.errors import ConfigError, NemoletError
from nemolet.language import Decoding, PromptTuned, Sampling, load_prompt, save_prompt
from nemolet.nn import Adapter, adapt, adapted_layers, merge, save_adapter
from nemolet.nn.adapter_files import load_adapter
from nemolet.nn.adapter_settings import lora_settings

peft = pytest.importorskip("peft", reason="peft is the reference")
transformers = pytest.importorskip("transformers", reason="transformers is the reference")
TOKENS = torch.arange(14).view(2, 7)


def saved(kind, folder):
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=32)
        model = transformers.GPT2LMHeadModel(config)
    model.eval().save_pretrained(folder)
    return model


TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", list(TARGETS))
def test_theirs_becomes_ours(kind, dora, tmp_path):
    base = saved(kind, tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS[kind], use_dora=dora)
    theirs = peft.get_peft_model(base, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if "magnitude" in name:
            parameter.data.mul_(1.2)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = read(tmp_path / "base").model
    plain = ours(TOKENS)
    import_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS).logits
    assert (ours(TOKENS) - expected).abs().max() < 1e-5
    assert (ours(TOKENS) - plain).abs().max() > 1e-3


def test_the_verb_goes_both_ways(tmp_path):
    """PEFT's adapter, with ranks and factors of its own for some layers, becomes ours, and that PEFT's again."""
    base = saved("llama", tmp_path / "base")
    mixed = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"v_proj": 3}}
    config = peft.LoraConfig(r=2, target_modules=TARGETS["llama"], **mixed)
    theirs = peft.get_peft_model(base, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    convert = ["convert", f"base={tmp_path / 'base'}"]
    assert main([*convert, f"from={tmp_path / 'theirs'}", f"to={tmp_path / 'ours'}"]) == 0
    ours = read(tmp_path / "base").model
    assert "graph.decoder.blocks.0.attention.qkv" in load_adapter(ours, tmp_path / "ours")
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS).logits
        assert (ours(TOKENS) - expected).abs().max() < 1e-5
        assert main([*convert, f"from={tmp_path / 'ours'}", f"to={tmp_path / 'back'}"]) == 0
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        found = peft.PeftModel.from_pretrained(again, str(tmp_path / "back")).eval()(input_ids=TOKENS).logits
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", list(TARGETS))
def test_ours_becomes_theirs(kind, dora, tmp_path):
    base = saved(kind, tmp_path / "base")
    ours = read(tmp_path / "base").model
    adapt(ours, Adapter(rank=2, alpha=6, targets=("attention.qkv", "feed_forward.up"), dora=dora))
    for _, layer in adapted_layers(ours):
        torch.nn.init.normal_(layer.up, std=0.3)
        if layer.lengths is not None:
            layer.lengths.data.mul_(1.2)
    export_adapter(ours, tmp_path / "adapter", architecture=kind)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS).logits
    assert (ours(TOKENS) - expected).abs().max() < 1e-5
    again = read(tmp_path / "base").model
    import_adapter(again, tmp_path / "adapter")
    assert (again(TOKENS) - expected).abs().max() < 1e-5


def test_an_adapter_of_another_model_is_refused(tmp_path):
    saved("gpt2", tmp_path / "base")
    saved("llama", tmp_path / "other")
    other = read(tmp_path / "other").model
    adapt(other, Adapter(rank=2, targets=("attention.qkv",)))
    export_adapter(other, tmp_path / "adapter", architecture="llama")
    with pytest.raises(NemoletError, match="do not fit this base model"):
        import_adapter(read(tmp_path / "base").model, tmp_path / "adapter")


def trained(base, folder, **settings):
    """Theirs as if it were trained, saved; gives what PEFT finds after loading it again."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS["llama"], **settings)
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or ("lora_A" in name and settings.get("init_lora_weights") == "mica"):
                parameter.add_(torch.randn(parameter.shape) * 0.3)
        theirs.save_pretrained(folder)
        return theirs(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
        {"rank_pattern": {"^model.layers.0.*_proj": 1}, "use_dora": True},
        {"fan_in_fan_out": True},
        {"lora_dropout": 0.3},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian", "qalora_group_size": 8},
        {"init_lora_weights": "mica"},
    ],
    ids=str,
)
def test_settings_are_obeyed(settings, tmp_path):
    expected = trained(saved("llama", tmp_path / "base"), tmp_path / "adapter", **settings)
    ours = read(tmp_path / "base").model
    import_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        assert (ours(TOKENS) - expected).abs().max() < 1e-5
    export_adapter(ours, tmp_path / "back", architecture="llama")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "back")).eval()
    with torch.no_grad():
        assert (again(input_ids=TOKENS).logits - expected).abs().max() < 1e-5
    assert again.peft_config["default"].lora_dropout == settings.get("lora_dropout", 0.0)


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_2"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"lora_bias": True}, "merge_and_unload"),
        ({"bias": "all"}, "merge_and_unload"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "merge_and_unload"),
        ({"modules_to_save": ["lm_head"]}, "merge_and_unload"),
        ({"trainable_token_indices": [3, 4]}, "merge_and_unload"),
        ({"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}, "train one without"),
    ],
    ids=str,
)
def test_settings_that_are_not_obeyed_are_refused(settings, fix, tmp_path):
    trained(saved("llama", tmp_path / "base"), tmp_path / "adapter", **settings)
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}[\\s\\S]*{fix}"):
        import_adapter(read(tmp_path / "base").model, tmp_path / "adapter")


@pytest.mark.parametrize("beginning", ["pissa", "olora"])
def test_a_beginning_that_peft_has_taken_out_again(beginning, tmp_path):
    """The advice in the error leads to an adapter that is read, with the logits that PEFT found in training."""
    base = saved("llama", tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS["llama"], init_lora_weights=beginning)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "before")
    theirs.peft_config["default"].init_lora_weights = beginning
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
        expected = theirs(input_ids=TOKENS).logits
    theirs.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    ours = read(tmp_path / "base").model
    import_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        assert (ours(TOKENS) - expected).abs().max() < 1e-5


def test_every_setting_of_peft_is_decided(tmp_path):
    """What an unknown setting of a later version would do is not known: off it is read, on it is refused."""
    config = peft.LoraConfig(target_modules=["q_proj"], runtime_config=peft.LoraRuntimeConfig()).to_dict()
    plain = json.loads(json.dumps(config, default=list))
    lora_settings({**plain, "of_a_later_version": None, "and_another": {}}, "here")
    with pytest.raises(ConfigError, match="of_a_later_version=null[\\s\\S]*of_a_later_version=0.5"):
        lora_settings({**plain, "of_a_later_version": 0.5}, "here")
    for key, value in {"r": "8", "lora_alpha": None, "rank_pattern": {"q": 1.5}, "use_dora": 1}.items():
        with pytest.raises(ConfigError, match=f"another type|{key}"):
            lora_settings({**plain, key: value}, "here")
    with pytest.raises(ConfigError, match="no pattern"):
        lora_settings({**plain, "alpha_pattern": {"(": 1}}, "here")


def test_verbs_read_a_folder_with_an_adapter(tmp_path, capsys):
    """The same text as that of the merged model, from PEFT's adapter and from ours; a prompt stands before the text."""
    base = saved("gpt2", tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=TARGETS["gpt2"])).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.9)
    theirs.save_pretrained(tmp_path / "theirs")
    archive = read(tmp_path / "base")
    tokenizer = nl.tokenizers.CharTokenizer([chr(97 + i) for i in range(26)])
    import_adapter(archive.model, tmp_path / "theirs")
    save_adapter(archive.model, tmp_path / "ours")
    nl.save(tmp_path / "merged.nemolet", model=merge(archive.model), tokenizer=tokenizer)
    nl.save(tmp_path / "base.nemolet", model=read(tmp_path / "base").model, tokenizer=tokenizer, extra=archive.extra)
    (tmp_path / "text.txt").write_text("abcdefghijklmnop" * 20)

    def printed(archive, *more):
        say = ["generate", f"archive={tmp_path / archive}", "prompt=abc", "temperature=0", "max_new_tokens=12", *more]
        measure = ["evaluate", f"archive={tmp_path / archive}", f"data.path={tmp_path / 'text.txt'}", *more]
        assert main(say) == 0 and main(measure) == 0
        return capsys.readouterr().out

    merged = printed("merged.nemolet")
    for folder in ("theirs", "ours"):
        assert printed("base.nemolet", f"with_adapter={tmp_path / folder}") == merged
    assert printed("base.nemolet") != merged
    prompted(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "prompt")
    assert printed("base.nemolet", f"with_adapter={tmp_path / 'prompt'}") != printed("base.nemolet")


def prompted(base, folder):
    """Theirs, with a prompt of random numbers, saved."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    theirs = peft.get_peft_model(base, config).eval()
    torch.nn.init.normal_(theirs.prompt_encoder["default"].embedding.weight, std=0.5)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("kind", list(TARGETS))
@torch.no_grad()
def test_a_prompt_of_theirs_is_ours(kind, tmp_path):
    base = saved(kind, tmp_path / "base")
    theirs = prompted(base, tmp_path / "prompt")
    ours = load_prompt(read(tmp_path / "base").model, tmp_path / "prompt").eval()
    expected = theirs(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits[:, 5:]
    torch.testing.assert_close(ours(TOKENS), expected, rtol=0, atol=1e-5)
    assert (ours(TOKENS) - ours.base(TOKENS)).abs().max() > 1e-2
    prompts = [TOKENS[0, :4].tolist(), TOKENS[1].tolist()]
    decoding = Decoding(ours, prompts, sampling=Sampling(temperature=0.0), seed=0, max_new_tokens=8)
    decoding.step()
    cache = decoding.cache
    for _ in range(7):
        decoding.step()
    assert decoding.cache is cache  # nothing was read twice
    alone = [list(prompt) for prompt in prompts]
    for row in alone:
        for _ in range(8):
            ids = torch.tensor([row])
            row.append(int(theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].argmax()))
    assert decoding.rows == alone


@pytest.mark.parametrize("kind", list(TARGETS))
@torch.no_grad()
def test_a_prompt_of_ours_is_theirs(kind, tmp_path):
    base = saved(kind, tmp_path / "base")
    ours = PromptTuned(base=read(tmp_path / "base").model, length=3).eval()
    torch.nn.init.normal_(ours.prompt, std=0.5)
    save_prompt(ours, tmp_path / "prompt")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "prompt")).eval()
    found = theirs(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits[:, 3:]
    torch.testing.assert_close(found, ours(TOKENS), rtol=0, atol=1e-5)


def test_a_prompt_of_another_kind_or_width_is_refused(tmp_path):
    saved("gpt2", tmp_path / "base")
    base = read(tmp_path / "base").model
    adapt(base, Adapter(rank=2, targets=("attention.qkv",)))
    export_adapter(base, tmp_path / "lora")
    with pytest.raises(ConfigError, match="another kind of adapter"):
        load_prompt(read(tmp_path / "base").model, tmp_path / "lora")
    wide = nl.language.CausalLM(vocab_size=9, layers=1, width=8, heads=2, context=16)
    save_prompt(PromptTuned(base=wide, length=2), tmp_path / "prompt")
    with pytest.raises(ConfigError, match="another model"):
        load_prompt(read(tmp_path / "base").model, tmp_path / "prompt")
    with pytest.raises(ConfigError, match="no room"):
        PromptTuned(base=wide, length=16)
