"""Tags for words: named entities and the like, alone or together with the intent of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.data.encoding import LongText, TextEncoding, as_list
from nemolet.data.ports import ClassesB, LabelsBU, LogitsBP, LogitsBUV, LogitsPV, WordsBU
from nemolet.data.schemes import SchemeName, scheme_for
from nemolet.language.classification import Pool, Transform
from nemolet.language.crf import chain_log_likelihood, forbidden_transitions
from nemolet.language.losses import TokenLoss
from nemolet.language.spans import SpanF1, TagSpan, decode_tags, spans_of
from nemolet.language.tasks import fields_of, in_windows, width_of
from nemolet.metrics import Share
from nemolet.module import NeuralModule
from nemolet.nn.feed_forward import ActivationName
from nemolet.nn.linear import Linear
from nemolet.tokenizers import Tokenizer
from nemolet.types import IGNORED, HiddenBTD, MaskBT, TokenIdsBT


class TagScores(NamedTuple):
    """Scores of tags for each word, and of tags after one another where they form a chain."""

    logits: LogitsBUV
    transitions: LogitsPV | None


class RequestScores(NamedTuple):
    """Scores of tags for each word, and of intents for the whole."""

    logits: LogitsBUV
    transitions: LogitsPV | None
    intents: LogitsBP


@dataclass(frozen=True)
class Tagged:
    """A sentence with a tag for each word."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    intent: str | None = None

    @property
    def spans(self) -> list[TagSpan]:
        """What the tags describe."""
        return spans_of(self.tags)

    def plain(self) -> dict[str, Any]:
        """As data for a file."""
        spans = [{"label": s.label, "text": " ".join(self.words[s.start : s.end])} for s in self.spans]
        intent = {} if self.intent is None else {"intent": self.intent}
        return {**intent, "words": list(self.words), "tags": list(self.tags), "spans": spans}


class TagHead(NeuralModule):
    """Scores of tags at the first token of each word, with transitions between them if asked (final).

    Args:
        width: of the hidden states.
        labels: the tags.
        crf: whether the tags of a sentence form a chain; each then only follows what it may in its scheme.
        dropout: in training.
        transform: activation of one more layer before the tags (ModernBERT); None for no such layer.
        transform_norm: whether a norm follows it.
        scheme: of the tags; None for the usual one with their marks.

    Shape: hidden_BTD, words_BU -> logits_BUV, transitions_PV; weight ``V D``, steps ``(V + 2) V``.
    """

    def __init__(
        self,
        *,
        width: int,
        labels: Sequence[str],
        crf: bool = False,
        dropout: float = 0.1,
        transform: ActivationName | None = None,
        transform_norm: bool = False,
        scheme: SchemeName | None = None,
    ) -> None:
        super().__init__(D=width, V=len(labels), P=len(labels) + 2)
        self.labels, self.dropout = tuple(labels), dropout
        self.transform = Transform(width=width, activation=transform, norm=transform_norm) if transform else None
        self.head = Linear("D", "V", width, len(labels), bias=True, init_std=0.02)
        self.steps = nn.Parameter(torch.zeros(len(labels) + 2, len(labels))) if crf else None
        self.declare_axes(steps="P V")
        self.never: Tensor
        self.register_buffer("never", forbidden_transitions(labels, scheme_for(labels, scheme)), persistent=False)

    def forward(self, hidden: HiddenBTD, words: WordsBU) -> TagScores:
        firsts = hidden.gather(1, words[..., None].expand(-1, -1, hidden.shape[-1]))
        if self.transform is not None:
            firsts = self.transform(firsts)
        logits = self.head(F.dropout(firsts, self.dropout, self.training))
        return TagScores(logits, None if self.steps is None else self.steps + self.never)


