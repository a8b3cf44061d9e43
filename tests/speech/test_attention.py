"""The attention decoder with CTC: against sums over all paths, torch's losses, and all texts one by one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import nemolet as nl
from nemolet.errors import GenerationError, ShapeError
from nemolet.nn import Decoder
from nemolet.speech import AttentionRecognizer, Beam, CTCPrefix, FrontEnd, JointAttention, LiveRecognizer, LogMel
from nemolet.speech.conformer import ConformerEncoder
from nemolet.speech.ctc_prefix import align, chosen
from nemolet.speech.scorers import NgramModel
from nemolet.speech.transcription import transcribe


def paths(log_probs):
    """Every path with its text and its log-probability."""
    frames, columns = log_probs.shape
    for path in itertools.product(range(columns), repeat=frames):
        text = tuple(label for label, _ in itertools.groupby(path) if label != columns - 1)
        yield path, text, sum(float(log_probs[t, label]) for t, label in enumerate(path))


def model_of(*, vocab=2, ctc_weight=0.4, chunk=None):
    torch.manual_seed(1)
    model = AttentionRecognizer(
        front_end=FrontEnd(features=LogMel(sample_rate=8000, bins=8)),
        encoder=ConformerEncoder(bins=8, layers=1, width=8, heads=2, kernel=3, chunk=chunk),
        decoder=Decoder(layers=2, width=8, heads=2, cross=True),
        vocab_size=vocab,
        ctc_weight=ctc_weight,
    )
    for name, parameter in model.named_parameters():  # scores that differ
        parameter.data *= 20 if name.startswith(("head", "out", "embed")) else 3
    return model.eval()


@pytest.mark.parametrize("seed", range(3))
def test_the_probability_of_a_beginning_is_that_of_all_its_paths(seed):
    torch.manual_seed(seed)
    log_probs = (torch.randn(5, 3) * 2).log_softmax(-1)
    scorer, every = CTCPrefix(log_probs), list(paths(log_probs))
    states, prefixes = scorer.start(), [()]
    for _ in range(4):
        scores, states = scorer.extend(states)
        for row, prefix in enumerate(prefixes):
            for label in range(2):
                longer = (*prefix, label)
                expected = sum(math.exp(score) for _, text, score in every if text[: len(longer)] == longer)
                assert abs(math.exp(scores[row, label]) - expected) < 1e-6
            expected = sum(math.exp(score) for _, text, score in every if text == prefix)
            assert abs(math.exp(scores[row, 2]) - expected) < 1e-6
        keep = torch.randperm(2 * len(prefixes))[:5]
        prefixes = [(*prefix, label) for prefix in prefixes for label in range(2)]
        prefixes, states = [prefixes[index] for index in keep], chosen(states, keep)


def test_the_end_of_a_prefix_is_the_loss_of_torch():
    torch.manual_seed(0)
    log_probs, labels = torch.randn(30, 6).log_softmax(-1), [3, 3, 0, 4, 1]
    scorer = CTCPrefix(log_probs)
    state = scorer.start()
    for label in labels:
        _, states = scorer.extend(state)
        state = chosen(states, torch.tensor([label]))
    scores, _ = scorer.extend(state)
    loss = F.ctc_loss(log_probs, torch.tensor(labels), torch.tensor(30), torch.tensor(5), blank=5, reduction="sum")
    assert abs(float(scores[0, -1]) + float(loss)) < 1e-4


@pytest.mark.parametrize("labels", [[], [0], [0, 0], [0, 1, 0], [1, 1, 0]])
def test_labels_lie_where_the_best_path_has_them(labels):
    torch.manual_seed(len(labels))
    log_probs = torch.randn(6, 3).log_softmax(-1)
    path, score = max(((p, s) for p, text, s in paths(log_probs) if list(text) == labels), key=lambda way: way[1])
    found = align(log_probs.numpy(), labels)
    runs, place = [], 0
    for label, run in itertools.groupby(path):
        size = len(list(run))
        if label != 2:
            runs.append((place, place + size - 1))
        place += size
    assert list(zip(found.first, found.last)) == runs
    assert abs(found.score - score) < 1e-5


def test_labels_without_room_are_refused():
    log_probs = torch.randn(3, 3).log_softmax(-1).numpy()
    align(log_probs, [0, 1, 0])
    for labels in ([0, 0, 1], [0, 1, 0, 1]):
        with pytest.raises(GenerationError, match="do not fit"):
            align(log_probs, labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_sum_of_both(smoothing):
    torch.manual_seed(0)
    logits, frames = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 9, 5, requires_grad=True)
    labels, lengths = torch.tensor([[1, 2, 3], [3, -100, -100]]), torch.tensor([9, 6])
    loss, count = JointAttention(ctc_weight=0.25, label_smoothing=smoothing)(logits, frames, lengths, labels)
    expected = 0.0
    for row, text in enumerate([[1, 2, 3, 4], [3, 4]]):  # 4 is the end, and CTC's blank
        expected += 0.75 * F.cross_entropy(
            logits[row, : len(text)], torch.tensor(text), reduction="sum", label_smoothing=smoothing
        )
        target = torch.tensor(text[:-1])
        expected += 0.25 * F.ctc_loss(
            frames[row, : lengths[row]].log_softmax(-1), target, lengths[row], torch.tensor(len(target)), blank=4,
            reduction="sum",
        )  # fmt: skip
    assert count == 4 and abs((loss - expected).item()) < 1e-4
    loss.backward()
    assert not logits.grad[1, 2:].any() and logits.grad[0].any() and frames.grad.any()


def test_what_a_row_is_padded_with_changes_nothing():
    model, audio = model_of(), torch.randn(2, 4000)
    labels = torch.tensor([[0, 1, 1], [1, -100, -100]])
    with nl.checked():
        both = model(audio, torch.tensor([4000, 2000]), labels)
    alone = model(audio[1:, :2000], torch.tensor([2000]), labels[1:, :1])
    assert torch.allclose(both.logits[1, :2], alone.logits[0], atol=1e-5)
    assert torch.allclose(both.frame_logits[1, : alone.lengths[0]], alone.frame_logits[0], atol=1e-5)


@torch.no_grad()
def likeliest(model, encoded, row):
    """Greedy decoding that reads everything anew for each label."""
    room, text = int(encoded.lengths[row]), []
    one = type(encoded)(encoded.hidden[row : row + 1, :room], encoded.lengths[row : row + 1])
    while True:
        label = int(model.next_logits(torch.tensor([[model.end, *text]]), one)[0, -1].argmax())
        needed = len(text) + 1 + sum(a == b for a, b in itertools.pairwise([*text, label]))
        if label == model.end or needed > room:
            return text
        text.append(label)


@pytest.mark.parametrize("vocab", [2, 5])
def test_greedy_decoding_equals_reading_everything_anew(vocab):
    model = model_of(vocab=vocab)
    audio, lengths = torch.randn(3, 6000) * torch.tensor([[0.1], [1.0], [0.5]]), torch.tensor([6000, 2400, 4000])
    with torch.no_grad():
        encoded = model.encode(audio, lengths)
    found = model.greedy(encoded)
    assert [hypothesis.labels for hypothesis in found] == [likeliest(model, encoded, row) for row in range(3)]
    assert any(hypothesis.labels for hypothesis in found)
    for hypothesis, frames in zip(found, encoded.lengths.tolist()):
        assert len(hypothesis.first) == len(hypothesis.labels) == len(hypothesis.confidence)
        assert hypothesis.first == sorted(set(hypothesis.first)) and all(last < frames for last in hypothesis.last)


@torch.no_grad()
def totals(model, hidden, beam):
    """The score of every text that fits into the frames."""
    encoded = nl.speech.encoder.Encoded(hidden[None], torch.tensor([len(hidden)]))
    heard = {}
    for _, text, score in paths(model.frame_logits(hidden[None])[0].log_softmax(-1)):
        heard[text] = heard.get(text, 0.0) + math.exp(score)
    found = {}
    for text, probability in heard.items():
        spoken = model.next_logits(torch.tensor([[model.end, *text]]), encoded)[0].log_softmax(-1)
        said = sum(float(spoken[place, label]) for place, label in enumerate((*text, model.end)))
        language = 0.0
        if beam.scorer is not None:
            scores = [beam.scorer.scores(text[:place])[label] for place, label in enumerate(text)]
            language = beam.weight * (sum(scores) + beam.scorer.end(text))
        weight = model.ctc_weight
        found[text] = weight * math.log(probability) + (1 - weight) * said + language + beam.bonus * len(text)
    return found


@pytest.mark.parametrize("ctc_weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_all_texts(seed, ctc_weight):
    model = model_of(ctc_weight=ctc_weight)
    torch.manual_seed(seed)
    hidden = torch.randn(5, 8)
    scorer = NgramModel([[0, 1, 0], [1, 0]], vocab_size=2, order=2)
    for beam in (Beam(size=200), Beam(size=200, scorer=scorer, weight=0.5), Beam(size=200, bonus=0.7)):
        every = totals(model, hidden, beam)
        found = beam(model, nl.speech.encoder.Encoded(hidden[None], torch.tensor([5])))[0]
        best = max(every, key=every.get)
        assert tuple(found.labels) == best and abs(found.score - every[best]) < 1e-4
        assert len(found.first) == len(found.labels)


def test_a_recording_becomes_text_with_times(letters):
    model = model_of(vocab=letters.vocab_size)
    audio = [torch.randn(9000), torch.randn(700), torch.zeros(30)]  # the last one has no frame
    for search in (None, lambda encoded: Beam(size=3)(model, encoded)):
        found = transcribe(model, letters, audio, search=search)
        assert [transcript.duration for transcript in found] == [1.125, 0.0875, 0.0037]
        assert found[2].text == ""
        assert all(token.end <= transcript.duration for transcript in found for token in transcript.tokens)


def test_what_cannot_work_is_refused():
    parts = {"front_end": FrontEnd(features=LogMel(sample_rate=8000, bins=8)), "vocab_size": 3}
    encoder = ConformerEncoder(bins=8, layers=1, width=8, heads=2, kernel=3)
    for decoder in (Decoder(layers=1, width=8, heads=2), Decoder(layers=1, width=4, heads=2, cross=True)):
        with pytest.raises(ShapeError, match="cannot read the encoder"):
            AttentionRecognizer(encoder=encoder, decoder=decoder, **parts)
    with pytest.raises(GenerationError, match="looks at the whole recording"):
        LiveRecognizer(model_of(chunk=4))
