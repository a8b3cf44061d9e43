"""Reward models: one number for how good an answer is, learned from pairs of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from nemolet.data.chat_template import ChatTemplate
from nemolet.data.encoding import TextEncoding, as_list
from nemolet.data.instructions import conversations, fitted
from nemolet.data.ports import LabelsBS, ScoresB
from nemolet.graph import Graph
from nemolet.language.models import CausalLM
from nemolet.language.preference import PreferenceLoss, Preferred, PreferredShare
from nemolet.language.tasks import in_batches, width_of
from nemolet.module import NeuralModule
from nemolet.nn.adapters import stop_dropout
from nemolet.nn.linear import Linear
from nemolet.symbols import inputs_of
from nemolet.tokenizers import Tokenizer
from nemolet.types import IGNORED, LabelsBT, MaskBT, PositionsBT, TokenIdsBS, TokenIdsBT


class RewardModel(NeuralModule):
    """The body of a language model, and a linear layer that reads the last token (final).

    The difference of two rewards is the logarithm of the odds that the first answer is the better one
    (Bradley and Terry, 1952).

    Args:
        backbone: whose embedding and decoder are used; its head is left out.
        template: how a conversation is written down where raw records are scored; that of the training data, or plain.

    Shape: tokens_BT, mask_BT -> rewards_B.

    Example:
        >>> from nemolet.tokenizers import ByteTokenizer
        >>> backbone = CausalLM(vocab_size=257, layers=1, width=8, heads=2)
        >>> model = RewardModel(backbone=backbone)
        >>> len(model.score(ByteTokenizer(), [{"prompt": "Hi", "response": "Hello"}]))
        1
    """

    READS: ClassVar = (("messages",), ("prompt", "response"))
    PORTS: ClassVar = {"tokens": TokenIdsBT, "mask": MaskBT}

    def __init__(self, *, backbone: CausalLM, template: str | None = None) -> None:
        super().__init__()
        self.vocab_size, self.context, self.template = backbone.vocab_size, backbone.context, template or "plain"
        embed, decoder = (cast(NeuralModule, backbone.graph.get_submodule(name)) for name in ("embed", "decoder"))
        width = width_of(decoder, reads="hidden")
        score = Linear("D", "P", width, 1, init_std=0.02)
        inputs = inputs_of(self)
        hidden = decoder(embed(inputs.pop("tokens")), **inputs)
        self.graph = Graph(score(hidden), names={"embed": embed, "decoder": decoder, "score": score})

    def forward(self, tokens: TokenIdsBT, positions: PositionsBT | None = None, mask: MaskBT | None = None) -> ScoresB:
        rewards_BT: Tensor = self.graph(tokens, positions=positions, mask=mask)[..., 0]
        if mask is None:
            return rewards_BT[:, -1]
        places_BT = torch.arange(mask.shape[1], device=mask.device) * mask  # of the last token, padded on either side
        return rewards_BT.gather(1, places_BT.argmax(1, keepdim=True))[:, 0]

    def score(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]], *, batch_size: int = 32) -> list[float]:
        """The reward of each conversation.

        Args:
            tokenizer: the one the model was trained with.
            records: with ``prompt`` and ``response``, or ``messages`` that end in an answer.
            batch_size: conversations at once.

        Raises:
            DataError: for a conversation that is none, is longer than the context, or has an empty answer.
        """
        encoding, template = TextEncoding(tokenizer, self.context), ChatTemplate(self.template)
        samples = []
        for number, record in enumerate(as_list(records, "records")):
            where = f"record {number}"
            chat = fitted(conversations(record, where)[0], encoding, where, template)
            samples.append({"tokens": [] if chat is None else chat.tokens})
        return in_batches(self, samples, self.PORTS, lambda batch: self(**batch).tolist(), batch_size=batch_size)

    def predict(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rewards of records, as plain data."""
        return [{"reward": round(reward, 6)} for reward in self.score(tokenizer, records)]


class RewardPairs(NeuralModule):
    """The rewards of a better and a worse answer to the same prompt (final).

    Args:
        model: is trained; each answer is judged by its last token, behind which there is padding. Its dropout is
            switched off: the noise would be a part of every difference.

    Shape: tokens_BT, labels_BT, rejected_tokens_BS, rejected_labels_BS -> chosen_B, rejected_B.
    """

    def __init__(self, *, model: RewardModel) -> None:
        super().__init__()
        stop_dropout(model)
        self.model = model

    def forward(
        self, tokens: TokenIdsBT, labels: LabelsBT, rejected_tokens: TokenIdsBS, rejected_labels: LabelsBS
    ) -> Preferred:
        return Preferred(
            self.model(tokens=tokens, mask=_up_to_the_answers_end(labels)),
            self.model(tokens=rejected_tokens, mask=_up_to_the_answers_end(rejected_labels)),
        )

    def objective(self) -> NeuralModule:
        """The likelihood of the choices (Bradley and Terry, 1952): that of DPO with plain rewards."""
        return PreferenceLoss(beta=1.0)

    def measures(self) -> dict[str, NeuralModule]:
        """How often the better answer has the higher reward."""
        return {"preferred": PreferredShare()}


def _up_to_the_answers_end(labels_BT: Tensor) -> Tensor:
    """Positions up to the last token that is a label: it stands one behind the position that predicts it."""
    later_BT = (labels_BT != IGNORED).flip(1).cummax(1).values.flip(1)
    return torch.cat((torch.ones_like(later_BT[:, :1]), later_BT[:, :-1]), 1)
