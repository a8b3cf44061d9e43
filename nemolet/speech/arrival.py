"""A recording handed over in pieces, as a microphone would, with what that costs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nemolet.speech.live import LiveRecognizer
from nemolet.speech.models import Recognizer
from nemolet.speech.transcription import Transcript, transcript
from nemolet.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Arrived:
    """What was written while a recording arrived, and how long it took (final).

    Args:
        transcript: as of the whole recording.
        piece: seconds of audio that were handed over together.
        worked: seconds of computing.
        slowest: seconds of the slowest piece.
        latencies: for each token the seconds from the end of its first frame until it was written: waiting for the
            piece and for the encoder's chunk to be full, and computing.
    """

    transcript: Transcript
    piece: float
    worked: float
    slowest: float
    latencies: tuple[float, ...]

    @property
    def real_time_factor(self) -> float:
        """Seconds of computing for a second of audio."""
        return self.worked / max(self.transcript.duration, 1e-9)

    def as_json(self) -> dict[str, Any]:
        """The measures as plain data; latencies are None where nothing was written."""
        late = self.latencies
        return {
            "piece": self.piece,
            "real_time_factor": round(self.real_time_factor, 4),
            "slowest_piece": round(self.slowest, 4),
            "mean_latency": round(sum(late) / len(late), 4) if late else None,
            "worst_latency": round(max(late), 4) if late else None,
        }

    def __str__(self) -> str:
        said = f"real-time factor {self.real_time_factor:.3f}; slowest piece {self.slowest * 1000:.0f} ms"
        if not self.latencies:
            return said
        mean = sum(self.latencies) / len(self.latencies)
        return f"{said}; latency of a token {mean * 1000:.0f} ms, at worst {max(self.latencies) * 1000:.0f} ms"


def arrive(
    model: Recognizer,
    tokenizer: Tokenizer,
    audio_N: Tensor,
    *,
    piece: float,
    written: Callable[[float, str], None] | None = None,
) -> Arrived:
    """Hand a recording over piece by piece.

    Args:
        model: one that can read in chunks, in evaluation.
        tokenizer: the model's.
        audio_N: samples at the model's rate.
        piece: seconds that are handed over together.
        written: called with the second of the recording and the new text, whenever there is some.

    Raises:
        GenerationError: for a model that has to see the whole recording.
    """
    live, stream = LiveRecognizer(model), tokenizer.stream()
    frame = model.samples_per_frame / model.sample_rate
    duration = len(audio_N) / model.sample_rate
    pieces = audio_N.split(max(1, round(piece * model.sample_rate)))
    steps: list[Callable[[], list[int]]] = [functools.partial(live.push, part) for part in pieces]
    took: list[float] = []
    latencies: list[float] = []
    for number, step in enumerate([*steps, live.flush], 1):
        start = time.perf_counter()
        labels = step()
        took.append(time.perf_counter() - start)
        heard = min(number * piece, duration)
        latencies += [heard + took[-1] - (live.hypothesis.first[-1 - back] + 1) * frame for back in range(len(labels))]
        if labels and written is not None:
            written(heard, "".join(stream.push(label) for label in labels))
    whole = transcript(live.hypothesis, tokenizer, seconds_per_frame=frame, duration=duration)
    return Arrived(whole, piece, sum(took), max(took), tuple(latencies))
