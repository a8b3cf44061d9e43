"""Folders that are not what they should be are refused: everything at once, with a way out, and nothing executed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import nemolet as nl
from nemolet.convert import convert, read
from nemolet.errors import ArchiveError, ConversionError, TokenizerError

from .conftest import VOCAB


@pytest.fixture
def folder(pairs, tmp_path) -> Path:
    """A small Llama that may be broken."""
    return Path(shutil.copytree(pairs("llama2").folder, tmp_path / "model"))


def refused(path: Path, *words: str, **options: bool) -> ConversionError:
    """Both ways of reading say the same."""
    target = path.parent / "target.nemolet"
    with pytest.raises(ConversionError) as caught:
        convert(path, target, **options)
    with pytest.raises(ConversionError) as also:
        read(path, **options)
    assert not target.exists() and str(also.value) == str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return caught.value


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, edit) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_that_is_not_there(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        error = refused(path, "no folder of a Hugging Face model", "config.json")
        assert error.fix


def test_without_config_or_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "there are no weights", "model.safetensors.index.json", "config.json")
    (folder / "config.json").unlink()
    refused(folder, "no folder of a Hugging Face model")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'"text"'])
def test_a_config_that_is_none(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder, "this is no JSON", "config.json")


def test_an_unknown_architecture_lists_the_known(folder):
    edit_config(folder, architectures=["LlamaForCausalML"], model_type="lama")
    error = refused(folder, "LlamaForCausalML", "gpt2", "modernbert", "is it LlamaForCausalLM?")
    assert "docs/huggingface.md" in error.fix
    edit_config(folder, architectures=None, model_type=None)
    refused(folder, "this architecture is not known")


def test_another_head_is_not_taken_for_the_known_one(folder):
    edit_config(folder, architectures=["LlamaForTokenClassification"])
    refused(folder, "this architecture is not known", "LlamaForTokenClassification")


def test_a_classifier_with_several_labels_is_no_reward_model(folder):
    edit_config(folder, architectures=["LlamaForSequenceClassification"], id2label={"0": "a", "1": "b"})
    refused(folder, "no reward model", "2 labels")


def test_a_config_without_a_size(folder):
    """It means the usual size, as it does to transformers."""
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    error = refused(folder, "of another shape", "(96, 32) for (96, 4096)")
    assert "config.json leaves out hidden_size" in error.fix


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mlp_bias": True}, ("not supported", "mlp_bias")),
        ({"hidden_act": "mish"}, ("no counterpart", "hidden_act", "mish")),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ("scaling", "yarn", "llama3")),
        ({"num_attention_heads": 5}, ("builds no model",)),
        ({"hidden_size": "wide"}, ("builds no model",)),
    ],
)
def test_a_config_that_asks_for_something_else(folder, changes, words):
    edit_config(folder, **changes)
    refused(folder, *words)


def test_all_that_is_wrong_with_tensors_is_said_at_once(folder):
    def edit(tensors):
        tensors["model.layers.9.odd"] = torch.zeros(2)
        del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["lm_head.weight"] = torch.zeros(3, 4)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)

    edit_weights(folder, edit)
    error = refused(
        folder,
        "missing: model.layers.1.self_attn.k_proj.weight, model.norm.weight",
        "unknown: model.layers.9.odd",
        "of another shape: lm_head.weight (3, 4) for (96, 32)",
        "of another type: model.layers.0.mlp.up_proj.weight torch.int8",
    )
    assert "quantized" in error.fix


def test_another_size_of_the_model(folder):
    edit_config(folder, intermediate_size=64)
    error = refused(folder, "of another shape", "(48, 32) for (64, 32)")
    assert "another size" in error.fix


def test_a_long_list_is_cut(folder):
    edit_config(folder, num_hidden_layers=40)
    error = refused(folder, "missing: ", "more")
    assert len(str(error)) < 3000


def test_a_head_that_says_it_is_tied_but_is_not(folder):
    edit_config(folder, tie_word_embeddings=True)
    refused(folder, "lm_head.weight", "embedding")


def test_a_head_that_is_stored_twice_is_read(folder):
    edit_config(folder, tie_word_embeddings=True)
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = read(folder).model
    assert model.graph.head.weight is model.graph.embed.weight


def test_a_file_cut_anywhere(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 4, 8, 9, header // 2, header, header + 1, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        refused(folder, "model.safetensors")
    file.write_bytes(content + b"\0")
    refused(folder, "something follows")


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 8]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        {"a": {"shape": [1]}},
        {"a": 1},
        [],
    ],
)
def test_a_header_that_lies(folder, header):
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    refused(folder, "model.safetensors")


def test_shards_that_do_not_fit(folder, pairs):
    sharded = folder.parent / "sharded"
    pairs("llama2").theirs.save_pretrained(sharded, max_shard_size="20KB")
    shards = sorted(sharded.glob("*.safetensors"))
    content = shards[0].read_bytes()
    shards[0].unlink()
    refused(sharded, "shards are missing", shards[0].name)
    shards[0].write_bytes(shards[1].read_bytes())
    refused(sharded, "two files hold the same tensor")
    shards[0].write_bytes(content)
    index = sharded / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    whole["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(whole))
    refused(sharded, "the index and the shards disagree", "model.norm.weight")
    whole["weight_map"]["model.norm.weight"] = "../../etc/passwd"
    index.write_text(json.dumps(whole))
    refused(sharded, "no map of weights")


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def test_pickles_are_read_only_when_asked_and_never_run(folder):
    canary, old = folder.parent / "canary", folder / "pytorch_model.bin"
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, old)
    error = refused(folder, "pickled", "pytorch_model.bin")
    assert "pickles=true" in error.fix
    model = read(folder, pickles=True).model
    assert torch.equal(model.graph.decoder.norm.weight, tensors["model.norm.weight"])
    assert convert(folder, folder.parent / "m.nemolet", pickles=True).exists()
    for content in (pickle.dumps({"a": Bomb(canary)}), b"junk"):
        old.write_bytes(content)
        refused(folder, "pickled")
        refused(folder, "cannot be read", pickles=True)
    torch.save({"a": Bomb(canary)}, old)
    refused(folder, "cannot be read", pickles=True)
    assert not canary.exists()


def test_code_in_the_folder_is_not_touched(folder):
    canary = folder.parent / "canary"
    (folder / "modeling_llama.py").write_text(f"import pathlib; pathlib.Path({str(canary)!r}).touch()")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    assert read(folder).model is not None
    assert not canary.exists()


def word_level(size: int) -> bytes:
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, size)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w2"))
    made.add_special_tokens(["<s>", "</s>"])
    return made.to_str().encode()


def test_a_tokenizer_that_does_not_fit(folder):
    (folder / "tokenizer.json").write_bytes(word_level(VOCAB))
    assert read(folder).tokenizer.vocab_size == VOCAB
    (folder / "tokenizer.json").write_bytes(word_level(VOCAB + 1))
    refused(folder, "the tokenizer does not fit the model", "97 tokens")
    (folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(TokenizerError):
        read(folder)
    assert convert(folder, folder.parent / "m.nemolet", tokenizer=False).exists()


def test_the_hub_needs_a_connection(tmp_path):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(ConversionError, match="the Hub did not give this model") as caught:
        read("hf://nobody/no-such-model")
    assert "connection" in caught.value.fix


@pytest.mark.parametrize("name", ["../config.json", "a/b", "", ".hidden", "a b"])
def test_an_archive_with_odd_extras_is_not_written(name, tmp_path):
    with pytest.raises(ArchiveError, match="forbidden name"):
        nl.save(tmp_path / "m.nemolet", model=nl.nn.Linear("D", "D", 2, 2), extra={name: b"{}"})
    assert not list(tmp_path.iterdir())
