"""Words by their letters: pieces as a plain program would list them, and what they are good for."""

from __future__ import annotations

import pytest
import torch

import nemolet as nl
from nemolet.errors import ConfigError, ConversionError
from nemolet.language import SpelledEmbedding, SpellingEncoder, TextClassifier, TokenClassifier
from nemolet.language.saliency import explain
from nemolet.tokenizers import ByteTokenizer
from nemolet.training.throughput import flops_per_entry

BYTES = ByteTokenizer()
WORDS = ["card", "cards", "discard", "banana", "bandana", "a", "I", "ab", "Card", "né"]


def embedding(**settings):
    return SpelledEmbedding(**{"width": 4, "buckets": 1 << 20, **settings})


def pieces(embed, text):
    tokens = torch.tensor([BYTES.encode(text)])
    return embed.rows(tokens, embed.places(tokens))


def runs_of_letters(word, orders):
    spelled = b"\0" + word.lower().encode() + b"\0"
    return [spelled[i : i + n] for n in orders for i in range(len(spelled) - n + 1)]


@pytest.mark.parametrize("orders", [(1, 2, 3), (2, 3, 4, 5)])
def test_runs_of_letters_are_those_of_the_word_with_its_edges(orders):
    embed = embedding(letters=orders, words=())
    expected = {word: [run for run in runs_of_letters(word, orders) if run != b"\0"] for word in WORDS}
    rows = {word: pieces(embed, word)[0].tolist() for word in WORDS}
    for one in WORDS:
        assert len(rows[one]) == len(expected[one])
        for other in WORDS:
            assert len({*rows[one]} & {*rows[other]}) == len({*expected[one]} & {*expected[other]})


def test_a_word_is_the_sum_of_its_pieces_wherever_it_stands():
    embed = embedding()
    alone = embed(torch.tensor([BYTES.encode("card")])).hidden[0, 0]
    rows, _, _ = pieces(embed, "card")
    runs, whole = rows[:-2], rows[-2:]  # the word itself, and the run of words that begins with nothing
    expected = embed.pieces.weight[runs].sum(0) / len(runs) ** 0.5 + embed.pieces.weight[whole].sum(0)
    assert torch.allclose(alone, expected, atol=1e-6)
    inside = embedding(words=(1,))
    found = inside(torch.tensor([BYTES.encode("my card, CARD")])).hidden[0]
    assert torch.allclose(found[1], found[3], atol=1e-6)


def test_runs_of_words_see_their_order():
    embed = embedding(letters=(), words=(2,))
    first, second = (pieces(embed, text)[0].tolist() for text in ("to and from", "and to from"))
    assert len({*first, *second}) == 6
    assert pieces(embed, "go to and")[0][2] == first[1]


def test_the_shape_of_a_word_is_that_of_its_characters():
    embed = embedding(letters=(), words=(), shapes=True, marks=False)
    row = {word: int(pieces(embed, word)[0]) for word in ("Anna", "Li", "USA", "AB-12", "XYZ-7", "iPhone", "anna")}
    assert row["Anna"] == row["Li"]
    assert row["AB-12"] == row["XYZ-7"]
    assert len(set(row.values())) == 5


@pytest.mark.parametrize(
    ("text", "marks", "words"),
    [
        ("Is it?", True, ["Is", " it", "?"]),
        ("Is it?", False, ["Is", " it?"]),
        (" two  spaces (here).", True, [" two", "  spaces", " (", "here", ")", "."]),
        ("can't", True, ["can", "'", "t"]),
    ],
)
def test_words_are_found_among_bytes(text, marks, words):
    places = embedding(marks=marks).places(torch.tensor([BYTES.encode(text)]))
    found = [""] * places.real.shape[1]
    for byte, word in zip(text, places.word[0].tolist()):
        found[word] += byte
    assert found == words
    assert [text[i] for i in places.last[0].nonzero()[:, 0].tolist()] == [word[-1] for word in words]


