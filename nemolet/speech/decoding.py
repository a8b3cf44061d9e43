"""From scores to labels: the most likely one at each frame, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemolet.errors import GenerationError
from nemolet.speech.prediction import History, TransducerDecoder


@dataclass
class Hypothesis:
    """Labels with where they were written (final).

    Attributes:
        labels: ids.
        first: frame at which each begins.
        last: frame at which each ends, itself included.
        confidence: probability of each, where it was written.
        score: log-probability of the path, or of all paths where the search sums them.
    """

    labels: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    score: float = 0.0


@torch.inference_mode()
def greedy_ctc(logits_BTV: Tensor, lengths_B: Tensor) -> list[Hypothesis]:
    """The most likely label at each frame; repetitions become one, blanks none.

    A label lasts as long as its repetitions; its confidence is its largest probability among them.

    Example:
        >>> logits = torch.eye(3)[torch.tensor([[0, 0, 2, 0, 1]])] * 9
        >>> [found] = greedy_ctc(logits, torch.tensor([5]))
        >>> found.labels, found.first, found.last
        ([0, 0, 1], [0, 3, 4], [1, 3, 4])
    """
    blank = logits_BTV.shape[-1] - 1
    best_BT, label_BT = logits_BTV.float().log_softmax(-1).max(-1)
    best, labels = best_BT.exp().tolist(), label_BT.tolist()
    scores = best_BT.masked_fill(torch.arange(best_BT.shape[1], device=lengths_B.device) >= lengths_B[:, None], 0.0)
    found = []
    for row, (length, score) in enumerate(zip(lengths_B.tolist(), scores.sum(1).tolist())):
        hypothesis, before = Hypothesis(score=score), blank
        for frame in range(length):
            label = labels[row][frame]
            if label == before and label != blank:
                hypothesis.last[-1] = frame
                hypothesis.confidence[-1] = max(hypothesis.confidence[-1], best[row][frame])
            elif label != blank:
                _write(hypothesis, label, frame, best[row][frame])
            before = label
        found.append(hypothesis)
    return found


def _write(hypothesis: Hypothesis, label: int, frame: int, confidence: float) -> None:
    hypothesis.labels.append(label)
    hypothesis.first.append(frame)
    hypothesis.last.append(frame)
    hypothesis.confidence.append(confidence)


@torch.inference_mode()
def greedy_transducer(
    decoder: TransducerDecoder,
    hidden_BTD: Tensor,
    lengths_B: Tensor,
    *,
    durations: Sequence[int] | None = None,
    max_symbols: int = 10,
    history: History | None = None,
) -> list[Hypothesis]:
    """The most likely arc at each state; every row walks at its own pace.

    Args:
        decoder: prediction network and joint.
        hidden_BTD: from the encoder.
        lengths_B: valid frames.
        durations: frames that an arc may skip (TDT); None where a blank skips one and a label none (RNN-T).
        max_symbols: most labels at one frame.
        history: the last labels, where a stream goes on; changed to those after it.

    Raises:
        GenerationError: for fewer than one label per frame.
    """
    if max_symbols < 1:
        raise GenerationError("nothing could be written", where="max_symbols", expected="at least 1", found=max_symbols)
    rows = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
    known = decoder.start(len(rows)) if history is None else history
    skips = torch.tensor(durations or [0], device=hidden_BTD.device)
    frame_B, written_B = torch.zeros_like(lengths_B), torch.zeros_like(lengths_B)
    found = [Hypothesis() for _ in rows]
    columns = decoder.blank + 1
    while bool((walking_B := frame_B < lengths_B).any()):
        logits_BV = decoder.join(hidden_BTD[rows, frame_B.clamp(max=hidden_BTD.shape[1] - 1)], decoder.state(known))
        best_B, label_B = logits_BV[:, :columns].float().log_softmax(-1).max(-1)
        emits_B = walking_B & (label_B != decoder.blank)
        if durations is None:
            skip_B = (~emits_B).long()
        else:
            skip_B = skips[logits_BV[:, columns:].argmax(-1)]
            skip_B = torch.where(emits_B, skip_B, skip_B.clamp(min=1))
        written_B = torch.where(emits_B, written_B + 1, written_B)
        skip_B = torch.where((written_B >= max_symbols) & (skip_B == 0), 1, skip_B)
        known = decoder.extend(known, label_B, emits_B)
        for row in emits_B.nonzero().flatten().tolist():
            frame = int(frame_B[row])
            _write(found[row], int(label_B[row]), frame, float(best_B[row].exp()))
            if durations is not None:
                found[row].last[-1] = max(frame, min(int(lengths_B[row]), frame + int(skip_B[row])) - 1)
        for row in walking_B.nonzero().flatten().tolist():
            found[row].score += float(best_B[row])
        written_B = written_B.masked_fill(skip_B > 0, 0)
        frame_B = torch.where(walking_B, frame_B + skip_B, frame_B)
    if history is not None:
        history.labels.copy_(known.labels)
    return found
