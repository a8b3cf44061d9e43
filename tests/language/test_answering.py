"""Answers are those of transformers: windows, probabilities, the best of all, and none."""

from __future__ import annotations

import functools
import json
import os
import random

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

import nemolet as nl  # noqa: E402 - after the skip
from nemolet.data import Questions  # noqa: E402
from nemolet.data.encoding import TextEncoding  # noqa: E402
from nemolet.data.labelled import windows  # noqa: E402
from nemolet.language import QuestionAnswerer  # noqa: E402
from nemolet.nn import Encoder  # noqa: E402
from nemolet.tokenizers import ByteTokenizer  # noqa: E402

WORDS = [f"{a}{b}" for a in "bdgklmnprt" for b in ("a", "e", "i", "o", "an", "en")]
PIECES = [f"##{w}" for w in WORDS[:20]]
CONTEXT, MOST = 40, 6
QUESTION = "ba de gi?"
KINDS = {
    "bert": ("Bert", {"type_vocab_size": 2}),
    "roberta": ("Roberta", {"type_vocab_size": 1, "pad_token_id": 0}),
    "distilbert": ("DistilBert", {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}),
    "electra": ("Electra", {"type_vocab_size": 2, "embedding_size": 16}),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", ".", *WORDS, *PIECES]
    inner = transformers.BertTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=False)
    inner.model_max_length = CONTEXT
    inner.save_pretrained(folder)
    return inner, folder


@pytest.fixture(scope="module")
def pair(tokenizer, tmp_path_factory):
    """A model of transformers and ours with the same weights."""
    inner, words = tokenizer

    @functools.cache
    def make(kind):
        name, options = KINDS[kind]
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        own = {} if "dim" in options else sizes
        config = getattr(transformers, f"{name}Config")(
            vocab_size=len(inner), max_position_embeddings=64, initializer_range=0.6, **own, **options
        )
        torch.manual_seed(3)
        theirs = getattr(transformers, f"{name}ForQuestionAnswering")(config).eval()
        folder = tmp_path_factory.mktemp(kind)
        body = getattr(transformers, f"{name}Model")(config)  # with the pooler that some have
        theirs.base_model.load_state_dict({k: v for k, v in body.state_dict().items() if "pooler" not in k})
        body.save_pretrained(folder)
        for file in words.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        archive = nl.load(folder)
        ours = QuestionAnswerer(encoder=archive.model, context=CONTEXT, max_tokens=MOST, dropout=0.0).eval()
        ours.head.load_state_dict(theirs.qa_outputs.state_dict())
        return theirs, ours, archive.tokenizer

    return make


def text_of(seed, words, pieces=False):
    generator = random.Random(seed)
    made = [generator.choice(WORDS) for _ in range(words)]
    return " ".join(w + (PIECES[i % 20][2:] if pieces and i % 3 == 0 else "") for i, w in enumerate(made)) + "."


def reference(theirs, inner, question, text, *, top, stride, impossible):
    """What the pipeline of transformers 4 does: each window shares its probability out, and the same words add up."""
    batch = inner(
        question,
        text,
        truncation="only_second",
        max_length=CONTEXT,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    found, nothing = {}, 1.0
    for row, ids in enumerate(batch["input_ids"]):
        inputs = {"input_ids": torch.tensor([ids])}
        if "token_type_ids" in inner.model_input_names and getattr(theirs.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = torch.tensor([batch["token_type_ids"][row]])
        with torch.no_grad():
            result = theirs(**inputs)
        may_be = np.array([s == 1 for s in batch.sequence_ids(row)])
        may_be[0] = True
        first, last = (
            np.where(may_be, np.exp(x - x[may_be].max()), 0)
            for x in (result.start_logits[0].numpy().astype(float), result.end_logits[0].numpy().astype(float))
        )
        first, last = first / first.sum(), last / last.sum()
        nothing = min(nothing, first[0] * last[0])
        spans = [
            (first[i] * last[j], i, j)
            for i in range(1, len(ids))
            for j in range(i, min(len(ids), i + MOST))
            if may_be[i] and may_be[j]
        ]
        for score, i, j in sorted(spans, reverse=True)[: 2 * top + 10]:
            begin = batch.word_to_chars(row, batch.token_to_word(row, i), 1).start
            end = batch.word_to_chars(row, batch.token_to_word(row, j), 1).end
            said = text[begin:end]
            known = found.setdefault(said.lower(), [0.0, said, begin])
            known[0] += score
    rows = [*found.values(), *([[nothing, "", 0]] if impossible else [])]
    return sorted(rows, key=lambda row: -row[0])[:top]


def same(found, expected):
    assert [(a.text, a.start) for a in found] == [(text, start) for _, text, start in expected]
    assert [a.score for a in found] == pytest.approx([score for score, _, _ in expected], rel=1e-4)


@pytest.mark.parametrize("impossible", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words, pieces", [(150, False), (12, True)])
def test_the_best_of_all_windows_are_those_of_transformers(pair, tokenizer, kind, words, pieces, impossible):
    theirs, ours, own = pair(kind)
    ours.unanswerable = impossible
    room = CONTEXT - len(tokenizer[0](QUESTION)["input_ids"]) - 1
    for seed in range(3):
        text = text_of(seed, words, pieces)
        options = {"top": 5, "stride": room - room // 2, "impossible": impossible}
        expected = reference(theirs, tokenizer[0], QUESTION, text, **options)
        made = windows(QUESTION, text, TextEncoding(own, CONTEXT), "here")
        assert (len(made) > 4) == (words > 100)
        same(ours.answers(own, [(QUESTION, text)], top=5)[0], expected)


def test_a_window_without_the_answer_is_learned_as_such(tmp_path):
    text = " ".join(f"w{i}" for i in range(40))
    asked = {"id": "a", "question": "who?", "answers": [{"text": "w3", "answer_start": text.index("w3")}]}
    never = {"id": "b", "question": "why?", "answers": [], "is_impossible": True}
    (tmp_path / "q.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": text, "qas": [asked, never]}]}]}))
    source = Questions(path=str(tmp_path / "q.json"), context=40)
    made = [list(source.encode(r, TextEncoding(ByteTokenizer(), 40), {})) for r in source.read(source.path)]
    assert all(len(samples) > 4 for samples in made)
    assert sum(s["starts"] > 0 for s in made[0]) >= 1
    assert {s["starts"] for s in made[0]} > {0}
    assert {(s["starts"], s["ends"]) for s in made[1]} == {(0, 0)}


def test_a_question_without_an_answer_is_scored_as_in_squad_2():
    encoder = nl.language.TextEncoder(vocab_size=257, stack=Encoder(layers=1, width=8, heads=2), token_types=1)
    model = QuestionAnswerer(encoder=encoder, context=32, unanswerable=True)
    model.head.bias.data.fill_(0.0)
    model.head.weight.data.zero_()
    record = {"question": "Who?", "context": "Anna " * 20, "answers": []}
    said = model.answers(ByteTokenizer(), [("Who?", record["context"])], top=50)[0]
    assert "" in [answer.text for answer in said]
    model.unanswerable = False
    assert "" not in [
        answer.text for answer in model.answers(ByteTokenizer(), [("Who?", record["context"])], top=50)[0]
    ]
    assert model.score_texts(ByteTokenizer(), [record]) == {"exact_match": 0.0, "word_f1": 0.0}
