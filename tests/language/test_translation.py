"""Beam search against all texts there are; translators that learn, score and keep their order."""

from __future__ import annotations

import itertools

import pytest
import torch

import nemolet as nl
from nemolet.data import ParallelTexts, collate
from nemolet.errors import GenerationError
from nemolet.language import Beam, Constraints, EncoderDecoder, GenerationRules, Translator, beam_search
from nemolet.nn import Decoder, Encoder
from nemolet.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
ENDS = GenerationRules(start=4, stop=(4,))


def model(vocab=5, width=16, seed=0, std=0.3):
    torch.manual_seed(seed)
    parts = {
        "encoder": Encoder(layers=1, width=width, heads=2, init_std=std),
        "decoder": Decoder(layers=1, width=width, heads=2, cross=True, init_std=std),
    }
    made = EncoderDecoder(vocab_size=vocab, **parts).eval()
    if vocab == 5:  # texts of very different worth
        torch.nn.init.normal_(made.graph.embed.weight, std=0.7)
    return made


def every_text(made, source, mask, beam, end=4, allowed=lambda text: True):
    """What each text of at most some tokens is worth; the longest ones need no end."""
    found = []
    for length in range(beam.max_length + 1):
        for text in itertools.product([t for t in range(5) if t != end], repeat=length):
            if not allowed(text):
                continue
            tokens = torch.tensor([[end, *text]])
            labels = torch.tensor([*text, end])
            log_probs = made(source, tokens, mask).log_softmax(-1)[0]
            each = log_probs[torch.arange(length + 1), labels][: beam.max_length]
            found.append((beam.worth(each.sum().item(), len(each)), list(text)))
    return max(found)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_all_texts(penalty, seed):
    made = model(seed=seed)
    source, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool)
    beam = Beam(size=64, length_penalty=penalty, max_length=4)
    found = beam_search(made, source, mask, rules=ENDS, beam=beam)[0][0]
    worth, text = every_text(made, source, mask, beam)
    assert found.tokens == text
    assert found.worth == pytest.approx(worth, abs=1e-4)


CONSTRAINTS = {
    "one word": Constraints(forced=((2,),)),
    "a phrase": Constraints(forced=((3, 1),)),
    "two that overlap": Constraints(forced=((0, 1), (1, 2))),
    "a repeated token": Constraints(forced=((1, 1, 0),)),
    "forbidden": Constraints(forbidden=((0,), (3, 2))),
    "both": Constraints(forced=((2, 2),), forbidden=((1, 2), (0,))),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_all_texts_that_obey(name, seed):
    constraints = CONSTRAINTS[name]
    made = model(seed=seed)
    source, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool)
    beam = Beam(size=256, max_length=5)
    found = beam_search(made, source, mask, rules=ENDS, beam=beam, constraints=constraints)[0][0]
    worth, text = every_text(made, source, mask, beam, allowed=lambda text: obeys(text, constraints))
    assert found.tokens == text
    assert found.worth == pytest.approx(worth, abs=1e-4)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_narrow_beam_obeys_too(name, size):
    constraints, made = CONSTRAINTS[name], model(seed=5)
    sources = torch.tensor([[1, 2, 3], [2, 0, 1], [3, 3, 3]])
    mask = torch.ones_like(sources, dtype=torch.bool)
    beam = Beam(size=size, max_length=9)
    for rows in beam_search(made, sources, mask, rules=ENDS, beam=beam, constraints=constraints):
        assert rows and all(obeys(found.tokens, constraints) for found in rows)
        assert rows == sorted(rows, key=lambda found: -found.worth)


def test_what_cannot_be_obeyed_is_an_error():
    made, source = model(), torch.tensor([[1, 2, 3]])
    mask = torch.ones_like(source, dtype=torch.bool)
    with pytest.raises(GenerationError, match="obeys"):
        long = Constraints(forced=((0, 1, 2, 3),))
        beam_search(made, source, mask, rules=ENDS, beam=Beam(max_length=3), constraints=long)
    with pytest.raises(GenerationError, match="holds a forbidden one"):
        Constraints(forced=((1, 2, 3),), forbidden=((2, 3),))
    with pytest.raises(GenerationError, match="empty"):
        Constraints(forced=((),))


