"""Times that Whisper writes among its tokens: where they may stand, and the segments between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NEVER = -torch.inf


class Segment(NamedTuple):
    """Tokens from one frame of the encoder to another, and where they begin among those of their window."""

    start: int
    end: int
    tokens: list[int]
    place: int


@dataclass(frozen=True)
class Times:
    """The tokens of times, and where they may stand (Radford et al., 2022).

    Args:
        first: the token of the beginning of a window; those after it are one frame of the encoder later each.
        plain: the token after which no times are written.
        end: the token that ends a text.
        latest: frames after which no first segment may begin; None for any.
    """

    first: int
    plain: int
    end: int
    latest: int | None = None

    def bound(self, logits_BV: Tensor, written: Sequence[Sequence[int]]) -> None:
        """Set scores of what may not come next to minus infinity, in place.

        A text begins with a time. Times stand in pairs, unless the text ends, and do not go back. Where all times
        together are likelier than any other token, one of them comes.

        Args:
            logits_BV: scores of the next token.
            written: what each row has written so far.
        """
        logits_BV[:, self.plain] = NEVER
        for scores_V, tokens in zip(logits_BV, written):
            if not tokens:
                scores_V[: self.first] = NEVER
                if self.latest is not None:
                    scores_V[self.first + self.latest + 1 :] = NEVER
                continue
            last = tokens[-1] >= self.first
            paired = len(tokens) < 2 or tokens[-2] >= self.first
            if last and paired:
                scores_V[self.first :] = NEVER
            elif last:
                scores_V[: self.end] = NEVER
            before = [token for token in tokens if token >= self.first]
            if before:
                scores_V[self.first : before[-1] + (0 if last and not paired else 1)] = NEVER
        log_probs_BV = logits_BV.log_softmax(-1)
        likelier_B = log_probs_BV[:, self.first :].logsumexp(-1) > log_probs_BV[:, : self.first].amax(-1)
        logits_BV[:, : self.first].masked_fill_(likelier_B[:, None], NEVER)

    def segments(self, tokens: Sequence[int], frames: int) -> tuple[list[Segment], int | None]:
        """The segments of a window, and the frame from which the next window is read; None for where this one ends.

        Two times in a row end a segment and begin the next. What follows the last such pair is not finished, and is
        read again in the next window; one time at the end says that nothing follows. Nothing ends after the
        recording, and what would begin there was not said.

        Args:
            tokens: that were written.
            frames: of the encoder that are left in the recording, and no more than a window has.

        Example:
            >>> Times(first=10, plain=9, end=8).segments([10, 1, 12, 12, 2, 15, 15, 3], 20)
            ([Segment(start=0, end=2, tokens=[1], place=0), Segment(start=2, end=5, tokens=[2], place=3)], 5)
        """
        timed = [token >= self.first for token in tokens]
        single = timed[-2:] == [False, True]
        cuts = [at for at in range(1, len(tokens)) if timed[at - 1] and timed[at]]
        if not cuts:
            later = [token - self.first for token in tokens if token > self.first]
            said = [token for token in tokens if token < self.first]
            found, stop = [Segment(0, later[-1] if later else frames, said, 0)], None
        else:
            found, begin = [], 0
            for cut in [*cuts, len(tokens)] if single else cuts:
                said = [token for token in tokens[begin:cut] if token < self.first]
                found.append(Segment(tokens[begin] - self.first, tokens[cut - 1] - self.first, said, begin))
                begin = cut
            stop = None if single or found[-1].end >= frames else found[-1].end
        return [each._replace(end=min(each.end, frames)) for each in found if each.start < frames], stop
