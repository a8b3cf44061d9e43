"""Folders whose tensors have other names than usual: tied under another one, without a prefix, of another class."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from nemolet.config import build
from nemolet.convert import read, write
from nemolet.errors import ConversionError

from .tiny_models import MODELS, example, first, shaken


def run(model: Any) -> torch.Tensor:
    ours, _ = example(type(model).__name__)
    with torch.no_grad():
        return first(model(**ours))


def run_theirs(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**example(kind)[1])[0]


def edited(pair: Any, folder: Path, edit: Any = None, **config: Any) -> Path:
    """A copy of a folder with other tensors and another config."""
    shutil.copytree(pair.folder, folder)
    if edit is not None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        edit(tensors)
        content = {name: tensor.clone() for name, tensor in tensors.items()}
        safetensors.torch.save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    content = {**json.loads((folder / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def saved(name: str, model_class: str, folder: Path, **arguments: Any) -> Any:
    """A model of theirs of another class than the one with the same config in the table."""
    _, config_class, known = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**known, **arguments})
    model = shaken(getattr(transformers, model_class)(config)).eval()
    model.save_pretrained(folder)
    return model


TIED = [
    ("gpt2", "transformer.wte.weight", "lm_head.weight"),
    ("llama3", "model.embed_tokens.weight", "lm_head.weight"),
    ("bert", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("bert", "cls.predictions.bias", "cls.predictions.decoder.bias"),
    ("roberta", "lm_head.bias", "lm_head.decoder.bias"),
    ("distilbert", "distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
    ("electra", "electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"),
    ("modernbert", "model.embeddings.tok_embeddings.weight", "decoder.weight"),
    ("t5", "shared.weight", "encoder.embed_tokens.weight"),
    ("t5", "shared.weight", "lm_head.weight"),
    ("bart", "model.shared.weight", "model.decoder.embed_tokens.weight"),
    ("marian", "model.shared.weight", "lm_head.weight"),
    ("whisper", "model.decoder.embed_tokens.weight", "proj_out.weight"),
]


@pytest.mark.parametrize(("name", "usual", "other"), TIED)
def test_a_tied_tensor_is_read_under_either_name_and_must_be_the_same_under_both(name, usual, other, pairs, tmp_path):
    pair = pairs(name)
    moved = edited(pair, tmp_path / "moved", lambda tensors: tensors.update({other: tensors.pop(usual)}))
    assert torch.equal(run(read(moved).model), run(pair.ours.model))
    twice = edited(pair, tmp_path / "twice", lambda tensors: tensors.update({other: tensors[usual]}))
    assert torch.equal(run(read(twice).model), run(pair.ours.model))
    odd = edited(pair, tmp_path / "odd", lambda tensors: tensors.update({other: tensors[usual] + 1}))
    if (name, other) != ("t5", "lm_head.weight"):  # whose weights tell whether the head is tied
        with pytest.raises(ConversionError, match="should be a copy"):
            read(odd)


def test_the_head_of_t5_is_tied_where_its_weights_are(pairs, tmp_path):
    """Transformers 5 writes that it is tied, whatever it is."""
    pair = pairs("t5")
    own = edited(
        pair, tmp_path / "own", lambda tensors: tensors.update({"lm_head.weight": tensors["shared.weight"] * 2})
    )
    ours = read(own)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(own, attn_implementation="eager")
    assert not ours.model.config()["tied"]
    torch.testing.assert_close(run(ours.model), run_theirs(theirs, "EncoderDecoder"), rtol=0, atol=1e-5)
    out = write(tmp_path / "out", model=ours.model, extra=ours.extra)
    assert torch.equal(run(read(out).model), run(ours.model))
    again = transformers.T5ForConditionalGeneration.from_pretrained(out, attn_implementation="eager")
    torch.testing.assert_close(run_theirs(again, "EncoderDecoder"), run(ours.model), rtol=0, atol=1e-5)
    none = edited(pair, tmp_path / "none", tie_word_embeddings=False, scale_decoder_outputs=False)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(none, attn_implementation="eager")
    torch.testing.assert_close(run(read(none).model), run_theirs(theirs, "EncoderDecoder"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bart", "marian", "t5", "whisper", "gpt2"])
def test_an_untied_model_is_written_so_that_transformers_reads_it(name, pairs, tmp_path):
    pair = pairs(name)
    torch.manual_seed(1)
    ours = build({**pair.ours.model.config(), "tied": False}).eval()
    shaken(ours)
    out = write(tmp_path / "out", model=ours, architecture=MODELS[name][0])
    theirs = getattr(transformers, MODELS[name][0]).from_pretrained(out, attn_implementation="eager")
    torch.testing.assert_close(run_theirs(theirs, pair.kind), run(ours), rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    for folder in (out, tmp_path / "again"):
        # Whisper's keys have no bias, where ours had one that changed nothing.
        torch.testing.assert_close(run(read(folder).model), run(ours), rtol=0, atol=1e-5)


def test_embeddings_that_are_three_are_refused(tmp_path):
    saved("bart", "BartForConditionalGeneration", tmp_path, tie_word_embeddings=False)
    with pytest.raises(ConversionError, match="should be a copy") as caught:
        read(tmp_path)
    assert "embed_tokens" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "model_class", "beside"),
    [
        ("bert", "BertForPreTraining", "MaskedLM"),
        ("electra-encoder", "ElectraForPreTraining", "TextEncoder"),
        ("llama3", "LlamaModel", "CausalLM"),
        ("t5", "T5Model", "EncoderDecoder"),
    ],
)
def test_a_class_with_another_head_is_read_without_it_and_written_as_what_was_read(name, model_class, beside, tmp_path):
    theirs = saved(name, model_class, tmp_path / "in")
    ours = read(tmp_path / "in")
    assert type(ours.model).__name__ == beside
    out = write(tmp_path / "out", model=ours.model, extra=ours.extra)
    written = json.loads((out / "config.json").read_text())["architectures"][0]
    assert written == MODELS[name][0]
    again = getattr(transformers, written).from_pretrained(out, attn_implementation="eager")
    torch.testing.assert_close(run(ours.model), run_theirs(again, beside), rtol=0, atol=1e-5)
    if model_class == "BertForPreTraining":
        torch.testing.assert_close(run(ours.model), run_theirs(theirs, beside), rtol=0, atol=1e-5)


def test_a_body_is_read_from_the_weights_of_a_model_with_a_head(pairs, tmp_path):
    for name, model_class in (("distilbert", "DistilBertModel"), ("electra", "ElectraModel"), ("wav2vec2-ctc", "")):
        model_class = model_class or "Wav2Vec2Model"
        folder = edited(pairs(name), tmp_path / name, architectures=[model_class])
        ours = read(folder).model
        theirs = getattr(transformers, model_class).from_pretrained(folder, attn_implementation="eager")
        torch.testing.assert_close(run(ours), run_theirs(theirs, type(ours).__name__), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "model_class", "lacks"),
    [
        ("llama2", "LlamaModel", "lm_head.weight"),
        ("bart", "BartModel", "final_logits_bias"),
        ("t5", "T5EncoderModel", "decoder.block.0"),
    ],
)
def test_a_body_without_the_head_that_it_needs_says_so(name, model_class, lacks, tmp_path):
    saved(name, model_class, tmp_path)
    with pytest.raises(ConversionError, match=lacks) as caught:
        read(tmp_path)
    assert caught.value.fix is not None
    assert f"names {model_class}, which is read as {MODELS[name][0]}" in caught.value.fix
