"""Extractive question answering: which piece of a text answers a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.data.encoding import TextEncoding
from nemolet.data.labelled import Window, windows
from nemolet.data.ports import LogitsBT, PlacesB
from nemolet.language.classification import Transform
from nemolet.language.losses import TokenLoss
from nemolet.language.scores import exact_match, word_f1
from nemolet.language.tasks import in_batches, width_of
from nemolet.metrics import Share
from nemolet.module import NeuralModule
from nemolet.nn.feed_forward import ActivationName
from nemolet.nn.linear import Linear
from nemolet.tokenizers import Tokenizer
from nemolet.types import IGNORED, MaskBT, TokenIdsBT


class AnswerScores(NamedTuple):
    """How likely an answer begins and ends at each token."""

    first: LogitsBT
    last: LogitsBT


@dataclass(frozen=True)
class Answer:
    """A piece of the text, where it begins, and its log-probability within the window it was found in."""

    text: str
    start: int
    score: float


class QuestionAnswerer(NeuralModule):
    """Find the answer to a question in a text: any encoder, and two scores per token (final).

    Args:
        encoder: from tokens (and a mask) to hidden states.
        context: longest question and text together, in tokens; longer texts are read in windows.
        max_tokens: longest answer.
        dropout: before the linear layer, in training.
        transform: activation of one more layer before the scores, as ModernBERT has it; None for no such layer.
        transform_norm: whether a norm follows it.

    Shape: tokens_BT, readable_BT, mask_BT -> first_BT, last_BT.

    Example:
        >>> from nemolet.language import NgramEncoder
        >>> from nemolet.tokenizers import ByteTokenizer
        >>> model = QuestionAnswerer(encoder=NgramEncoder(vocab_size=257, width=8, buckets=16))
        >>> model.answer(ByteTokenizer(), [("Who?", "Anna did.")])[0].text in "Anna did."
        True
    """

    CONFIG_RULES: ClassVar = (("context >= 16 and max_tokens >= 1", "context is at least 16, max_tokens at least 1"),)
    READS: ClassVar = (("question", "context"),)
    PORTS: ClassVar = {"tokens": TokenIdsBT, "mask": MaskBT, "readable": MaskBT}

    def __init__(
        self,
        *,
        encoder: NeuralModule,
        context: int = 256,
        max_tokens: int = 30,
        dropout: float = 0.1,
        transform: ActivationName | None = None,
        transform_norm: bool = False,
    ) -> None:
        width = width_of(encoder)
        super().__init__(D=width)
        self.context, self.max_tokens, self.dropout = context, max_tokens, dropout
        self.encoder = encoder
        self.transform = Transform(width=width, activation=transform, norm=transform_norm) if transform else None
        self.head = Linear("D", "P", width, 2, bias=True, init_std=0.02)

    def forward(self, tokens: TokenIdsBT, readable: MaskBT, mask: MaskBT | None = None) -> AnswerScores:
        # BERT tells the two apart: all from the text on, its end included, is of the second type.
        types = {"types": readable.cumsum(1).clamp(max=1)} if getattr(self.encoder, "token_types", 0) > 1 else {}
        hidden = self.encoder(tokens=tokens, mask=mask, **types)
        if self.transform is not None:
            hidden = self.transform(hidden)
        hidden = F.dropout(hidden, self.dropout, self.training)
        scores = self.head(hidden).masked_fill(~readable[..., None], torch.finfo(hidden.dtype).min)
        return AnswerScores(scores[..., 0], scores[..., 1])

    def objective(self) -> NeuralModule:
        """Cross-entropy of both ends."""
        return AnswerLoss()

    def measures(self) -> dict[str, NeuralModule]:
        """How many answers are exactly right."""
        return {"exact": ExactSpan()}

    def answer(self, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, batch_size: int = 32) -> list[Answer]:
        """Answer questions from the text beside each.

        Args:
            tokenizer: the one the model was trained with.
            pairs: ``(question, text)``.
            batch_size: windows at once.

        Raises:
            DataError: for an empty question or text, naming its place.
        """
        encoding = TextEncoding(tokenizer, self.context)
        read = [windows(question, text, encoding, f"pair {i}") for i, (question, text) in enumerate(pairs)]
        flat = [window for each in read for window in each]
        samples = [{"tokens": window.tokens, "readable": window.readable} for window in flat]

        def run(batch: dict[str, Tensor]) -> list[tuple[float, int, int]]:
            scores = self(**batch)
            return self.best_spans(scores.first.float().log_softmax(-1), scores.last.float().log_softmax(-1))

        found = iter(in_batches(self, samples, self.PORTS, run, batch_size=batch_size))
        return [_best([(next(found), window) for window in each], text) for each, (_, text) in zip(read, pairs)]

    def best_spans(self, first_BT: Tensor, last_BT: Tensor) -> list[tuple[float, int, int]]:
        """Score, beginning and end of the best span of each row that is in order and no longer than allowed."""
        length = first_BT.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool, device=first_BT.device).triu()
        allowed = allowed & ~allowed.triu(self.max_tokens)
        both_BTS = (first_BT[:, :, None] + last_BT[:, None, :]).masked_fill(~allowed, -torch.inf)
        score_B, at_B = both_BTS.flatten(1).max(-1)
        return [(s, a // length, a % length) for s, a in zip(score_B.tolist(), at_B.tolist())]

    def score_texts(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Exact match and F1 of words of whole answers, as SQuAD counts them."""
        answers = self.answer(tokenizer, [(r["question"], r["context"]) for r in records])
        real = [[a["text"] for a in r["answers"]] for r in records]
        return {
            "exact_match": sum(exact_match(a.text, known) for a, known in zip(answers, real)) / len(records),
            "word_f1": sum(word_f1(a.text, known) for a, known in zip(answers, real)) / len(records),
        }

    def predict(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answers for records with a ``question`` and a ``context``."""
        return [asdict(a) for a in self.answer(tokenizer, [(r["question"], r["context"]) for r in records])]


def _best(found: Sequence[tuple[tuple[float, int, int], Window]], text: str) -> Answer:
    (score, first, last), window = max(found, key=lambda each: each[0][0])
    begin, end = window.spans[first], window.spans[last]
    if begin is None or end is None:  # nothing is readable
        return Answer("", 0, score)
    return Answer(text[begin.start : end.end], begin.start, score)


class AnswerLoss(NeuralModule):
    """Cross-entropy of the first and of the last token of an answer, summed and counted by answers (final).

    Shape: first_BT, last_BT, starts_B, ends_B -> scalar, scalar.
    """

    def forward(self, first: LogitsBT, last: LogitsBT, starts: PlacesB, ends: PlacesB) -> TokenLoss:
        loss = F.cross_entropy(first.float(), starts, reduction="sum", ignore_index=IGNORED) + F.cross_entropy(
            last.float(), ends, reduction="sum", ignore_index=IGNORED
        )
        return TokenLoss(loss / 2, starts.ne(IGNORED).sum())


class ExactSpan(NeuralModule):
    """How many answers begin and end at the right tokens (final).

    Shape: first_BT, last_BT, starts_B, ends_B -> scalar, scalar.
    """

    def forward(self, first: LogitsBT, last: LogitsBT, starts: PlacesB, ends: PlacesB) -> Share:
        right = (first.argmax(-1) == starts) & (last.argmax(-1) == ends)
        return Share(right.sum(), starts.ne(IGNORED).sum())
