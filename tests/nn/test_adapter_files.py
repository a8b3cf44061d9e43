"""Additions in files: there and back, in the format of PEFT, and refused where they do not belong."""

from __future__ import annotations

import json

import pytest
import torch

import nemolet as nl
from nemolet.errors import ConfigError
from nemolet.nn import Adapter, adapt, adapted_layers, load_adapter, save_adapter

TOKENS = torch.arange(12).view(2, 6)


def model(seed=0, width=16):
    torch.manual_seed(seed)
    return nl.language.CausalLM(vocab_size=20, layers=2, width=width, heads=4, kv_heads=2)


def adapted(dora=False):
    made = model()
    adapt(made, Adapter(rank=3, alpha=6, targets=("attention.qkv", "feed_forward.up"), dora=dora))
    torch.manual_seed(9)
    for _, layer in adapted_layers(made):
        torch.nn.init.normal_(layer.up, std=0.3)
    return made


@pytest.mark.parametrize("dora", [False, True])
def test_there_and_back(tmp_path, dora):
    first, second = adapted(dora), model()
    save_adapter(first, tmp_path / "a")
    assert len(load_adapter(second, tmp_path / "a")) == 4
    assert torch.allclose(first(TOKENS), second(TOKENS), atol=1e-6)
    save_adapter(second, tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_adapter_of_another_base_is_refused_and_changes_nothing(tmp_path):
    save_adapter(adapted(), tmp_path)
    for other, message in ((model(seed=1), "fingerprint"), (model(width=32), r"\(32, 16\)|beside a weight")):
        before = other(TOKENS)
        with pytest.raises(ConfigError, match="another base model") as caught:
            load_adapter(other, tmp_path)
        assert __import__("re").search(message, str(caught.value))
        assert torch.equal(other(TOKENS), before)
        assert not list(adapted_layers(other))


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no adapter here"):
        load_adapter(model(), tmp_path)
    save_adapter(adapted(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["head"]}))
    with pytest.raises(ConfigError, match="this setting of the adapter is not supported"):
        load_adapter(model(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_adapter(model(), tmp_path)
    with pytest.raises(ConfigError, match="no addition to save"):
        save_adapter(model(), tmp_path)


def test_tensors_have_to_be_those_of_the_settings(tmp_path):
    save_adapter(adapted(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for changed, found in (({"r": 5}, "the settings say rank 5"), ({"use_dora": True}, "lora_magnitude_vector")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(ConfigError, match=found):
            load_adapter(model(), tmp_path)


def test_dropout_comes_along_and_acts_in_training_only(tmp_path):
    first, second = model(), model().eval()
    adapt(first, Adapter(rank=3, dropout=0.5))
    for _, layer in adapted_layers(first):
        torch.nn.init.normal_(layer.up, std=0.3)
    save_adapter(first, tmp_path)
    load_adapter(second, tmp_path)
    assert torch.equal(second(TOKENS), first.eval()(TOKENS))
    assert not torch.equal(second.train()(TOKENS), second.eval()(TOKENS))


def test_peft_reads_the_settings(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is the reference")
    save_adapter(adapted(dora=True), tmp_path, base="runs/demo/model.nemolet")
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha, config.use_dora) == (3, 6, True)
    assert config.base_model_name_or_path == "runs/demo/model.nemolet"