class TokenClassifier(NeuralModule):
    """Tag the words of a sentence: any encoder and a tag head (final).

    Args:
        encoder: from tokens (and a mask) to hidden states.
        labels: the tags, such as ``O B-x I-x``; in a config they come from the data.
        context: longest sentence in tokens.
        crf: whether the tags form a chain.
        dropout: before the linear layer, in training.
        transform: activation of one more layer before the tags, as ModernBERT has it; None for no such layer.
        transform_norm: whether a norm follows it.
        scheme: of the tags, as for :class:`TagHead`; in a config it comes from the data.

    Shape: tokens_BT, words_BU, mask_BT -> logits_BUV, transitions_PV.

    Example:
        >>> from nemolet.language import NgramEncoder
        >>> from nemolet.tokenizers import ByteTokenizer
        >>> encoder = NgramEncoder(vocab_size=257, width=8, buckets=16)
        >>> model = TokenClassifier(encoder=encoder, labels=["O", "B-x", "I-x"], crf=True)
        >>> len(model.tag(ByteTokenizer(), [["two", "words"]])[0].tags)
        2
    """

    CONFIG_RULES: ClassVar = (("dropout >= 0 and dropout < 1", "dropout is a probability below 1"),)
    READS: ClassVar = (("words",), ("text",))
    too_long: LongText = "error"
    PORTS: ClassVar = {"tokens": TokenIdsBT, "mask": MaskBT, "words": WordsBU}

    def __init__(
        self,
        *,
        encoder: NeuralModule,
        labels: Sequence[str],
        context: int = 256,
        crf: bool = False,
        dropout: float = 0.1,
        transform: ActivationName | None = None,
        transform_norm: bool = False,
        scheme: SchemeName | None = None,
    ) -> None:
        width = width_of(encoder)
        super().__init__(V=len(labels), D=width, P=len(labels) + 2)
        self.labels, self.context = tuple(labels), context
        self.encoder = encoder
        self.head = TagHead(
            width=width,
            labels=labels,
            crf=crf,
            dropout=dropout,
            transform=transform,
            transform_norm=transform_norm,
            scheme=scheme,
        )

    def forward(self, tokens: TokenIdsBT, words: WordsBU, mask: MaskBT | None = None) -> TagScores:
        scores: TagScores = self.head(self.encoder(tokens=tokens, mask=mask), words)
        return scores

    def objective(self) -> NeuralModule:
        """The likelihood of tags, or of chains of them."""
        return TagLoss()

    def measures(self) -> dict[str, NeuralModule]:
        """F1 of spans."""
        return {"span_f1": SpanF1(labels=self.labels)}

    def tag(self, tokenizer: Tokenizer, sentences: Sequence[Sequence[str]], *, batch_size: int = 64) -> list[Tagged]:
        """Tag sentences that are split into words.

        The attribute ``too_long`` says what happens to a sentence beyond the context: an ``error``, ``truncate`` to its
        beginning, or ``window`` for parts that overlap by half. A word that is not read, or has no token, is tagged
        ``O``, or with the first label where there is no ``O``.

        Raises:
            DataError: for an empty sentence, or one that is too long, naming its place.
        """
        return _tag(self, tokenizer, sentences, batch_size)

    def predict(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Tags and spans for records with ``words``, or a ``text`` with spaces between them."""
        return [each.plain() for each in self.tag(tokenizer, _sentences(records))]


class RequestTagger(NeuralModule):
    """The intent of a request and the slots in it, from one encoder (final).

    Args:
        encoder: from tokens (and a mask) to hidden states.
        intents: names of the intents; in a config they come from the data.
        slots: the tags, such as ``O B-x I-x``; likewise.
        context: longest request in tokens.
        crf: whether the tags form a chain.
        dropout: before the linear layers, in training.
        scheme: of the tags, as for :class:`TagHead`; likewise.

    Shape: tokens_BT, words_BU, mask_BT -> logits_BUV, transitions_PV, intents_BP.
    """

    CONFIG_RULES: ClassVar = (("dropout >= 0 and dropout < 1", "dropout is a probability below 1"),)
    READS: ClassVar = TokenClassifier.READS
    too_long: LongText = "error"
    PORTS: ClassVar = TokenClassifier.PORTS

    def __init__(
        self,
        *,
        encoder: NeuralModule,
        intents: Sequence[str],
        slots: Sequence[str],
        context: int = 256,
        crf: bool = False,
        dropout: float = 0.1,
        scheme: SchemeName | None = None,
    ) -> None:
        width = width_of(encoder)
        super().__init__(D=width)
        self.intents, self.slots, self.context, self.dropout = tuple(intents), tuple(slots), context, dropout
        self.encoder, self.pool = encoder, Pool()
        self.head = TagHead(width=width, labels=slots, crf=crf, dropout=dropout, scheme=scheme)
        self.intent_head = Linear("D", "P", width, len(intents), bias=True, init_std=0.02)

    def forward(self, tokens: TokenIdsBT, words: WordsBU, mask: MaskBT | None = None) -> RequestScores:
        hidden = self.encoder(tokens=tokens, mask=mask)
        pooled = F.dropout(self.pool(hidden, mask), self.dropout, self.training)
        scores: TagScores = self.head(hidden, words)
        return RequestScores(scores.logits, scores.transitions, self.intent_head(pooled))

    @property
    def labels(self) -> tuple[str, ...]:
        """The tags."""
        return self.slots

    def objective(self) -> NeuralModule:
        """Both likelihoods."""
        return RequestLoss()

    def measures(self) -> dict[str, NeuralModule]:
        """Accuracy of intents and F1 of slots."""
        return {"intent_accuracy": IntentAccuracy(), "slot_f1": SpanF1(labels=self.slots)}

    def tag(self, tokenizer: Tokenizer, sentences: Sequence[Sequence[str]], *, batch_size: int = 64) -> list[Tagged]:
        """Intents and tags of requests that are split into words; see :meth:`TokenClassifier.tag`."""
        return _tag(self, tokenizer, sentences, batch_size)

    def predict(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Intent, tags and spans for records with ``words``, or a ``text`` with spaces between them."""
        return [each.plain() for each in self.tag(tokenizer, _sentences(records))]


class TagLoss(NeuralModule):
    """Cross-entropy of tags, or minus the log-likelihood of chains where there are transitions (final).

    Both are summed and counted by words.

    Shape: logits_BUV, labels_BU, transitions_PV -> scalar, scalar.

    Example:
        >>> loss, count = TagLoss()(torch.zeros(1, 2, 4), torch.tensor([[1, -100]]))
        >>> round(loss.item(), 4), count.item()
        (1.3863, 1)
    """

    def forward(self, logits: LogitsBUV, labels: LabelsBU, transitions: LogitsPV | None = None) -> TokenLoss:
        if transitions is None:
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=IGNORED
            )
        else:
            loss = -chain_log_likelihood(logits.float(), transitions.float(), labels).sum()
        return TokenLoss(loss, labels.ne(IGNORED).sum())


