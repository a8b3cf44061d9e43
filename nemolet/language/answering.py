"""Extractive question answering: which piece of a text answers a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.data.encoding import TextEncoding, as_list, as_text
from nemolet.data.labelled import NO_ANSWER, Window, windows
from nemolet.data.ports import LogitsBT, PlacesB
from nemolet.errors import ConfigError, DataError
from nemolet.language.classification import Transform
from nemolet.language.losses import TokenLoss
from nemolet.language.scores import exact_match, word_f1
from nemolet.language.tasks import fields_of, in_windows, width_of
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
    """A piece of the text, where it begins, and its probability, summed over windows and places.

    The empty text says that there is no answer.
    """

    text: str
    start: int
    score: float


class Ends(NamedTuple):
    """First and last token of a span in a window, and the probability of both."""

    first: int
    last: int
    score: float


class Found(NamedTuple):
    """What a window holds: the likeliest spans, and how likely there is no answer in it."""

    spans: list[Ends]
    nothing: float


class QuestionAnswerer(NeuralModule):
    """Find the answer to a question in a text: any encoder, and two scores per token (final).

    A text is read in windows, whose first token stands for no answer in this window: probabilities of a window are
    shared out among that and its spans, so those of several windows compare.

    Args:
        encoder: from tokens (and a mask) to hidden states.
        context: longest question and text together, in tokens; longer texts are read in windows.
        max_tokens: longest answer.
        dropout: before the linear layer, in training.
        transform: activation of one more layer before the scores, as ModernBERT has it; None for no such layer.
        transform_norm: whether a norm follows it.
        unanswerable: whether a question may have no answer at all, as in SQuAD 2.

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
        unanswerable: bool = False,
    ) -> None:
        width = width_of(encoder)
        super().__init__(D=width)
        self.context, self.max_tokens, self.dropout, self.unanswerable = context, max_tokens, dropout, unanswerable
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
        may_be = readable.clone()
        may_be[:, NO_ANSWER] = True
        scores = self.head(hidden).masked_fill(~may_be[..., None], torch.finfo(hidden.dtype).min)
        return AnswerScores(scores[..., 0], scores[..., 1])

    def objective(self) -> NeuralModule:
        """Cross-entropy of both ends."""
        return AnswerLoss()

    def measures(self) -> dict[str, NeuralModule]:
        """How many answers are exactly right."""
        return {"exact": ExactSpan()}

    def answer(self, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, batch_size: int = 32) -> list[Answer]:
        """The best answer to each question; see :meth:`answers`."""
        return [found[0] for found in self.answers(tokenizer, pairs, top=1, batch_size=batch_size)]

    def answers(
        self, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, top: int = 5, batch_size: int = 32
    ) -> list[list[Answer]]:
        """The likeliest answers to questions from the text beside each.

        The same words found in several windows or places are one answer, whose probabilities add up. That there is no
        answer is as likely as in the window where it is least so.

        Args:
            tokenizer: the one the model was trained with.
            pairs: ``(question, text)``.
            top: how many.
            batch_size: windows at once.

        Raises:
            DataError: for an empty question or text, naming its place.
        """
        if top < 1:
            raise ConfigError("nothing is asked for", where="top", expected="at least 1", found=top)
        asked = [_pair(pair, f"pair {i}") for i, pair in enumerate(as_list(pairs, "pairs"))]
        encoding = TextEncoding(tokenizer, self.context)
        read = [windows(question, text, encoding, f"pair {i}") for i, (question, text) in enumerate(asked)]
        samples = [[{"tokens": window.tokens, "readable": window.readable} for window in each] for each in read]

        def run(batch: dict[str, Tensor]) -> list[Found]:
            scores = self(**batch)
            first, last = scores.first.float().softmax(-1), scores.last.float().softmax(-1)
            return self.likeliest(first, last, batch["readable"], top=2 * top + 10)  # some of them are the same words

        found = in_windows(self, samples, self.PORTS, run, batch_size=batch_size)
        return [self._merged(list(zip(*each)), text)[:top] for *each, (_, text) in zip(read, found, asked)]

    def likeliest(self, first_BT: Tensor, last_BT: Tensor, readable_BT: Tensor, *, top: int = 1) -> list[Found]:
        """The likeliest spans of each row that are readable, in order and no longer than allowed.

        Args:
            first_BT: probability that the answer begins here.
            last_BT: probability that it ends here.
            readable_BT: where it may lie.
            top: how many spans.
        """
        length = first_BT.shape[1]
        in_order = torch.ones(length, length, dtype=torch.bool, device=first_BT.device).triu()
        in_order = in_order & ~in_order.triu(self.max_tokens)
        allowed_BTS = in_order & readable_BT[:, :, None] & readable_BT[:, None, :]
        both_BTS = (first_BT[:, :, None] * last_BT[:, None, :]).masked_fill(~allowed_BTS, -1)
        scores_BP, at_BP = both_BTS.flatten(1).topk(min(top, length * length), dim=-1)
        nothing_B = first_BT[:, NO_ANSWER] * last_BT[:, NO_ANSWER]
        rows = zip(scores_BP.tolist(), at_BP.tolist(), nothing_B.tolist())
        return [
            Found([Ends(at // length, at % length, score) for at, score in zip(places, scores) if score >= 0], nothing)
            for scores, places, nothing in rows
        ]

    def _merged(self, found: Sequence[tuple[Window, Found]], text: str) -> list[Answer]:
        """Answers of all windows of one text, the likeliest first."""
        merged: dict[str, Answer] = {}
        for window, (spans, _) in found:
            for first, last, score in spans:
                begin, end = window.spans[first], window.spans[last]
                assert begin is not None and end is not None  # readable tokens are those of words
                said = text[begin.start : end.end]
                known = merged.get(said.lower(), Answer(said, begin.start, 0.0))
                merged[said.lower()] = replace(known, score=known.score + score)
        nothing = Answer("", 0, min(each.nothing for _, each in found))
        there_may_be_none = self.unanswerable or not merged
        return sorted([*merged.values(), *[nothing] * there_may_be_none], key=lambda answer: -answer.score)

    def score_texts(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Exact match and F1 of words of whole answers, as SQuAD counts them."""
        answers = self.answer(tokenizer, _pairs_of(records))
        real = [[a["text"] for a in r["answers"]] or [""] for r in records]  # the empty text where there is none
        return {
            "exact_match": sum(exact_match(a.text, known) for a, known in zip(answers, real)) / len(records),
            "word_f1": sum(word_f1(a.text, known) for a, known in zip(answers, real)) / len(records),
        }

    def predict(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answers for records with a ``question`` and a ``context``."""
        return [asdict(a) for a in self.answer(tokenizer, _pairs_of(records))]


def _pairs_of(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return list(zip(fields_of(records, "question"), fields_of(records, "context")))


def _pair(value: Any, where: str) -> tuple[str, str]:
    parts = as_list(value, where)
    if len(parts) != 2:
        raise DataError("this is no pair", where=where, expected="a question and a text", found=f"{len(parts)} values")
    return as_text(parts[0], where), as_text(parts[1], where)


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
    """How many windows have their answer, or none, at the right tokens (final).

    Shape: first_BT, last_BT, starts_B, ends_B -> scalar, scalar.
    """

    def forward(self, first: LogitsBT, last: LogitsBT, starts: PlacesB, ends: PlacesB) -> Share:
        right = (first.argmax(-1) == starts) & (last.argmax(-1) == ends)
        return Share(right.sum(), starts.ne(IGNORED).sum())
