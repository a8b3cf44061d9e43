"""Models write as their own ``generation_config.json`` says: token by token what transformers writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

import nemolet as nl
from nemolet.cli.generate import Settings, manner
from nemolet.convert import convert, read, write
from nemolet.errors import ConversionError, GenerationError
from nemolet.language import GenerationRules, Translator, beam_search
from nemolet.tokenizers.base import TableTokenizer

from .tiny_models import MODELS, VOCAB, save
from .tiny_tokenizers import save_tokenizer

MARKS: dict[str, dict[str, Any]] = {  # as published models of the family have them
    "t5": {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
    "bart": {
        "decoder_start_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "forced_bos_token_id": 1,
        "forced_eos_token_id": 2,
    },
    "marian": {
        "decoder_start_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bad_words_ids": [[0]],
        "forced_eos_token_id": 2,
        "renormalize_logits": True,
    },
}
MANNERS: dict[str, dict[str, Any]] = {
    "greedy": {"max_length": 14},
    "beams": {"max_length": 14, "num_beams": 4},
    "beams that end first": {"max_length": 14, "num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
    "beams that never end": {"max_length": 14, "num_beams": 3, "early_stopping": "never", "length_penalty": 0.6},
    "no repeats": {"max_length": 20, "num_beams": 3, "no_repeat_ngram_size": 2},
    "a penalty, greedy": {"max_length": 20, "repetition_penalty": 1.7},
    "a penalty, beams": {"max_length": 12, "repetition_penalty": 1.3, "num_beams": 3},
    "not too short": {"max_new_tokens": 9, "min_new_tokens": 6, "num_beams": 2},
    "suppressed": {"max_length": 14, "min_length": 8, "suppress_tokens": [5, 6, 7], "begin_suppress_tokens": [9, 2]},
    "many ends": {"max_length": 14, "eos_token_id": [1, 2, *range(30, 70)]},
    "many ends, beams": {"max_length": 14, "eos_token_id": [1, 2, *range(30, 44)], "num_beams": 3},
    "bad words": {"max_length": 16, "bad_words_ids": [[0], [7], [8, 9]], "num_beams": 3, "length_penalty": -0.5},
}


def prepared(folder, settings: dict[str, Any]) -> Any:
    """Their model with a generation config of its own."""
    (folder / "generation_config.json").write_text(json.dumps(settings))
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()


def sources() -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(1)
    source, mask = torch.randint(4, VOCAB, (3, 9), generator=numbers), torch.ones(3, 9, dtype=torch.bool)
    mask[1, 6:] = False
    return source.masked_fill(~mask, 0), mask


def before_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("writers")
    return {name: save(name, home / name) for name in (*MARKS, "llama2")}


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("name", MARKS)
def test_a_decoder_that_reads_an_encoder_writes_what_transformers_writes(name, manner, folders):
    theirs = prepared(folders[name], {**MARKS[name], **MANNERS[manner]})
    source, mask = sources()
    expected = theirs.generate(source, attention_mask=mask.long())
    model = read(folders[name]).model
    found = beam_search(model, source, mask, rules=model.generation)
    ends = model.generation.stop
    assert [row[0].tokens for row in found] == [before_end(row, ends) for row in expected[:, 1:].tolist()]


class Numbers(TableTokenizer):
    """Each id is a word, and none of them ends a text."""

    kind, special_tokens, vocab_size = "numbers", {}, VOCAB
    table = [f"{i} ".encode() for i in range(VOCAB)]

    def files(self):
        return {}

    from_files = classmethod(lambda cls, files: cls())

    def _encode(self, text):
        return [int(word) for word in text.split()]


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": [2, *range(30, 60)]},
        {"eos_token_id": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"eos_token_id": [2, *range(30, 60)], "min_new_tokens": 5, "suppress_tokens": [8, 9]},
        {"eos_token_id": 2, "max_length": 11, "forced_eos_token_id": 3, "begin_suppress_tokens": [*range(40)]},
        {"eos_token_id": 2, "max_new_tokens": 7, "bad_words_ids": [[5], [6, 7]]},
    ],
    ids=lambda settings: " ".join(key for key in settings if key != "eos_token_id") or "many ends",
)
def test_a_language_model_writes_what_transformers_writes(settings, folders):
    settings = {"max_length": 24, "pad_token_id": 0, **settings}
    theirs = prepared(folders["llama2"], settings)
    model = read(folders["llama2"]).model
    for prompt in ([7, 11, 13, 17, 19], [5, 21]):
        expected = theirs.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist()
        (found,) = nl.language.generate(model, Numbers(), [prompt], sampling=nl.language.Sampling(temperature=0.0))
        assert found.tokens == before_end(expected, model.generation.stop)
        assert (found.finish == "stop") == (len(found.tokens) < len(expected))


def test_a_file_that_does_not_ask_for_sampling_asks_for_the_likeliest_tokens(folders, tmp_path):
    theirs = prepared(folders["llama2"], {"eos_token_id": 2, "max_length": 12, "temperature": 0.6})
    expected = theirs.generate(torch.tensor([[7, 11, 13]]))[0, 3:].tolist()
    archive = nl.load(convert(folders["llama2"], tmp_path / "m.nemolet"))
    model = archive.model
    (found,) = model.generate(Numbers(), "7 11 13")
    assert found.tokens == before_end(expected, (2,))
    how = manner(Settings(archive="a"), model)
    assert how["sampling"].greedy and how["rules"].max_new is None  # their length counts, too
    assert manner(Settings(archive="a", top_k=5), model)["sampling"] == nl.language.Sampling(top_k=5)
    assert manner(Settings(archive="a", own_rules=False), model)["sampling"].temperature == 0.8
    bare = nl.load(write(tmp_path / "bare", model=model))  # from the rules alone
    assert bare.model.generation == model.generation


def test_a_model_that_was_made_here_samples_there_and_back(tmp_path):
    sizes = {"vocab_size": VOCAB, "layers": 1, "width": 16, "heads": 2}
    for name, rules in {"plain": None, "ends": GenerationRules(stop=(2,))}.items():
        model = nl.language.CausalLM(**sizes, generation=rules)
        assert manner(Settings(archive="a"), model)["sampling"] == nl.language.Sampling(temperature=0.8)
        again = nl.load(write(tmp_path / name, model=model)).model
        assert again.generation == model.generation and again.generation.sampling is None


def test_a_translator_of_a_converted_model_writes_its_text(folders, tmp_path):
    import safetensors.torch

    theirs_text = save_tokenizer("t5", tmp_path / "t5")
    config = transformers.T5Config(**{**MODELS["t5"][2], "vocab_size": len(theirs_text)})
    torch.manual_seed(2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tensors = safetensors.torch.load_file(tmp_path / "t5" / "model.safetensors")
    assert tensors
    theirs = prepared(tmp_path / "t5", {**MARKS["t5"], "max_length": 12, "num_beams": 3, "no_repeat_ngram_size": 2})
    texts = ["to be, or not", "the question"]
    batch = theirs_text(texts, return_tensors="pt", padding=True)
    expected = theirs_text.batch_decode(theirs.generate(**batch), skip_special_tokens=True)
    archive = nl.load(convert(tmp_path / "t5", tmp_path / "m.nemolet"))
    translator = Translator(model=archive.model).eval()
    assert translator.translate(archive.tokenizer, texts) == [text.strip() for text in expected]


def test_rules_are_kept_and_written_back(folders, tmp_path):
    settings = {
        **MARKS["marian"],
        "num_beams": 6,
        "max_length": 14,
        "early_stopping": True,
        "transformers_version": "x",
    }
    prepared(folders["marian"], settings)
    archive = nl.load(convert(folders["marian"], tmp_path / "m.nemolet"))
    rules = archive.model.generation
    assert (rules.start, rules.stop, rules.last, rules.forbidden, rules.beam.size) == (0, (2,), 2, ((0,),), 6)
    again = nl.load(nl.save(tmp_path / "again.nemolet", model=archive.model)).model.generation
    assert again == rules
    out = write(tmp_path / "same", model=archive.model, extra=archive.extra)
    assert (out / "generation_config.json").read_bytes() == (folders["marian"] / "generation_config.json").read_bytes()
    bare = write(tmp_path / "bare", model=archive.model, architecture="MarianMTModel")  # from the rules alone
    assert read(bare).model.generation == rules
    source, mask = sources()
    theirs = transformers.MarianMTModel.from_pretrained(bare, attn_implementation="eager").eval()
    found = beam_search(archive.model, source, mask, rules=rules)
    expected = theirs.generate(source, attention_mask=mask.long())[:, 1:].tolist()
    assert [row[0].tokens for row in found] == [before_end(row, rules.stop) for row in expected]


def test_what_is_not_done_is_named(folders):
    prepared(folders["llama2"], {"eos_token_id": 2, "do_sample": True, "typical_p": 0.5, "top_k": 7, "num_beams": 3})
    model = read(folders["llama2"]).model
    assert model.generation.sampling == nl.language.Sampling(top_k=7)
    with pytest.raises(GenerationError, match="typical_p=0.5, num_beams=3"):
        model.generate(Numbers(), "5 6")
    assert model.generate(Numbers(), "5 6", max_new_tokens=3, rules=GenerationRules())[0].tokens
    (folders["llama2"] / "generation_config.json").write_text('{"repetition_penalty": "much"}')
    with pytest.raises(ConversionError, match="settings of generation are impossible"):
        read(folders["llama2"])