class RequestLoss(NeuralModule):
    """The loss of tags, and beside it the cross-entropy of intents (final).

    Args:
        intent_weight: how many words an intent counts for.

    Shape: logits_BUV, labels_BU, intents_BP, classes_B, transitions_PV -> scalar, scalar.
    """

    def __init__(self, *, intent_weight: float = 2.0) -> None:
        super().__init__()
        self.intent_weight, self.tags = intent_weight, TagLoss()

    def forward(
        self,
        logits: LogitsBUV,
        labels: LabelsBU,
        intents: LogitsBP,
        classes: ClassesB,
        transitions: LogitsPV | None = None,
    ) -> TokenLoss:
        loss, count = self.tags(logits, labels, transitions)
        intent = F.cross_entropy(intents.float(), classes, reduction="sum", ignore_index=IGNORED)
        return TokenLoss(loss + self.intent_weight * intent, count)


class IntentAccuracy(NeuralModule):
    """How many requests have the right intent (final).

    Shape: intents_BP, classes_B -> scalar, scalar.

    Example:
        >>> IntentAccuracy()(torch.eye(2), torch.tensor([0, 0]))
        Share(part=tensor(1), whole=tensor(2))
    """

    def forward(self, intents: LogitsBP, classes: ClassesB) -> Share:
        return Share((intents.argmax(-1) == classes).sum(), classes.ne(IGNORED).sum())


def _sentences(records: Sequence[Mapping[str, Any]]) -> list[Sequence[str]]:
    read = enumerate(fields_of(records, "words", "text"))
    return [each.split() if isinstance(each, str) else as_list(each, f"record {number}") for number, each in read]


def _tag(
    model: TokenClassifier | RequestTagger, tokenizer: Tokenizer, sentences: Sequence[Sequence[str]], batch_size: int
) -> list[Tagged]:
    encoding = TextEncoding(tokenizer, model.context, model.too_long)
    read = [encoding.word_parts(words, f"sentence {i}") for i, words in enumerate(as_list(sentences, "sentences"))]
    samples = [[{"tokens": part.ids, "words": part.firsts} for part in parts] for parts in read]

    def run(batch: dict[str, Tensor]) -> list[tuple[list[int], Tensor | None]]:
        scores = model(**batch)
        lengths = (batch["words"] > 0).sum(1) + (batch["words"][:, 0] == 0)  # padding points at the first token
        tags = decode_tags(scores.logits, scores.transitions, lengths).tolist()
        intents = scores.intents.float().softmax(-1).cpu() if isinstance(model, RequestTagger) else [None] * len(tags)
        return list(zip(tags, intents))

    results = in_windows(model, samples, model.PORTS, run, batch_size=batch_size)
    outside = "O" if "O" in model.labels else model.labels[0]
    made = []
    for words, parts, found in zip(sentences, read, results):
        tags, overlap = [outside] * len(words), 0
        for part, (row, _) in zip(parts, found):
            for number, tag in zip(part.numbers, row):
                if 2 * number >= part.numbers[0] + overlap:  # each half of an overlap is tagged where it has neighbours
                    tags[number] = model.labels[tag]
            overlap = part.stop
        intents = [each for _, each in found if each is not None]
        intent = model.intents[int(torch.stack(intents).mean(0).argmax())] if isinstance(model, RequestTagger) else None
        made.append(Tagged(tuple(words), tuple(tags), intent))
    return made
