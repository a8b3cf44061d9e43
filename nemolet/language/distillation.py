"""Knowledge distillation: a small model learns what a large one thinks, not only what it says."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.errors import ConfigError
from nemolet.language.losses import TokenLoss
from nemolet.metrics import Share
from nemolet.module import NeuralModule
from nemolet.types import IGNORED, LabelsBT, LogitsBTV, PositionsBT, SegmentsBT, TokenIdsBT


class Taught(NamedTuple):
    """Scores of the student and of its teacher."""

    student: LogitsBTV
    teacher: LogitsBTV


class Distilled(NeuralModule):
    """A student beside a frozen teacher that reads the same (final).

    Args:
        student: is trained; from tokens to logits.
        teacher: of the same vocabulary.

    Shape: tokens_BT -> student_BTV, teacher_BTV.

    Raises:
        ConfigError: for another vocabulary.
    """

    def __init__(self, *, student: NeuralModule, teacher: NeuralModule) -> None:
        sizes = [getattr(model, "vocab_size", None) for model in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                "student and teacher have different vocabularies",
                where="teacher",
                expected=f"{sizes[0]} tokens",
                found=sizes[1],
                fix="distil from a model with the tokenizer of the student",
            )
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False).eval()

    def forward(
        self, tokens: TokenIdsBT, segments: SegmentsBT | None = None, positions: PositionsBT | None = None
    ) -> Taught:
        packing: dict[str, Tensor | None] = {} if segments is None else {"segments": segments, "positions": positions}
        with torch.no_grad():
            teacher_BTV = self.teacher.eval()(tokens=tokens, **packing)
        return Taught(self.student(tokens=tokens, **packing), teacher_BTV)

    def objective(self) -> NeuralModule:
        """The teacher's opinion and the text, half and half."""
        return DistillationLoss()

    def measures(self) -> dict[str, NeuralModule]:
        """How often student and teacher would say the same."""
        return {"agreement": Agreement()}


class DistillationLoss(NeuralModule):
    """Divergence from the teacher (Hinton et al., 2015) and cross-entropy of the text, summed over tokens (final).

    Args:
        temperature: at which opinions are compared.
        share: of the teacher in the loss; the rest is the text's.

    Shape: student_BTV, teacher_BTV, labels_BT -> scalar, scalar.

    Example:
        >>> logits = torch.eye(3)[None]
        >>> loss, count = DistillationLoss(share=1.0)(logits, logits, torch.tensor([[0, 1, -100]]))
        >>> round(loss.item(), 4), count.item()
        (0.0, 2)
    """

    CONFIG_RULES: ClassVar = (
        ("temperature > 0", "the temperature is above 0"),
        ("share >= 0 and share <= 1", "the share of the teacher is between 0 and 1"),
    )

    def __init__(self, *, temperature: float = 2.0, share: float = 0.5) -> None:
        super().__init__()
        self.temperature, self.share = temperature, share

    def forward(self, student: LogitsBTV, teacher: LogitsBTV, labels: LabelsBT) -> TokenLoss:
        counted = labels != IGNORED
        own_NV, real_NV = student[counted].float(), teacher[counted].float()
        divergence = F.kl_div(
            (own_NV / self.temperature).log_softmax(-1),
            (real_NV / self.temperature).log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
        said = F.cross_entropy(own_NV, labels[counted], reduction="sum")
        loss = self.share * self.temperature**2 * divergence + (1 - self.share) * said
        return TokenLoss(loss, counted.sum())


class Agreement(NeuralModule):
    """How often student and teacher find the same token likeliest (final).

    Shape: student_BTV, teacher_BTV, labels_BT -> scalar, scalar.
    """

    def forward(self, student: LogitsBTV, teacher: LogitsBTV, labels: LabelsBT) -> Share:
        counted = labels != IGNORED
        return Share(((student.argmax(-1) == teacher.argmax(-1)) & counted).sum(), counted.sum())
