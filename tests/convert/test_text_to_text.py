"""Encoder-decoders of transformers in use: what they write, what they learn from, and the way back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import nemolet as nl
from nemolet.cli import main
from nemolet.data import ParallelTexts
from nemolet.data.encoding import TextEncoding
from nemolet.data.records import Record
from nemolet.language.attention_maps import attention_maps
from nemolet.language.beam import Beam
from nemolet.language.translation import in_use

from .tiny_models import BART, T5

TEXTS = ["A dog runs.", "Why?", "It is a rather long sentence."]
MARKS = {"bart": ["<s>", "<pad>", "</s>"], "marian": ["</s>", "<pad>"], "t5": ["<pad>", "</s>"]}


def saved(kind, folder):
    """A folder with a tokenizer of bytes, whose special tokens lie where those of the real models do."""
    marks = MARKS[kind]
    vocabulary = {token: i for i, token in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = "<s> $A </s>" if "<s>" in marks else "$A </s>"
    special = [(token, vocabulary[token]) for token in marks]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    names = {"pad_token": "<pad>", "eos_token": "</s>", **({"bos_token": "<s>"} if "<s>" in marks else {})}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    end, pad = vocabulary["</s>"], vocabulary["<pad>"]
    sizes = {**(T5 if kind == "t5" else BART), "vocab_size": len(vocabulary), "pad_token_id": pad, "eos_token_id": end}
    sizes |= {"decoder_start_token_id": end if kind == "bart" else pad, "bos_token_id": 0}
    torch.manual_seed(1)
    name, config = {
        "bart": ("BartForConditionalGeneration", "BartConfig"),
        "marian": ("MarianMTModel", "MarianConfig"),
        "t5": ("T5ForConditionalGeneration", "T5Config"),
    }[kind]
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    for part, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in part and "shared" not in part:
            torch.nn.init.normal_(weight, std=0.5)  # large ones, so that texts differ
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(params=MARKS)
def folder(request, tmp_path):
    path = tmp_path / request.param
    return path, *saved(request.param, path)


def test_a_folder_writes_what_transformers_writes(folder, tmp_path, capsys):
    path, theirs, tokenizer = folder
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    out = tmp_path / "out.jsonl"
    assert main(["predict", str(path), str(tmp_path / "in.txt"), str(out), "beam=1", "max_length=12"]) == 0
    capsys.readouterr()
    ours = [json.loads(line)["translation"] for line in out.read_text().splitlines()]
    expected = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        row = theirs.generate(**ids, max_new_tokens=12, num_beams=1, do_sample=False)[0]
        expected.append(tokenizer.decode(row, skip_special_tokens=True).strip())
    assert ours == expected


def test_a_folder_learns_from_what_transformers_learns_from(folder):
    path, theirs, tokenizer = folder
    archive = nl.load(path)
    source = ParallelTexts(path="x").with_names(archive.model)
    record = Record("x:1", {"source": "Why?", "target": "Because."})
    sample = next(iter(source.encode(record, TextEncoding(archive.tokenizer), {})))
    labels = tokenizer("Because.", return_tensors="pt").input_ids
    assert torch.as_tensor(sample["labels"]).tolist() == labels[0].tolist()
    with torch.no_grad():
        expected = theirs(input_ids=tokenizer("Why?", return_tensors="pt").input_ids, labels=labels).loss
        batch = {name: torch.tensor([sample[name]]) for name in ("source", "tokens")}
        logits = archive.model(**batch)
    loss = torch.nn.functional.cross_entropy(logits[0], torch.tensor(sample["labels"]))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_maps_of_attention_begin_as_the_model_does(folder):
    archive = nl.load(folder[0])
    found = attention_maps(archive.model, archive.tokenizer, "Why?", written="So.")[-1]
    assert found.queries[0] == archive.tokenizer.decode([folder[1].config.decoder_start_token_id], special=True)


def test_a_wider_beam_finds_what_is_no_less_probable(folder):
    archive = nl.load(folder[0])
    translator = in_use(archive.model)
    ids = TextEncoding(archive.tokenizer).text(TEXTS[0], "x")

    def found(size):
        beam = Beam(size=size, length_penalty=0.0, max_length=5)
        rules = replace(archive.model.generation, start=translator.start, stop=(archive.tokenizer.eos_id,))
        return nl.language.beam_search(
            archive.model,
            torch.tensor([ids]),
            torch.ones(1, len(ids), dtype=torch.bool),
            rules=rules,
            beam=beam,
        )[0][0].worth

    assert found(8) >= found(1) - 1e-4


@pytest.mark.parametrize("addition", [[], ["adapter=lora"]], ids=["whole", "lora"])
def test_trained_on_pairs_it_is_written_back(addition, tmp_path, capsys):
    saved("marian", tmp_path / "hf")
    rows = [{"source": text, "target": text.upper()} for text in TEXTS * 4]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=parallel", f"data.path={tmp_path / 'pairs.jsonl'}"]
    learned = [*data, *addition]
    short = ["trainer.max_steps=2", "trainer.valid_every=2", "schedule.warmup_steps=1", "trainer.progress=false"]
    run = tmp_path / "run"
    assert main(["finetune", str(tmp_path / "hf"), *learned, *short, "trainer.loggers=[]", f"folder={run}"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), *data, "beam=1"]) == 0
    assert "bleu" in capsys.readouterr().out
    assert main(["convert", str(run / "model.nemolet"), str(tmp_path / "back")]) == 0
    model = transformers.MarianMTModel.from_pretrained(tmp_path / "back").eval()
    assert model.config.decoder_start_token_id == 1
    ours = nl.load(run).model
    source, tokens = torch.tensor([[5, 6, 7]]), torch.tensor([[1, 9]])
    with torch.no_grad():
        torch.testing.assert_close(
            ours(source=source, tokens=tokens), model(input_ids=source, decoder_input_ids=tokens).logits
        )


def test_what_does_not_search_takes_no_beam(tmp_path, capsys):
    labels = {"encoder": nl.language.NgramEncoder(vocab_size=257, width=8, buckets=16), "labels": ["a", "b"]}
    tokenizer = nl.tokenizers.ByteTokenizer()
    nl.save(tmp_path / "m.nemolet", model=nl.language.TextClassifier(**labels), tokenizer=tokenizer)
    (tmp_path / "in.txt").write_text("a\n")
    command = ["predict", str(tmp_path / "m.nemolet"), str(tmp_path / "in.txt"), str(tmp_path / "o.jsonl"), "beam=4"]
    assert main(command) == 2
    assert "this model does not search" in capsys.readouterr().err
