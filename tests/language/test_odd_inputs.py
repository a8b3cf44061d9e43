"""Whatever a model of a task is asked, it answers in order or says what is wrong: nothing else is ever raised."""

from __future__ import annotations

import random

import pytest
import torch

import nemolet as nl
from nemolet.language import (
    Beam,
    CausalLM,
    EncoderDecoder,
    NgramEncoder,
    QuestionAnswerer,
    RequestTagger,
    RewardModel,
    SentenceEmbedder,
    TextClassifier,
    TextEncoder,
    TokenClassifier,
    Translator,
    explain,
    fill,
    nearest_vectors,
)
from nemolet.nn import Decoder, Encoder
from nemolet.tokenizers import ByteTokenizer, SentencePieceTokenizer

LONG = "word " * 400
ODD = [
    *(None, 0, -1, 2.5, True, float("nan"), b"bytes", [], {}, (), [None], [[]], [["a"]], ["a", None], [1]),
    *("", " ", "\n\t", "\x00", "\u200b", "\u2028", "a", "a b", "é", "e\u0301", "👍🏽", "日本語", "\u202eabc"),
    *("\ud800", "a \udfff b", "<mask>", "[MASK]", "</s>", "{{ 7 * 7 }}", "%s%n", "\\", '"', "a" * 500, LONG),
    *({"text": "a"}, object, lambda: None),
]
KEYS = ["text", "words", "question", "context", "source", "forced", "forbidden", "prompt", "response", "messages", "x"]
POLICIES = ["error", "truncate", "window"]


def models():
    def encoder():
        return TextEncoder(vocab_size=300, stack=Encoder(layers=1, width=8, heads=2, max_length=64), token_types=1)

    tags = ["O", "B-x", "I-x"]
    parts = {"encoder": Encoder(layers=1, width=8, heads=2), "decoder": Decoder(layers=1, width=8, heads=2, cross=True)}
    translator = Translator(model=EncoderDecoder(vocab_size=300, **parts), context=32)
    translator.beam = Beam(max_length=4, size=2)
    return {
        "classes": TextClassifier(encoder=encoder(), labels=["a", "b"], context=32),
        "labels": TextClassifier(encoder=encoder(), labels=["a", "b"], context=32, multi_label=True),
        "tags": TokenClassifier(encoder=encoder(), labels=tags, context=32, crf=True),
        "requests": RequestTagger(encoder=NgramEncoder(vocab_size=300, width=8, buckets=16), intents=["a"], slots=tags),
        "answers": QuestionAnswerer(encoder=encoder(), context=48),
        "vectors": SentenceEmbedder(encoder=encoder(), context=32),
        "translations": translator,
        "rewards": RewardModel(backbone=CausalLM(vocab_size=300, layers=1, width=8, heads=2, context=64)),
    }


@pytest.fixture(scope="module")
def tokenizers():
    text = ["a word of a text, and others: 1 2 3 é 👍"] * 20
    return [ByteTokenizer(), SentencePieceTokenizer.train(text, vocab_size=290, special_tokens=["<mask>"])]


def record(generator):
    if generator.random() < 0.1:
        return generator.choice(ODD)
    made = {key: generator.choice(ODD) for key in generator.sample(KEYS, generator.randint(0, 5))}
    if generator.random() < 0.3:
        made["words"] = [generator.choice(ODD) for _ in range(generator.randint(0, 4))]
    if generator.random() < 0.2:
        made["messages"] = [
            {"role": generator.choice(["user", "assistant", None, 1]), "content": generator.choice(ODD)}
        ]
    return made


def answered(call, *arguments, **options):
    """The answer, or None where it was refused as it should be."""
    try:
        return call(*arguments, **options)
    except nl.NemoletError as error:
        assert str(error)
        return None


@pytest.mark.parametrize("name", list(models()))
def test_records_of_any_kind_are_answered_or_refused(name, tokenizers):
    torch.manual_seed(0)
    model = models()[name].eval()
    generator = random.Random(name)
    fits = 0
    for number in range(150):
        if hasattr(model, "too_long"):
            model.too_long = POLICIES[number % 3]
        records = [record(generator) for _ in range(generator.randint(0, 3))]
        found = answered(model.predict, generator.choice(tokenizers), records)
        if found is not None:
            assert len(found) == len(records)
            assert all(isinstance(each, dict) for each in found)
            fits += bool(records)
    for odd in ODD:  # alone, and in the place of the list
        for keys in model.READS:
            found = answered(model.predict, tokenizers[0], [dict.fromkeys(keys, odd)])
            fits += found is not None
        answered(model.predict, tokenizers[0], odd)
    assert fits >= (name != "rewards")


@pytest.mark.parametrize("method", ["classify", "tag", "answer", "embed", "translate"])
def test_methods_refuse_what_is_no_list_of_texts(method, tokenizers):
    torch.manual_seed(0)
    model = next(model for model in models().values() if hasattr(model, method)).eval()
    for odd in ODD:
        answered(getattr(model, method), tokenizers[1], odd)
        answered(getattr(model, method), tokenizers[1], [odd])
        answered(getattr(model, method), tokenizers[1], [("a", odd)])
    with pytest.raises(nl.NemoletError, match="this is no list"):
        getattr(model, method)(tokenizers[0], "a text")
    nothing = getattr(model, method)(tokenizers[0], [])
    assert len(nothing) == 0


def test_search_answers_or_refuses(tokenizers):
    torch.manual_seed(0)
    model = models()["vectors"].eval()
    assert model.embed(tokenizers[0], []).shape == (0, 8)
    assert model.search(tokenizers[0], ["a"], []) == [[]]
    assert model.search(tokenizers[0], [], ["a"]) == []
    assert len(model.search(tokenizers[0], ["a"], ["b", "c"], top=9)[0]) == 2
    for top in (0, -1):
        with pytest.raises(nl.NemoletError, match="nothing is to be found"):
            model.search(tokenizers[0], ["a"], ["b"], top=top)
    for odd in ODD:
        answered(model.search, tokenizers[1], [odd], ["a"])
        answered(model.search, tokenizers[1], ["a"], [odd])
    for queries, vectors in ((torch.zeros(1, 3), torch.zeros(2, 4)), (torch.zeros(3), torch.zeros(2, 3))):
        with pytest.raises(nl.NemoletError, match="these vectors cannot be compared"):
            nearest_vectors(queries, vectors)
    with pytest.raises(nl.NemoletError, match="1 of them not finite"):
        nearest_vectors(torch.eye(2), torch.tensor([[0.0, float("nan")]]))


def test_holes_and_explanations_answer_or_refuse(tokenizers):
    torch.manual_seed(0)
    classifier = models()["classes"].eval()
    stack = Encoder(layers=1, width=8, heads=2, max_length=32)
    masked = nl.language.MaskedLM(encoder=TextEncoder(vocab_size=300, stack=stack)).eval()
    for odd in ODD:
        for policy in POLICIES:
            answered(fill, masked, tokenizers[1], [odd], hole="<mask>", too_long=policy)
            answered(fill, masked, tokenizers[1], [f"{odd} <mask>"], hole="<mask>", too_long=policy)
        answered(explain, classifier, tokenizers[0], odd, steps=1)