def obeys(text, constraints):
    def there(phrase):
        return " ".join(map(str, phrase)) in " ".join(map(str, text))  # tokens have one digit

    return all(map(there, constraints.forced)) and not any(map(there, constraints.forbidden))


def test_words_are_forced_and_forbidden():
    made = Translator(model=model(vocab=257, std=0.02), context=24).eval()
    records = [{"source": "one", "forced": ["hund"]}, {"source": "two"}, {"source": "one", "forced": ["hund", "ab"]}]
    found = [answer["translation"] for answer in made.predict(BYTES, records)]
    assert "hund" in found[0] and "hund" in found[2] and "ab" in found[2]
    assert found[1] == made.translate(BYTES, ["two"])[0]
    with pytest.raises(GenerationError, match="empty"):
        made.translate(BYTES, ["one"], forced=[" "])


def test_a_beam_of_one_takes_the_likeliest_token_each_time():
    made = model(seed=3)
    source, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool)
    tokens = [4]
    for _ in range(6):
        tokens.append(int(made(source, torch.tensor([tokens]), mask)[0, -1].argmax()))
        if tokens[-1] == 4:
            break
    found = beam_search(made, source, mask, rules=ENDS, beam=Beam(size=1, max_length=6))[0][0]
    assert found.tokens == [t for t in tokens[1:] if t != 4]


def test_what_is_found_does_not_depend_on_the_batch():
    made = model(seed=1)
    sources = [[1, 2, 3, 0], [2], [3, 3]]
    batch = torch.tensor([s + [0] * (4 - len(s)) for s in sources])
    mask = torch.tensor([[i < len(s) for i in range(4)] for s in sources])
    beam = Beam(size=3, max_length=7)
    together = beam_search(made, batch, mask, rules=ENDS, beam=beam)
    for source, rows in zip(sources, together):
        one = torch.tensor([source])
        alone = beam_search(made, one, torch.ones_like(one, dtype=torch.bool), rules=ENDS, beam=beam)[0]
        assert [h.tokens for h in alone] == [h.tokens for h in rows]
        assert [h.worth for h in alone] == pytest.approx([h.worth for h in rows], abs=1e-4)
        assert [h.worth for h in rows] == sorted((h.worth for h in rows), reverse=True)


def test_a_beam_has_to_be_possible():
    with pytest.raises(GenerationError, match="the beam is impossible"):
        Beam(size=0)


def test_a_translator_learns_to_copy_and_is_scored(tmp_path):
    translator = Translator(model=model(vocab=257, width=32, std=0.02), context=16, label_smoothing=0.0).train()
    words = ["ab", "cd", "efg", "xy", "z"]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"source": "{w}", "target": "{w}"}}\n' for w in words * 4))
    data = ParallelTexts(path=str(path)).prepare(BYTES, split=False)
    batch = collate(data.train, ParallelTexts.PORTS)
    graph = nl.training.training_graph(translator, translator.objective(), fields=tuple(ParallelTexts.PORTS))
    optimizer = torch.optim.Adam(translator.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        result = graph(**batch)
        (result.loss / result.count).backward()
        optimizer.step()
    assert translator.translate(BYTES, words, beam=Beam(size=2, max_length=8)) == words
    assert translator.predict(BYTES, [{"source": "ab"}, {"text": "cd"}]) == [
        {"translation": "ab"},
        {"translation": "cd"},
    ]
    for letter in "efg":  # whatever it would write
        (other,) = translator.translate(BYTES, ["efg"], forbidden=[letter])
        assert letter not in other
    scores = translator.score_texts(BYTES, [{"source": w, "target": w} for w in words])
    assert scores["chrf"] == 100.0
    archive = nl.load(nl.save(tmp_path / "m.nemolet", model=translator, tokenizer=BYTES))
    assert archive.model.translate(BYTES, ["efg"]) == translator.translate(BYTES, ["efg"])
