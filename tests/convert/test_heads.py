"""Encoders of transformers with the head of a task: read, used, derived and written."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import nemolet as nl
from nemolet.cli import main
from nemolet.convert import read, write
from nemolet.data.encoding import TextEncoding
from nemolet.data.labelled import windows
from nemolet.errors import ConversionError
from nemolet.tokenizers import ByteTokenizer

from .test_round_trips import assert_equal_tensors, tensors
from .tiny_models import HEADS, VOCAB, save_head


@pytest.fixture(params=HEADS)
def head(request, tmp_path):
    """Theirs, its folder, and the archive that reading it gave."""
    folder = save_head(request.param, tmp_path / "hf")
    theirs = getattr(transformers, request.param).from_pretrained(folder, attn_implementation="eager").eval()
    return theirs, folder, read(folder)


@torch.no_grad()
def test_a_head_gives_the_same_numbers(head):
    theirs, _, archive = head
    tokens = torch.randint(4, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    call = {"input_ids": tokens, "attention_mask": mask.long()}
    if isinstance(archive.model, nl.language.QuestionAnswerer):
        readable = mask & (torch.arange(20) >= 7)
        if theirs.config.to_dict().get("type_vocab_size", 0) > 1:
            call["token_type_ids"] = (torch.arange(20) >= 7).long().expand(2, -1)
        ours, found = archive.model(tokens, readable, mask), theirs(**call)
        for one, other in ((ours.first, found.start_logits), (ours.last, found.end_logits)):
            torch.testing.assert_close(one[readable], other[readable], atol=1e-5, rtol=0)
    elif isinstance(archive.model, nl.language.TokenClassifier):
        words = torch.arange(20).expand(2, -1)
        found = theirs(**call).logits
        torch.testing.assert_close(archive.model(tokens, words, mask).logits[mask], found[mask], atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(archive.model(tokens, mask), theirs(**call).logits, atol=1e-5, rtol=0)
    if hasattr(archive.model, "labels"):
        assert archive.model.labels == tuple(theirs.config.id2label[i] for i in range(3))


def test_there_and_back_is_equal(head, tmp_path):
    theirs, folder, archive = head
    out = write(tmp_path / "out", model=archive.model, extra=archive.extra)
    assert_equal_tensors(tensors(folder), tensors(out))
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    derived = write(tmp_path / "derived", model=archive.model, architecture=type(theirs).__name__)
    assert_equal_tensors(tensors(folder), tensors(derived))
    config = type(theirs).from_pretrained(derived).config
    assert config.id2label == theirs.config.id2label


def test_any_number_of_labels(tmp_path):
    folder = save_head("BertForSequenceClassification", tmp_path / "hf", problem_type="multi_label_classification")
    assert read(folder).model.multi_label
    config = json.loads((write(tmp_path / "out", model=read(folder).model) / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize("change", [{"problem_type": "regression"}, {"id2label": {0: "score"}}])
def test_a_number_is_no_class(tmp_path, change):
    folder = save_head("BertForSequenceClassification", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"no classes|regression"):
        read(folder)


def test_a_classifier_trained_here_is_written_for_transformers(tmp_path, capsys, monkeypatch):
    """With the layer that BERT has before its classes; texts may be shorter than the encoder could read."""
    monkeypatch.chdir(tmp_path)
    encoder = nl.language.TextEncoder(
        vocab_size=257,
        token_types=2,
        pooler=True,  # which no head reads
        stack=nl.nn.Encoder(
            layers=1,
            width=16,
            heads=2,
            norm="layer",
            gated=False,
            position="learned",
            bias=True,
            norm_eps=1e-12,
            residual=nl.nn.ResidualOptions(order="post", input_norm=True),
        ),
    )
    nl.save("encoder.nemolet", model=encoder, tokenizer=ByteTokenizer())
    rows = [{"text": w, "label": w[0]} for w in ("aa", "ab", "ba", "bb") * 6]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ["schedule.warmup_steps=1", "trainer.max_steps=2", "trainer.valid_every=2", "trainer.loggers=[]"]
    task = ["task=classify", "model.pooling=first", "model.transform=tanh", "data=labelled", "data.path=t.jsonl"]
    assert main(["finetune", "encoder.nemolet", *task, *short, "model.context=32", "data.context=32"]) == 0
    command = ["convert", "runs/finetune/model.nemolet", "folder", "architecture=BertForSequenceClassification"]
    assert main([*command, "with_tokenizer=false"]) == 0
    theirs = transformers.BertForSequenceClassification.from_pretrained("folder", attn_implementation="eager").eval()
    ours, tokens = nl.load("runs/finetune").model, torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)
    assert theirs.config.id2label == {0: "a", 1: "b"}


@pytest.mark.parametrize("name", [name for name in HEADS if "ForSequence" in name and "Modern" not in name])
def test_a_classifier_that_does_not_fit_is_told_how_it_would(name, tmp_path):
    model = read(save_head(name, tmp_path / "hf")).model
    plain = nl.language.TextClassifier(encoder=model.encoder, labels=["a", "b"])
    with pytest.raises(ConversionError) as refused:
        write(tmp_path / "out", model=plain)
    assert refused.value.found.startswith(name)
    assert f" for {name}, keep it" in refused.value.fix
    said = dict(each.split("=") for each in refused.value.fix.split(" for ")[0].split()[3:])
    values = {key.removeprefix("model."): {"True": True}.get(value, value) for key, value in said.items()}
    fitting = nl.language.TextClassifier(encoder=model.encoder, labels=["a", "b"], **values)
    assert json.loads((write(tmp_path / "out", model=fitting) / "config.json").read_text())["architectures"] == [name]


@pytest.mark.parametrize("pair", ["<s> $A </s> $B:1 </s>:1", "<s> $A </s> </s> $B </s>", None])
def test_a_question_and_a_text_stand_together_as_the_tokenizer_puts_them(tmp_path, pair):
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair=pair, special_tokens=special)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    theirs.save_pretrained(tmp_path)
    ours = nl.tokenizers.load_tokenizer(tmp_path)
    asked, text = "Who is it?", "It is she, not he."
    found = windows(asked, text, TextEncoding(ours, 64), "x")[0].tokens
    single = [*theirs(asked).input_ids, *theirs(text).input_ids[1:]]
    assert found == (theirs(asked, text).input_ids if pair else single)
