"""Words and phones as ids: what is written, what is unknown, and what an archive keeps."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from nemolet.data import TokenizerSpec
from nemolet.errors import ConfigError, TokenizerError
from nemolet.tokenizers import PhoneTokenizer, WordTokenizer, describe, load_tokenizer, rebuild, save_tokenizer

DICTIONARY = """;;; a comment
one W AH1 N
one(2) HH W AH1 N
two T UW1 # a number
read R EH1 D
read(2) R IY1 D
"""
CMU = Path(__file__).parents[2].parent / "shared" / "data" / "cmudict" / "cmudict_train.dict.gz"


@pytest.fixture
def dictionary(tmp_path):
    path = tmp_path / "small.dict"
    path.write_text(DICTIONARY)
    return path


def test_words_come_back():
    tokenizer = TokenizerSpec(kind="word").make_of_texts(["two one", "three  one"])
    assert tokenizer.words == ["one", "three", "two"]
    ids = tokenizer.encode(" one two\tthree one ")
    assert ids == [0, 2, 1, 0] and tokenizer.decode(ids) == "one two three one"
    stream = tokenizer.stream()
    assert "".join([stream.push(i) for i in ids * 9] + [stream.flush()]) == " ".join(["one two three one"] * 9)


def test_an_unknown_word_is_named():
    with pytest.raises(TokenizerError, match=r"word 1: .*\n.*\n.*'tow'\n.*did you mean 'two'"):
        WordTokenizer(["one", "two"]).encode("one tow")
    for wrong in ([], ["a b"], ["a", "a"], [""]):
        with pytest.raises(TokenizerError):
            WordTokenizer(wrong)
    with pytest.raises(TokenizerError, match="no text"):
        WordTokenizer.train([" "])


def test_the_first_pronunciation_counts(dictionary):
    tokenizer = TokenizerSpec(kind="phone", path=str(dictionary)).make_of_texts([])
    assert tokenizer.phones == ["AH", "D", "EH", "N", "R", "T", "UW", "W"]
    assert tokenizer.decode(tokenizer.encode("read ONE two")) == "R EH D W AH N T UW"
    stressed = PhoneTokenizer.read(dictionary, stress=True)
    assert stressed.decode(stressed.encode("one")) == "W AH1 N"


def test_an_unknown_word_is_an_error_or_noise(dictionary):
    with pytest.raises(TokenizerError, match="word 1: nobody knows how this word sounds"):
        PhoneTokenizer.read(dictionary).encode("one banana")
    noisy = PhoneTokenizer.read(dictionary, unknown="noise")
    assert noisy.decode(noisy.encode("one banana two")) == "W AH N SPN T UW"
    assert noisy.vocab_size == PhoneTokenizer.read(dictionary).vocab_size + 1


def test_bad_dictionaries_are_named(tmp_path, dictionary):
    with pytest.raises(TokenizerError, match=r"nowhere.*no pronouncing dictionary"):
        PhoneTokenizer.read(tmp_path / "nowhere")
    bad = tmp_path / "bad.dict"
    bad.write_text("one W AH1 N\ntwo\n")
    with pytest.raises(TokenizerError, match=r"bad\.dict, line 2"):
        PhoneTokenizer.read(bad)
    bad.write_bytes(gzip.compress(DICTIONARY.encode())[:-9])
    with pytest.raises(TokenizerError, match="no pronouncing dictionary"):
        PhoneTokenizer.read(bad)
    with pytest.raises(TokenizerError, match="pronounces nothing"):
        PhoneTokenizer({})
    for wrong in ({"kind": "phone"}, {"kind": "char", "stress": True}, {"kind": "word", "unknown": "noise"}):
        with pytest.raises(ConfigError):
            TokenizerSpec(**wrong)


@pytest.mark.parametrize("packed", [False, True])
def test_they_travel(tmp_path, packed):
    path = tmp_path / "d"
    path.write_bytes(gzip.compress(DICTIONARY.encode()) if packed else DICTIONARY.encode())
    for tokenizer in (WordTokenizer(["one", "two"]), PhoneTokenizer.read(path, stress=True, unknown="noise")):
        save_tokenizer(tokenizer, tmp_path / tokenizer.kind)
        for other in (load_tokenizer(tmp_path / tokenizer.kind), rebuild(describe(tokenizer), tokenizer.files())):
            assert other.encode("two one") == tokenizer.encode("two one")
            assert other.fingerprint == tokenizer.fingerprint and other.vocab_size == tokenizer.vocab_size


def test_the_whole_cmu_dictionary():
    if not CMU.is_file():
        pytest.skip(f"{CMU} is not here")
    tokenizer = PhoneTokenizer.read(CMU)
    assert tokenizer.vocab_size == 39  # the phones of the CMU's alphabet, without stress
    assert tokenizer.decode(tokenizer.encode("seven eight")) == "S EH V AH N EY T"
    assert PhoneTokenizer.read(CMU, stress=True).vocab_size == 69  # 24 consonants and 15 vowels of three stresses
