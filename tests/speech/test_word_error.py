"""Word and character errors against jiwer, and the alignment behind them."""

from __future__ import annotations

import random

import pytest

from nemolet.errors import DataError
from nemolet.speech.word_error import (
    ErrorRate,
    align,
    character_error_rate,
    word_error_rate,
    word_errors,
    worst_utterances,
)


def sentences(seed, count=60):
    chance = random.Random(seed)
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "oh"]
    said = [[chance.choice(words) for _ in range(chance.randint(1, 12))] for _ in range(count)]
    heard = []
    for sentence in said:
        new = []
        for word in sentence:
            roll = chance.random()
            new += [] if roll < 0.1 else [chance.choice(words)] if roll < 0.25 else [word]
            new += [chance.choice(words)] if chance.random() < 0.1 else []
        heard.append(new)
    return [" ".join(s) for s in said], [" ".join(h) for h in heard]


@pytest.mark.parametrize("seed", range(5))
def test_rates_are_those_of_jiwer(seed):
    jiwer = pytest.importorskip("jiwer")
    said, heard = sentences(seed)
    rate = word_error_rate(said, heard)
    assert rate.rate == pytest.approx(jiwer.wer(said, heard), abs=1e-12)
    assert character_error_rate(said, heard).rate == pytest.approx(jiwer.cer(said, heard), abs=1e-12)
    theirs = jiwer.process_words(said, heard)
    assert rate.errors == theirs.substitutions + theirs.deletions + theirs.insertions
    assert rate.deletions - rate.insertions == theirs.deletions - theirs.insertions


@pytest.mark.parametrize("seed", range(3))
def test_an_alignment_spells_both_sides(seed):
    for said, heard in zip(*sentences(seed)):
        edits = align(said.split(), heard.split())
        assert [e.reference for e in edits if e.reference is not None] == said.split()
        assert [e.hypothesis for e in edits if e.hypothesis is not None] == heard.split()
        for kind, before, after in edits:
            expected = "insertion" if before is None else "deletion" if after is None else None
            assert kind == (expected or ("hit" if before == after else "substitution"))


@pytest.mark.parametrize(
    "said, heard, rate",
    [("", "", 0.0), ("", "a", float("inf")), ("a b", "", 1.0), ("a", "b c d", 3.0), ("a  b", " a b ", 0.0)],
)
def test_nothing_said_and_nothing_heard(said, heard, rate):
    assert word_errors(said, heard).rate == rate


def test_rates_add_up():
    assert ErrorRate(1, 2, 3, 10) + ErrorRate(1, 0, 0, 4) == ErrorRate(2, 2, 3, 14)
    assert word_error_rate([], []) == ErrorRate()


def test_the_worst_come_first():
    table = worst_utterances(["a b", "c d", "e"], ["a b", "c", "x y"], count=5).splitlines()
    assert [line.split()[0] for line in table[::3]] == ["2", "1"]
    assert table[1].split()[1:] == ["*", "E"] or table[1].split()[1:] == ["E", "*"]
    assert worst_utterances(["a"], ["a"]) == "no utterance has a word error"


def test_pairs_have_to_be_pairs():
    with pytest.raises(DataError, match="not as many"):
        word_error_rate(["a"], [])