def test_padding_changes_nothing_that_is_not_padding():
    torch.manual_seed(0)
    encoder = SpellingEncoder(width=8, buckets=512, layers=1, heads=2, shapes=True).eval()
    short, long = BYTES.encode("A card"), BYTES.encode("Where is it, please?")
    padded = torch.tensor([short + [0] * (len(long) - len(short)), long])
    mask = torch.tensor([[i < len(ids) for i in range(len(long))] for ids in (short, long)])
    together = encoder(padded, mask)
    assert torch.allclose(together[0, : len(short)], encoder(torch.tensor([short]))[0], atol=1e-6)
    assert torch.allclose(together[1], encoder(torch.tensor([long]))[0], atol=1e-6)


def test_it_compiles_whole_for_any_number_of_words():
    encoder = SpellingEncoder(width=8, buckets=512, layers=1, heads=2, shapes=True).eval()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for text in ("A card", "Where is it, please?", "no"):
        tokens = torch.tensor([BYTES.encode(text)])
        torch.testing.assert_close(compiled(tokens), encoder(tokens))
        compiled(tokens).sum().backward()


def test_operations_are_counted_for_words_of_usual_length():
    encoder = SpellingEncoder(width=8, buckets=64, neighbours=1, reach=1)
    found = flops_per_entry(encoder, {"tokens": torch.zeros(1, 50, dtype=torch.long)})
    assert found == 3 * 2 * (3 * 8) * (2 * 8) * 11 / 50  # 11 words in 50 bytes


def test_names_nobody_has_seen_are_found_by_their_capitals():
    torch.manual_seed(0)
    encoder = SpellingEncoder(width=16, buckets=512, shapes=True, marks=False, neighbours=1, word_dropout=0.1)
    model = TokenClassifier(encoder=encoder, labels=["O", "B-name", "I-name"], crf=True)
    graph = nl.training.training_graph(model, model.objective(), fields=("mask",))
    sentences = ["we saw Anna there", "then Otto went home", "nobody knows Iris"]
    from nemolet.data import TaggedWords, TextEncoding, collate

    samples = []
    for sentence in sentences:
        read = TextEncoding(BYTES, 64).words(sentence.split(), "")
        labels = [int(word[0].isupper()) for word in sentence.split()]
        samples.append({"tokens": read.ids, "words": read.firsts, "labels": labels})
    batch = collate(samples, TaggedWords.PORTS)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        result = graph(**batch)
        (result.loss / result.count).backward()
        optimizer.step()
    tagged = model.tag(BYTES, [["they", "saw", "Ludwig", "again"]])[0]
    assert tagged.tags == ("O", "O", "B-name", "O")


def test_another_tokenizer_than_that_of_bytes_is_refused():
    with pytest.raises(ConfigError, match="tokenizer=byte"):
        SpellingEncoder(vocab_size=1000)


def test_an_archive_keeps_it_and_a_folder_of_hugging_face_cannot(tmp_path):
    model = TextClassifier(encoder=SpellingEncoder(width=8, buckets=64), labels=["a", "b"]).eval()
    path = nl.save(tmp_path / "model.nemolet", model=model, tokenizer=BYTES)
    tokens = torch.tensor([BYTES.encode("one text")])
    assert torch.equal(nl.load(path).model(tokens), model(tokens))
    with pytest.raises(ConversionError):
        nl.convert.write(tmp_path / "folder", model=model)


def test_an_explanation_is_of_words_and_adds_up():
    torch.manual_seed(0)
    model = TextClassifier(encoder=SpellingEncoder(width=8, buckets=64), labels=["a", "b"]).eval()
    torch.nn.init.normal_(model.head.weight)
    found = explain(model, BYTES, "Where is it?", label="b", steps=256)
    assert found.pieces == ("Where", " is", " it", "?", "<|endoftext|>")
    tokens = torch.tensor([[*BYTES.encode("Where is it?"), 256]])
    score = model(tokens)[0, 1].item()
    hook = model.encoder.embed.register_forward_hook(lambda _, __, output: output._replace(hidden=output.hidden * 0))
    nothing = model(tokens)[0, 1].item()
    hook.remove()
    assert sum(found.scores) == pytest.approx(score - nothing, abs=0.02)
