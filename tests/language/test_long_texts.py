"""Texts beyond the context, words without tokens: each policy does what it says, and labels stay with their words."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

import nemolet as nl
from nemolet.data.encoding import TextEncoding
from nemolet.data.labelled import _tagged
from nemolet.data.records import Record
from nemolet.errors import ConfigError, DataError, GenerationError
from nemolet.language import (
    Beam,
    EncoderDecoder,
    RequestTagger,
    SentenceEmbedder,
    TextClassifier,
    TokenClassifier,
    Translator,
    fill,
)
from nemolet.nn import Decoder, Encoder
from nemolet.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from nemolet.types import HiddenBTD, MaskBT, TokenIdsBT

tokenizers = pytest.importorskip("tokenizers", reason="a tokenizer that drops control characters")
WORDS = [f"w{i}" for i in range(40)]


class Own(nl.NeuralModule):
    """An encoder whose hidden states are the tokens themselves, and what stands beside them."""

    def __init__(self, size):
        super().__init__(V=size, D=size)
        self.weight = torch.nn.Parameter(torch.eye(size))

    def forward(self, tokens: TokenIdsBT, mask: MaskBT | None = None) -> HiddenBTD:
        return F.one_hot(tokens, len(self.weight)).float() @ self.weight


def words_tokenizer():
    """[CLS] and [SEP] around words; control characters and zero-width ones have no token, as in BERT."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##x"]
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    inner.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    inner.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return HuggingFaceTokenizer(inner.to_str().encode(), bos="[CLS]", eos="[SEP]")


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer()


def tagger(size, context=12, crf=False, labels=("O", *(f"B-{w}" for w in WORDS))):
    """It tags each word with its own name."""
    model = TokenClassifier(encoder=Own(size), labels=labels, context=context, crf=crf, dropout=0.0)
    model.head.head.bias.data.zero_()
    model.head.head.weight.data.zero_()
    for index, _ in enumerate(WORDS):
        model.head.head.weight.data[index + 1, index + 5] = 9.0
    return model


NOTHING = ["", " ", "\u200b", "\x00", "\x07", "\u00ad", "\ufeff"]


