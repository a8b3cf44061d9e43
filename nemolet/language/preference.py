"""Learning from preferences: of two answers the better one becomes likelier, without a reward model."""

from __future__ import annotations

import copy
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.data.ports import LabelsBS, ScoresB
from nemolet.language.losses import TokenLoss
from nemolet.language.tasks import evaluating
from nemolet.metrics import Share
from nemolet.module import NeuralModule
from nemolet.nn.adapters import adapted_layers, stop_dropout, without_additions
from nemolet.types import IGNORED, LabelsBT, TokenIdsBS, TokenIdsBT


class Preferred(NamedTuple):
    """How much likelier the model makes each answer than its reference does, in nats."""

    chosen: ScoresB
    rejected: ScoresB


class PreferenceModel(NeuralModule):
    """A language model beside what it was before (final).

    Where additions are trained (:func:`nemolet.nn.adapt`), that is the same model without them; else a frozen copy.
    Neither drops anything: the noise would be a part of every difference.

    Args:
        policy: the model that is trained, from tokens to logits; its dropout is switched off.

    Shape: tokens_BT, labels_BT, rejected_tokens_BS, rejected_labels_BS -> chosen_B, rejected_B.
    """

    def __init__(self, *, policy: NeuralModule) -> None:
        super().__init__()
        stop_dropout(policy)
        self.policy = policy
        adapted = next(adapted_layers(policy), None) is not None
        self.reference = None if adapted else copy.deepcopy(policy).requires_grad_(False).eval()

    def forward(
        self, tokens: TokenIdsBT, labels: LabelsBT, rejected_tokens: TokenIdsBS, rejected_labels: LabelsBS
    ) -> Preferred:
        return Preferred(self._gain(tokens, labels), self._gain(rejected_tokens, rejected_labels))

    def _gain(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        reference = self.policy if self.reference is None else self.reference
        with evaluating(reference), without_additions(reference):
            before_B = answer_log_likelihood(reference(tokens=tokens_BT), labels_BT)
        return answer_log_likelihood(self.policy(tokens=tokens_BT), labels_BT) - before_B.clone()

    def objective(self) -> NeuralModule:
        """Direct preference optimisation."""
        return PreferenceLoss()

    def measures(self) -> dict[str, NeuralModule]:
        """How often the better answer gains more."""
        return {"preferred": PreferredShare()}


def answer_log_likelihood(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Log-probability of each row's labels, those that count. Shape: [B].

    Example:
        >>> answer_log_likelihood(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).exp()
        tensor([0.2500])
    """
    own_BT = logits_BTV.float().log_softmax(-1).gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
    return (own_BT * (labels_BT != IGNORED)).sum(-1)


class PreferenceLoss(NeuralModule):
    """Direct preference optimisation (Rafailov et al., 2023), summed over pairs (final).

    Args:
        beta: how strongly the model is held to its reference.
        label_smoothing: share of preferences that may be the wrong way round.

    Shape: chosen_B, rejected_B -> scalar, scalar.

    Example:
        >>> loss, count = PreferenceLoss()(torch.zeros(2), torch.zeros(2))
        >>> round(loss.item() / count.item(), 4)
        0.6931
    """

    CONFIG_RULES: ClassVar = (
        ("beta > 0", "beta is above 0"),
        ("label_smoothing >= 0 and label_smoothing < 0.5", "label smoothing is below 0.5"),
    )

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.beta, self.label_smoothing = beta, label_smoothing

    def forward(self, chosen: ScoresB, rejected: ScoresB) -> TokenLoss:
        margin_B = self.beta * (chosen - rejected)
        loss_B = -F.logsigmoid(margin_B) * (1 - self.label_smoothing) - F.logsigmoid(-margin_B) * self.label_smoothing
        return TokenLoss(loss_B.sum(), torch.tensor(len(loss_B), device=loss_B.device))


class PreferredShare(NeuralModule):
    """How often the better answer gains more than the worse one (final).

    Shape: chosen_B, rejected_B -> scalar, scalar.
    """

    def forward(self, chosen: ScoresB, rejected: ScoresB) -> Share:
        return Share((chosen > rejected).sum(), torch.tensor(len(chosen), device=chosen.device))
