"""Greedy decoding against a plain loop over frames and labels."""

from __future__ import annotations

import pytest
import torch

from nemolet.errors import GenerationError
from nemolet.speech.decoding import greedy_ctc, greedy_transducer
from nemolet.speech.prediction import TransducerDecoder


def ctc_by_hand(logits):
    written, before = [], None
    for frame in logits:
        label = int(frame.argmax())
        if label != before and label != len(frame) - 1:
            written.append(label)
        before = label
    return written


def test_ctc_is_a_loop_over_frames_whatever_the_padding():
    torch.manual_seed(0)
    logits, lengths = torch.randn(4, 30, 4) * 3, torch.tensor([30, 17, 1, 0])
    found = greedy_ctc(logits, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert found[row].labels == ctc_by_hand(logits[row, :length])
        assert abs(found[row].score - logits[row, :length].log_softmax(-1).amax(-1).sum().item()) < 1e-4
        assert all(first <= last < length for first, last in zip(found[row].first, found[row].last))


def test_a_label_is_as_sure_as_at_its_best_frame():
    probs = torch.tensor([[[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]]])
    [found] = greedy_ctc(probs.log(), torch.tensor([3]))
    assert found.labels == [0]
    assert (found.first, found.last) == ([0], [1])
    assert abs(found.confidence[0] - 0.9) < 1e-6


def decoder(durations=0):
    torch.manual_seed(3)
    made = TransducerDecoder(width=6, vocab_size=4, hidden=8, durations=durations).eval()
    for parameter in made.parameters():
        parameter.data *= 3
    return made


def transducer_by_hand(model, hidden, max_symbols, durations):
    """One row, one label after the other; the prediction network reads all labels anew each time."""
    written, frames, frame, here = [], [], 0, 0
    while frame < len(hidden):
        labels = torch.tensor([written], dtype=torch.long).view(1, -1)
        scores = model(hidden[None, frame : frame + 1], labels)[0, 0, -1]
        label = int(scores[:5].argmax())
        skip = durations[int(scores[5:].argmax())] if durations else int(label == 4)
        if label != 4:
            written.append(label)
            frames.append(frame)
            here += 1
        else:
            skip = max(1, skip)
        if here >= max_symbols and skip == 0:
            skip = 1
        if skip:
            here = 0
        frame += skip
    return written, frames


@pytest.mark.parametrize("durations", [None, [0, 1, 2]])
@pytest.mark.parametrize("max_symbols", [1, 3])
def test_a_batch_of_transducers_walks_as_each_alone(durations, max_symbols):
    model = decoder(len(durations or []))
    hidden, lengths = torch.randn(4, 20, 6), torch.tensor([20, 13, 1, 0])
    found = greedy_transducer(model, hidden, lengths, durations=durations, max_symbols=max_symbols)
    assert sum(len(f.labels) for f in found) > 5
    for row, length in enumerate(lengths.tolist()):
        labels, frames = transducer_by_hand(model, hidden[row, :length], max_symbols, durations)
        assert (found[row].labels, found[row].first) == (labels, frames)


def test_a_history_carries_over():
    model, hidden = decoder(), torch.randn(1, 20, 6)
    whole = greedy_transducer(model, hidden, torch.tensor([20]))[0]
    history = model.start(1)
    parts = [greedy_transducer(model, piece, torch.tensor([10]), history=history)[0] for piece in hidden.split(10, 1)]
    assert parts[0].labels + parts[1].labels == whole.labels


def test_something_has_to_be_writable():
    with pytest.raises(GenerationError):
        greedy_transducer(decoder(), torch.randn(1, 2, 6), torch.tensor([2]), max_symbols=0)


def test_labels_that_are_not_seen_change_nothing_in_training_alone():
    made = TransducerDecoder(width=6, vocab_size=4, hidden=8, label_dropout=1.0)
    hidden, one, other = torch.randn(1, 3, 6), torch.tensor([[0, 1]]), torch.tensor([[3, 2]])
    assert torch.equal(made(hidden, one), made(hidden, other))
    made.eval()
    scores = made(hidden, one)
    assert torch.equal(scores[:, :, 0], made(hidden, other)[:, :, 0])  # before the first label
    assert not torch.allclose(scores[:, :, 1:], made(hidden, other)[:, :, 1:])
