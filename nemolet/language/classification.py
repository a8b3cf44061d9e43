"""Text classification: one label, or any number of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.data.encoding import LongText, TextEncoding, as_list
from nemolet.data.ports import HiddenBD, LabelsBV
from nemolet.language.losses import TokenLoss
from nemolet.language.tasks import fields_of, in_windows, label_scores, width_of
from nemolet.metrics import Accuracy, Share
from nemolet.module import NeuralModule
from nemolet.nn.feed_forward import ACTIVATIONS, ActivationName
from nemolet.nn.linear import Linear
from nemolet.nn.norm import make_norm
from nemolet.tokenizers import Tokenizer
from nemolet.types import IGNORED, HiddenBTD, HiddenRestD, LabelsB, LogitsBV, MaskBT, TokenIdsBT

Pooling = Literal["mean", "max", "first"]


class Pool(NeuralModule):
    """One vector for a text: the mean or the maximum over its tokens, or its first token (final).

    Shape: hidden_BTD, mask_BT -> hidden_BD.

    Example:
        >>> Pool()(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]]))
        tensor([[2.]])
    """

    def __init__(self, *, how: Pooling = "mean") -> None:
        super().__init__()
        self.how = how

    def forward(self, hidden: HiddenBTD, mask: MaskBT | None = None) -> HiddenBD:
        if self.how == "first":
            return hidden[:, 0]
        if mask is None:
            return hidden.mean(1) if self.how == "mean" else hidden.amax(1)
        if self.how == "max":
            return hidden.masked_fill(~mask[..., None], torch.finfo(hidden.dtype).min).amax(1)
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class Transform(NeuralModule):
    """One more layer before a decision, as wide as what it reads (final).

    Args:
        width: of the hidden states.
        activation: after the linear layer.
        norm: whether a norm follows; neither it nor the linear layer has a bias then (ModernBERT).

    Shape: [..., D] -> [..., D].

    Example:
        >>> Transform(width=4, activation="tanh")(torch.zeros(2, 4)).shape
        torch.Size([2, 4])
        >>> [name for name, _ in Transform(width=4, activation="gelu", norm=True).named_parameters()]
        ['dense.weight', 'norm.weight']
    """

    def __init__(self, *, width: int, activation: ActivationName, norm: bool = False) -> None:
        super().__init__(D=width)
        self.activate = ACTIVATIONS[activation]
        self.dense = Linear("D", "D", width, width, bias=not norm, init_std=0.02)
        self.norm = make_norm("layer", "D", width, eps=1e-5, bias=False) if norm else None

    def forward(self, hidden: HiddenRestD) -> HiddenRestD:
        changed: Tensor = self.activate(self.dense(hidden))
        return changed if self.norm is None else self.norm(changed)


@dataclass(frozen=True)
class Classified:
    """What a text was classified as."""

    labels: tuple[str, ...]  # the likeliest one, or all above the threshold
    scores: dict[str, float] = field(repr=False)

    @property
    def label(self) -> str:
        """The likeliest label."""
        return next(iter(self.scores))


class TextClassifier(NeuralModule):
    """Put texts into classes: any encoder, a pool, a linear layer (final).

    Args:
        encoder: from tokens (and a mask) to hidden states.
        labels: names of the classes; in a config they come from the data.
        context: longest text in tokens.
        pooling: how hidden states become one vector.
        multi_label: whether a text may have any number of labels.
        dropout: before the linear layer, in training.
        transform: activation of one more layer before the classes, as the classifiers of transformers have it (BERT:
            ``tanh``, with ``pooling="first"``); None for no such layer.
        transform_norm: whether a norm follows it (ModernBERT).

    Its attribute ``too_long`` says what happens to longer ones: an ``error``, ``truncate`` to their beginning, or
    ``window`` for the mean of the probabilities of parts that overlap by half.

    Shape: tokens_BT, mask_BT -> logits_BV.

    Example:
        >>> from nemolet.language import NgramEncoder
        >>> from nemolet.tokenizers import ByteTokenizer
        >>> encoder = NgramEncoder(vocab_size=257, width=8, buckets=16)
        >>> model = TextClassifier(encoder=encoder, labels=["yes", "no"])
        >>> model.classify(ByteTokenizer(), ["indeed"])[0].label in ("yes", "no")
        True
    """

    CONFIG_RULES: ClassVar = (("dropout >= 0 and dropout < 1", "dropout is a probability below 1"),)
    READS: ClassVar = (("text",),)
    PORTS: ClassVar = {"tokens": TokenIdsBT, "mask": MaskBT}
    too_long: LongText = "error"

    def __init__(
        self,
        *,
        encoder: NeuralModule,
        labels: Sequence[str],
        context: int = 256,
        pooling: Pooling = "mean",
        multi_label: bool = False,
        dropout: float = 0.1,
        transform: ActivationName | None = None,
        transform_norm: bool = False,
    ) -> None:
        width = width_of(encoder)
        super().__init__(V=len(labels), D=width)
        self.labels, self.context, self.multi_label, self.dropout = tuple(labels), context, multi_label, dropout
        self.encoder, self.pool = encoder, Pool(how=pooling)
        self.transform = Transform(width=width, activation=transform, norm=transform_norm) if transform else None
        self.head = Linear("D", "V", width, len(labels), bias=True, init_std=0.02)

    def forward(self, tokens: TokenIdsBT, mask: MaskBT | None = None) -> LogitsBV:
        return self.scores(self.encoder(tokens=tokens, mask=mask), mask)

    def scores(self, hidden_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Logits from hidden states; apart, so that one can look at what they depend on."""
        pooled_BD = self.pool(hidden_BTD, mask_BT)
        if self.transform is not None:
            pooled_BD = self.transform(pooled_BD)
        pooled_BD = F.dropout(pooled_BD, self.dropout, self.training)
        logits_BV: Tensor = self.head(pooled_BD)
        return logits_BV

    def objective(self) -> NeuralModule:
        """Cross-entropy over the classes, or over each label for itself."""
        return MultiLabelLoss() if self.multi_label else ClassLoss()

    def measures(self) -> dict[str, NeuralModule]:
        """Accuracy, or F1 over all labels."""
        return {"label_f1": LabelF1()} if self.multi_label else {"accuracy": Accuracy()}

    def classify(
        self, tokenizer: Tokenizer, texts: Sequence[str], *, threshold: float = 0.5, batch_size: int = 64
    ) -> list[Classified]:
        """Classify raw texts.

        Args:
            tokenizer: the one the model was trained with.
            texts: none of them empty.
            threshold: probability from which a label counts, where there may be several.
            batch_size: texts at once.

        Raises:
            DataError: for an empty text, or one that is too long, naming its place.
        """
        encoding = TextEncoding(tokenizer, self.context, self.too_long)
        samples = [
            [{"tokens": ids} for ids in encoding.parts(text, f"text {i}")]
            for i, text in enumerate(as_list(texts, "texts"))
        ]

        def run(batch: dict[str, Tensor]) -> list[Tensor]:
            logits_BV = self(**batch).float()
            return list((logits_BV.sigmoid() if self.multi_label else logits_BV.softmax(-1)).cpu())

        found = in_windows(self, samples, self.PORTS, run, batch_size=batch_size)
        means = [torch.stack(probs).mean(0) for probs in found]
        return [self._classified(label_scores(probs_V, self.labels), threshold) for probs_V in means]

    def predict(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Labels and scores for records with a ``text``."""
        found = self.classify(tokenizer, fields_of(records, "text"))
        return [asdict(each) if self.multi_label else {"label": each.label, "scores": each.scores} for each in found]

    def _classified(self, scores: dict[str, float], threshold: float) -> Classified:
        above = tuple(label for label, score in scores.items() if score >= threshold)
        return Classified(above if self.multi_label else (next(iter(scores)),), scores)


class ClassLoss(NeuralModule):
    """Cross-entropy of classes, summed over the texts that have one (final).

    Args:
        label_smoothing: share of probability spread over all classes.

    Shape: logits_BV, labels_B -> scalar, scalar.

    Example:
        >>> loss, count = ClassLoss()(torch.zeros(2, 4), torch.tensor([1, -100]))
        >>> round(loss.item(), 4), count.item()
        (1.3863, 1)
    """

    CONFIG_RULES: ClassVar = (("label_smoothing >= 0 and label_smoothing < 1", "label smoothing is a share below 1"),)

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: LogitsBV, labels: LabelsB) -> TokenLoss:
        loss = F.cross_entropy(
            logits.float(), labels, reduction="sum", ignore_index=IGNORED, label_smoothing=self.label_smoothing
        )
        return TokenLoss(loss, labels.ne(IGNORED).sum())


class MultiLabelLoss(NeuralModule):
    """Binary cross-entropy of each label for itself, summed (final).

    Shape: logits_BV, labels_BV -> scalar, scalar; labels are 0 or 1.

    Example:
        >>> loss, count = MultiLabelLoss()(torch.zeros(1, 2), torch.tensor([[1, 0]]))
        >>> round(loss.item(), 4), count.item()
        (1.3863, 2)
    """

    def forward(self, logits: LogitsBV, labels: LabelsBV) -> TokenLoss:
        known = labels != IGNORED
        loss = F.binary_cross_entropy_with_logits(
            logits.float(), labels.clamp(min=0).float(), weight=known.float(), reduction="sum"
        )
        return TokenLoss(loss, known.sum())


class LabelF1(NeuralModule):
    """F1 over all labels of all texts (micro average), where a text may have several (final).

    Shape: logits_BV, labels_BV -> scalar, scalar.

    Example:
        >>> LabelF1()(torch.tensor([[1.0, 1.0]]), torch.tensor([[1, 0]]))
        Share(part=tensor(2), whole=tensor(3))
    """

    def forward(self, logits: LogitsBV, labels: LabelsBV) -> Share:
        known, said, real = labels != IGNORED, logits > 0, labels == 1
        return Share(2 * (said & real).sum(), (said & known).sum() + real.sum())
