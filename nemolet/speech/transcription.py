"""From recordings to texts with times: batches, long audio in windows, words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemolet.errors import GenerationError
from nemolet.rules import Checked
from nemolet.speech.decoding import Hypothesis
from nemolet.speech.encoder import Encoded
from nemolet.speech.models import Recognizer
from nemolet.tokenizers.base import Tokenizer

Search = Callable[[Encoded], list[Hypothesis]]


@dataclass(frozen=True)
class Piece:
    """A token or a word, from one second to another, and how sure the model is of it."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Transcript:
    """What was said in a recording (final).

    Args:
        text: all of it.
        words: parts between spaces; a word is as sure as its least sure token.
        tokens: what the model wrote.
        duration: of the recording, in seconds.
        score: log-probability of what was written.
        segments: sentences or parts of them, of a model that tells their times instead of those of words.
    """

    text: str
    words: tuple[Piece, ...]
    tokens: tuple[Piece, ...]
    duration: float
    score: float
    segments: tuple[Piece, ...] = ()

    @property
    def confidence(self) -> float:
        """Mean confidence of the tokens, or of the segments; 0 where there is none."""
        pieces = self.tokens or self.segments
        return sum(piece.confidence for piece in pieces) / max(1, len(pieces))

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "confidence": self.confidence}


@dataclass(frozen=True)
class Windows(Checked):
    """How long audio is cut: parts of ``seconds``, encoded with ``margin`` seconds of their neighbours.

    The encoded parts are joined before anything is decoded. So times count from the start of the recording,
    and no word is cut in two.
    """

    seconds: float = 30.0
    margin: float = 2.0

    CONFIG_RULES = (("seconds > 0 and margin >= 0", "seconds is above 0 and margin at least 0"),)


class _Part(NamedTuple):
    """A window of a recording in samples, and how many frames from ``first`` on belong to it; None for all."""

    row: int
    start: int
    stop: int
    first: int
    frames: int | None


def transcribe(
    model: Recognizer,
    tokenizer: Tokenizer,
    audio: Sequence[Tensor],
    *,
    search: Search | None = None,
    batch_size: int = 8,
    windows: Windows | None = None,
) -> list[Transcript]:
    """Write down what is said in recordings.

    Args:
        model: in evaluation.
        tokenizer: the model's.
        audio: recordings ``[N]`` at the model's sample rate.
        search: how labels are found; None for the model's greedy way.
        batch_size: windows that are encoded, or recordings that are decoded, together.
        windows: how long recordings are cut.

    Returns:
        One transcript for each recording, in their order.

    Raises:
        GenerationError: for a model in training.
    """
    if model.training:
        raise GenerationError("the model is in training", where=model.label, fix="call model.eval() first")
    if batch_size < 1:
        raise GenerationError("a batch needs a row", where="batch_size", expected="at least 1", found=batch_size)
    hidden = _encoded(model, audio, windows or Windows(), batch_size)
    order = sorted(range(len(audio)), key=lambda row: len(hidden[row]))
    found: dict[int, Hypothesis] = {}
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        lengths_B = torch.tensor([len(hidden[row]) for row in rows], device=hidden[rows[0]].device)
        encoded = Encoded(pad_sequence([hidden[row] for row in rows], batch_first=True), lengths_B)
        found |= dict(zip(rows, (search or model.greedy)(encoded)))
    frame = model.samples_per_frame / model.sample_rate
    return [
        transcript(found[row], tokenizer, seconds_per_frame=frame, duration=len(samples) / model.sample_rate)
        for row, samples in enumerate(audio)
    ]


def transcript(
    hypothesis: Hypothesis, tokenizer: Tokenizer, *, seconds_per_frame: float, duration: float
) -> Transcript:
    """Text and times of what was decoded; a token begins with its first frame and ends after its last."""
    stream = tokenizer.stream()
    pieces = [stream.push(label) for label in hypothesis.labels]
    if pieces:
        pieces[-1] += stream.flush()
    tokens = tuple(
        Piece(
            text,
            round(first * seconds_per_frame, 4),
            round(min((last + 1) * seconds_per_frame, max(duration, first * seconds_per_frame)), 4),
            round(confidence, 4),
        )
        for text, first, last, confidence in zip(pieces, hypothesis.first, hypothesis.last, hypothesis.confidence)
    )
    text = tokenizer.decode(hypothesis.labels)
    return Transcript(text.strip(), tuple(_words(tokens)), tokens, round(duration, 4), hypothesis.score)


def _words(tokens: Sequence[Piece]) -> list[Piece]:
    """Tokens joined where no space stands between them."""
    words: list[Piece] = []
    apart = True
    for token in tokens:
        for index, part in enumerate(token.text.split(" ")):
            apart = apart or index > 0
            if not part:
                continue
            if apart:
                words.append(Piece(part, token.start, token.end, token.confidence))
            else:
                word = words[-1]
                confidence = min(word.confidence, token.confidence)
                words[-1] = Piece(word.text + part, word.start, token.end, confidence)
            apart = False
    return words


@torch.inference_mode()
def _encoded(model: Recognizer, audio: Sequence[Tensor], windows: Windows, batch_size: int) -> list[Tensor]:
    """Hidden states ``[T, D]`` of each recording."""
    parts = [part for row, samples in enumerate(audio) for part in _parts(row, len(samples), model, windows)]
    order = sorted(range(len(parts)), key=lambda index: parts[index].stop - parts[index].start)
    device = next(model.parameters()).device
    done: dict[int, Tensor] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        cuts = [audio[parts[index].row][parts[index].start : parts[index].stop] for index in batch]
        lengths_B = torch.tensor([len(cut) for cut in cuts], device=device)
        hidden_BTD, left_B = model.encode(pad_sequence(cuts, batch_first=True).to(device), lengths_B)
        for index, row_TD, left in zip(batch, hidden_BTD, left_B.tolist()):
            part = parts[index]
            stop = left if part.frames is None else min(left, part.first + part.frames)
            done[index] = row_TD[part.first : stop]
    hidden: list[list[Tensor]] = [[] for _ in audio]
    for index, part in enumerate(parts):
        hidden[part.row].append(done[index])
    return [torch.cat(pieces) for pieces in hidden]


def _parts(row: int, samples: int, model: Recognizer, windows: Windows) -> list[_Part]:
    """Windows that begin at whole frames; the last one takes what is left."""
    frame = model.samples_per_frame
    size = max(1, round(windows.seconds * model.sample_rate / frame))
    margin = round(windows.margin * model.sample_rate / frame)
    if samples <= (size + margin) * frame:
        return [_Part(row, 0, samples, 0, None)]
    parts = []
    for first in range(0, -(-samples // frame), size):
        before = min(first, margin)
        stop = (first + size + margin) * frame
        last = (first + size) * frame >= samples
        count = None if last else size
        parts.append(_Part(row, (first - before) * frame, samples if last else min(samples, stop), before, count))
    return parts