@pytest.mark.parametrize("crf", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_each_word_keeps_its_own_tag(tokenizer, seed, crf):
    generator = random.Random(seed)
    model = tagger(tokenizer.vocab_size, crf=crf)
    model.too_long = "window"
    sentences = []
    for _ in range(8):
        words = [
            generator.choice(WORDS if generator.random() < 0.7 else NOTHING) for _ in range(generator.randint(1, 60))
        ]
        sentences.append([*words, generator.choice(WORDS)] if seed % 2 else [generator.choice(WORDS), *words])
    tagged = model.tag(tokenizer, sentences)
    for words, each in zip(sentences, tagged):
        assert list(each.words) == words
        assert list(each.tags) == [f"B-{word}" if word in WORDS else "O" for word in words]


def test_labels_are_learned_with_their_words(tokenizer):
    words = ["w1", "\u200b", "", "w2w2w2", "w3", "\x00"]
    tags = ["B-w1", "I-w1", "B-w2", "B-w2", "B-w3", "O"]
    labels = sorted(set(tags))
    record = Record("here", {"words": words, "tags": tags})
    (sample,) = _tagged(record, TextEncoding(tokenizer, 32), labels)
    assert [labels[n] for n in sample["labels"]] == ["B-w1", "B-w2", "B-w3"]
    assert [sample["tokens"][at] for at in sample["words"]][::2] == [
        tokenizer.encode("w1")[0],
        tokenizer.encode("w3")[0],
    ]


def test_a_sentence_without_any_token_is_empty(tokenizer):
    for words in (NOTHING, ["\u200b"], [""]):
        with pytest.raises(DataError, match="sentence 1: the text is empty"):
            tagger(tokenizer.vocab_size).tag(tokenizer, [["w1"], words])
    with pytest.raises(DataError, match="text 0: the text is empty"):
        SentenceEmbedder(encoder=Own(tokenizer.vocab_size)).embed(tokenizer, ["\u200b\x00"])


def test_a_word_that_is_longer_than_the_context_is_read_as_far_as_it_goes():
    model = TokenClassifier(encoder=Own(257), labels=["O", "B-x"], context=8)
    model.head.head.bias.data = torch.tensor([0.0, 99.0])  # all that is read is B-x
    with pytest.raises(DataError, match="longer than the context"):
        model.tag(ByteTokenizer(), [["a" * 50, "b"]])
    model.too_long = "truncate"
    assert model.tag(ByteTokenizer(), [["a" * 50, "b"]])[0].tags == ("B-x", "O")
    model.too_long = "window"
    assert model.tag(ByteTokenizer(), [["a" * 50, "b", "c" * 50, "d"]])[0].tags == ("B-x",) * 4


def models(size):
    labels = [f"B-{w}" for w in WORDS]
    parts = {"encoder": Encoder(layers=1, width=8, heads=2), "decoder": Decoder(layers=1, width=8, heads=2, cross=True)}
    torch.manual_seed(0)
    made = {
        "classes": TextClassifier(encoder=Own(size), labels=["a", "b"], context=8),
        "tags": tagger(size, context=8),
        "requests": RequestTagger(encoder=Own(size), intents=["go", "stop"], slots=["O", *labels], context=8),
        "vectors": SentenceEmbedder(encoder=Own(size), context=8),
        "translations": Translator(model=EncoderDecoder(vocab_size=size, **parts), context=8),
    }
    made["translations"].beam = Beam(max_length=6)
    return {name: model.eval() for name, model in made.items()}


@pytest.mark.parametrize("name", ["classes", "tags", "requests", "vectors", "translations"])
def test_a_text_beyond_the_context_is_refused_cut_or_read_in_windows(tokenizer, name):
    model = models(tokenizer.vocab_size)[name]
    text = " ".join(WORDS[:15])
    assert model.too_long == "error"
    with pytest.raises(DataError, match=r" 1: the text is longer than the context(.|\n)*window") as told:
        model.predict(tokenizer, [{"text": "w1"}, {"text": text}])
    assert "truncate" in str(told.value)
    model.too_long = "truncate"
    cut, beginning = model.predict(tokenizer, [{"text": text}, {"text": " ".join(WORDS[:6])}])
    if name in ("tags", "requests"):
        assert len(cut["tags"]) == 15 and set(cut["tags"][6:]) == {"O"}
        cut["tags"] = cut["tags"][:6]
        cut = {**cut, "words": cut["words"][:6]}
    assert cut == beginning
    model.too_long = "window"
    whole, short = model.predict(tokenizer, [{"text": text}, {"text": "w1 w2"}])
    model.too_long = "error"
    assert short == model.predict(tokenizer, [{"text": "w1 w2"}])[0]
    parts = [model.predict(tokenizer, [{"text": " ".join(WORDS[a : a + 6])}])[0] for a in (0, 3, 6, 9)]
    if name == "classes":
        mean = sum(part["scores"]["a"] for part in parts) / 4
        assert whole["scores"]["a"] == pytest.approx(mean, abs=1e-5)
    elif name == "vectors":
        vectors = torch.tensor([part["vector"] for part in parts])
        assert torch.allclose(torch.tensor(whole["vector"]), F.normalize(vectors.mean(0), dim=-1), atol=1e-5)
    elif name == "tags":
        assert whole["tags"] == [f"B-{word}" for word in WORDS[:15]]
    elif name == "requests":
        assert len(whole["tags"]) == 15 and whole["intent"] in ("go", "stop")
    else:
        parts = [model.predict(tokenizer, [{"text": " ".join(WORDS[a : a + 6])}])[0] for a in (0, 6, 12)]
        last = model.predict(tokenizer, [{"text": " ".join(WORDS[12:15])}])[0]
        assert whole["translation"] == " ".join(p["translation"] for p in [*parts[:2], last])
        model.too_long = "window"
        with pytest.raises(GenerationError, match="no one place for a forced word"):
            model.translate(tokenizer, [text], forced=["w1"])


def test_a_hole_beyond_the_context_is_refused_cut_off_or_looked_at_alone(tokenizer):
    class Sees(nl.NeuralModule):
        """It guesses the token that stands two places before the hole, of those it reads."""

        context = 8

        def __init__(self, size):
            super().__init__(V=size)
            self.weight = torch.nn.Parameter(torch.eye(size))

        def forward(self, tokens: TokenIdsBT, mask: MaskBT | None = None) -> nl.types.LogitsBTV:
            assert tokens.shape[1] <= 8
            return F.one_hot(tokens.roll(2, dims=1), len(self.weight)).float() @ self.weight * 9

    model = Sees(tokenizer.vocab_size)
    text = " ".join([*WORDS[:10], "[MASK]", *WORDS[10:15]])
    with pytest.raises(DataError, match="text 0: the text is longer than the context"):
        fill(model, tokenizer, [text])
    with pytest.raises(DataError, match="the hole lies beyond the context"):
        fill(model, tokenizer, [text], too_long="truncate")
    assert fill(model, tokenizer, [text], too_long="window", top=1)[0][0].text == "w8"
    early = " ".join([WORDS[0], WORDS[1], "[MASK]", *WORDS[2:15]])
    for policy in ("truncate", "window"):
        assert fill(model, tokenizer, [early], too_long=policy, top=1)[0][0].text == "w0"
    with pytest.raises(ConfigError, match="nothing is asked for"):
        fill(model, tokenizer, [early], top=0)
    assert len(fill(model, tokenizer, ["w1 w2 [MASK]"], top=10**6)[0]) == tokenizer.vocab_size


def test_a_context_without_room_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="no room for a text"):
        TextEncoding(tokenizer, 2)
