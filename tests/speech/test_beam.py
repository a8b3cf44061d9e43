"""Beam search against all texts, one by one."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

import nemolet as nl
from nemolet.errors import GenerationError
from nemolet.speech.beam import Beam, ctc_beam, transducer_beam
from nemolet.speech.prediction import TransducerDecoder
from nemolet.speech.scorers import Boost, Matched, NeuralScorer, NgramModel


def collapsed(path, blank):
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def every_text(logits):
    """Log-probability of each text, summed over all paths that write it."""
    probs = logits.log_softmax(-1).double()
    found = {}
    for path in itertools.product(range(logits.shape[1]), repeat=logits.shape[0]):
        score = sum(float(probs[t, label]) for t, label in enumerate(path))
        text = collapsed(path, logits.shape[1] - 1)
        found[text] = found.get(text, 0.0) + math.exp(score)
    return {text: math.log(p) for text, p in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_ctc_beam_finds_the_best_of_all_texts(seed):
    torch.manual_seed(seed)
    logits = torch.randn(6, 3) * 2
    texts = every_text(logits)
    found = ctc_beam(logits, Beam(size=200))
    assert tuple(found.labels) == max(texts, key=texts.get)
    assert abs(found.score - max(texts.values())) < 1e-5
    assert len(found.first) == len(found.last) == len(found.confidence) == len(found.labels)
    assert found.first == sorted(found.first)


@pytest.mark.parametrize("seed", range(3))
def test_a_language_model_is_added_to_every_text(seed):
    torch.manual_seed(seed)
    logits = torch.randn(6, 3)
    scorer = NgramModel([[0, 1, 0, 1, 0, 1]] * 3, vocab_size=2, order=3)
    beam = Beam(size=200, scorer=scorer, weight=0.7, bonus=0.2)

    def total(text, sound):
        language = sum(scorer.scores(text[:n])[label] for n, label in enumerate(text)) + scorer.end(text)
        return sound + 0.7 * language + 0.2 * len(text)

    totals = {text: total(text, sound) for text, sound in every_text(logits).items()}
    found = ctc_beam(logits, beam)
    assert tuple(found.labels) == max(totals, key=totals.get)
    assert abs(found.score - max(totals.values())) < 1e-5


def tdt_text(logits, text, blank, durations):
    """Probability of a text, by recursion over states; a blank that goes beyond the end ends there."""
    tokens, skips = logits[..., : blank + 1].softmax(-1).tolist(), logits[..., blank + 1 :].softmax(-1).tolist()

    @functools.cache
    def paths(t, s):
        if t >= len(tokens):
            return float(s == len(text))
        total = 0.0
        for skip, probability in zip(durations, skips[t][s]):
            if skip:
                total += tokens[t][s][blank] * probability * paths(t + skip, s)
            if s < len(text) and t + skip < len(tokens):
                total += tokens[t][s][text[s]] * probability * paths(t + skip, s + 1)
        return total

    return paths(0, 0)


def transducer_texts(decoder, hidden, most, durations):
    """Log-probability of each text, by a recursion over its lattice."""
    found = {}
    for size in range(most + 1):
        for text in itertools.product(range(decoder.blank), repeat=size):
            labels = torch.tensor([text], dtype=torch.long).view(1, -1)
            logits = decoder(hidden[None], labels)
            if durations is None:
                found[text] = -nl.speech.Transducer()(logits, torch.tensor([len(hidden)]), labels).loss.item()
            elif probability := tdt_text(logits[0], text, decoder.blank, durations):
                found[text] = math.log(probability)
    return found


@pytest.mark.parametrize("durations", [None, (0, 1, 2), (1, 3), (0, 3), (3,)])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_transducer_beam_finds_the_best_of_all_texts(seed, durations):
    torch.manual_seed(seed)
    decoder = TransducerDecoder(width=4, vocab_size=2, hidden=6, durations=len(durations or ())).eval()
    for parameter in decoder.parameters():
        parameter.data *= 2
    hidden = torch.randn(4, 4)
    with torch.inference_mode():
        texts = transducer_texts(decoder, hidden, 5, durations)
    found = transducer_beam(decoder, hidden, Beam(size=300), max_symbols=6, durations=durations)
    best = max(texts, key=texts.get)
    assert len(best) < 5
    assert tuple(found.labels) == best
    assert abs(found.score - texts[best]) < 1e-2  # but for texts with more labels at a frame than are tried


@pytest.mark.parametrize("max_symbols", [1, 2])
def test_a_beam_writes_no_more_labels_at_a_frame_than_it_may(max_symbols):
    decoder = TransducerDecoder(width=4, vocab_size=2, hidden=6, durations=2).eval()
    decoder.out.weight.data.zero_()
    decoder.out.bias.data = torch.tensor([6.0, 2.0, 0.0, 0.0, 0.0])  # labels rather than blanks
    found = transducer_beam(decoder, torch.randn(6, 4), Beam(), max_symbols=max_symbols, durations=(0, 2))
    assert max(map(found.first.count, found.first)) == max_symbols


def test_an_ngram_model_is_a_distribution_and_learns():
    model = NgramModel([[0, 1, 2], [0, 1, 1]], vocab_size=3, order=3)
    for history in [(), (0,), (0, 1), (2, 2, 2, 2)]:
        assert abs(sum(map(math.exp, model.scores(history))) - 1) < 1e-9
    assert max(range(4), key=lambda label: model.scores((0,))[label]) == 1
    assert model.end((0, 1, 2)) > model.end((0, 1))
    # By hand: unigrams of 8 events with 4 kinds, the bigram after 0 has 2 events of 1 kind.
    unigram = 3 / 12 + 4 / 12 * (1 / 4)
    assert abs(math.exp(model.scores((0,))[1]) - (2 / 3 + 1 / 3 * unigram)) < 1e-9


def test_a_neural_model_scores_as_it_predicts():
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=6, layers=1, width=8, heads=2)
    scorer = NeuralScorer(model, vocab_size=5, start=5, end_token=5)
    expected = model(torch.tensor([[5, 1, 2]]))[0, -1].log_softmax(-1)
    assert torch.allclose(torch.tensor(scorer.scores((1, 2))), expected, atol=1e-6)
    assert scorer.end((1, 2)) == scorer.scores((1, 2))[5]
    assert len(NeuralScorer(model, vocab_size=5).scores(())) == 5


def test_a_phrase_wins_only_as_a_whole():
    probs = torch.tensor([[0.5, 0.4, 0.05, 0.05], [0.05, 0.05, 0.5, 0.4]])
    logits = torch.stack((probs[0], probs[1])).log()[:, [0, 1, 2, 3]]
    plain = ctc_beam(logits, Beam()).labels
    boosted = ctc_beam(logits, Beam(boost=Boost([[1, 2]], weight=1.0))).labels
    assert plain == [0, 2]
    assert boosted == [1, 2]
    boost = Boost([[1, 2, 1]], weight=1.0)
    state, total = Matched(), 0.0
    for label in (1, 2):
        state, gain = boost.step(state, label)
        total += gain
    assert total + boost.finish(state) == 0.0


@pytest.mark.parametrize("kind", ["ctc", "rnnt", "tdt", "hybrid"])
def test_a_recognizer_is_searched_row_by_row(kind, recognizer):
    model = recognizer(kind)
    audio, lengths = torch.randn(2, 3000) * 0.1, torch.tensor([3000, 2000])
    together = Beam(size=3)(model, model.encode(audio, lengths))
    alone = Beam(size=3)(model, model.encode(audio[1:, :2000], lengths[1:]))
    assert together[1].labels == alone[0].labels


def test_a_beam_that_keeps_nothing_is_refused():
    with pytest.raises(GenerationError, match="keeps nothing"):
        Beam(size=0)
