"""Scores of texts are those of the usual tools."""

from __future__ import annotations

import random

import pytest

from nemolet.errors import DataError
from nemolet.language import bleu, chrf, exact_match, word_f1

WORDS = ["the", "cat,", "dog.", "sat", "3.5", "on-the", "10-20", "mat!", "isn't", "&amp;", "(so)", "Straße", "1,000"]
WORDS += ["quoted/split", "U.S.", "'x'", "$5", "50%", "x"]


def texts(seed, count=30):
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 14))) for _ in range(count)]


def changed(references, seed):
    generator = random.Random(seed)
    return [" ".join(w for w in r.split() if generator.random() < 0.8) or "x" for r in references]


@pytest.mark.parametrize("seed", range(5))
def test_bleu_and_chrf_are_those_of_sacrebleu(seed):
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is the reference")
    references = texts(seed)
    hypotheses = changed(references, seed)
    expected = sacrebleu.corpus_bleu(hypotheses, [references])
    found = bleu(hypotheses, references)
    assert found.score == pytest.approx(expected.score, abs=1e-6)
    assert found.precisions == pytest.approx(expected.precisions)
    assert found.brevity == pytest.approx(expected.bp)
    assert chrf(hypotheses, references) == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references]).score)


@pytest.mark.parametrize(
    "pair", [(["a"], ["b"]), ([""], ["a b"]), (["a b"], ["a c"]), (["a b c d e"], ["a b c d f"]), (["x"], ["x"])]
)
def test_few_words_are_scored_as_there(pair):
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is the reference")
    assert bleu(*pair).score == pytest.approx(sacrebleu.corpus_bleu(pair[0], [pair[1]]).score, abs=1e-6)
    assert chrf(*pair) == pytest.approx(sacrebleu.corpus_chrf(pair[0], [pair[1]]).score, abs=1e-6)


ODD = [
    "",
    " ",
    "\n",
    "\t a",
    "a",
    "ab",
    "(hi)",
    "...",
    "!",
    "-",
    "a\u00a0b",
    "\u200b",
    "é",
    "e\u0301",
    "👍🏽",
    "日本語 の",
    "x" * 40,
]
ODD += ["&amp;", "&quot;a&quot;", "end-\nof", "<skipped>", "1,000.5", "U.S.", "\u2028", "\x00", "a  b", "İ", "ß"]


def odd_texts(generator, count):
    letters = "ab ,.()-1é\n"
    made = ["".join(generator.choices(letters, k=generator.randint(0, 12))) for _ in range(count)]
    return [generator.choice(ODD) if generator.random() < 0.4 else text for text in made]


@pytest.mark.parametrize("seed", range(60))
def test_odd_texts_with_several_references_are_scored_as_there(seed):
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is the reference")
    generator = random.Random(seed)
    lines, copies = generator.randint(1, 4), generator.randint(1, 3)
    hypotheses = odd_texts(generator, lines)
    references = [
        [text if generator.random() < 0.4 else other for text, other in zip(hypotheses, odd_texts(generator, lines))]
        for _ in range(copies)
    ]
    by_line = list(map(list, zip(*references)))
    expected = sacrebleu.corpus_bleu(hypotheses, references)
    found = bleu(hypotheses, by_line)
    assert found.score == pytest.approx(expected.score, abs=1e-6)
    assert found.precisions == pytest.approx(expected.precisions)
    assert found.brevity == pytest.approx(expected.bp)
    for options in ({}, {"word_order": 2}, {"whitespace": True}, {"beta": 1}, {"word_order": 1, "whitespace": True}):
        theirs = sacrebleu.metrics.CHRF(**options).corpus_score(hypotheses, references).score
        assert chrf(hypotheses, by_line, **options) == pytest.approx(theirs, abs=1e-9), options
    if copies == 1:
        assert chrf(hypotheses, references[0]) == chrf(hypotheses, by_line)


@pytest.mark.parametrize("references", [[], [[]], ["a", "b"]])
def test_each_text_needs_a_reference(references):
    for score in (bleu, chrf):
        with pytest.raises(DataError, match="at least one reference"):
            score(["a"], references)


def test_answers_are_compared_without_case_marks_and_articles():
    assert exact_match("The Cat.", ["a dog", "cat"]) == 1.0
    assert exact_match("cats", ["cat"]) == 0.0
    assert word_f1("the black cat", ["black dog"]) == pytest.approx(0.5)
    assert word_f1("", [""]) == 1.0
