"""Sentence embeddings: texts that mean the same lie close together; search among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.data.encoding import LongText, TextEncoding, as_list
from nemolet.data.ports import HiddenBD
from nemolet.errors import ConfigError, DataError
from nemolet.language.classification import Pool, Pooling
from nemolet.language.losses import TokenLoss
from nemolet.language.tasks import fields_of, in_windows, width_of
from nemolet.metrics import Share
from nemolet.module import NeuralModule
from nemolet.tokenizers import Tokenizer
from nemolet.types import MaskBS, MaskBT, TokenIdsBS, TokenIdsBT


class Embedded(NamedTuple):
    """Vectors of texts, and of those that belong to them."""

    vectors: HiddenBD
    others: HiddenBD | None


@dataclass(frozen=True)
class Found:
    """A text that was found, and how close it is (the cosine)."""

    index: int
    score: float


class SentenceEmbedder(NeuralModule):
    """A vector of length one for each text: any encoder and a pool (Reimers and Gurevych, 2019; final).

    Args:
        encoder: from tokens (and a mask) to hidden states.
        context: longest text in tokens.
        pooling: how hidden states become one vector.

    Its attribute ``too_long`` says what happens to longer ones: an ``error``, ``truncate`` to their beginning, or
    ``window`` for the direction of the mean of parts that overlap by half.

    Shape: tokens_BT, mask_BT (, other_tokens_BS, other_mask_BS) -> vectors_BD, others_BD.

    Example:
        >>> from nemolet.language import NgramEncoder
        >>> from nemolet.tokenizers import ByteTokenizer
        >>> model = SentenceEmbedder(encoder=NgramEncoder(vocab_size=257, width=8, buckets=16))
        >>> model.search(ByteTokenizer(), ["two words"], ["one", "two words"])[0][0].index
        1
    """

    READS: ClassVar = (("text",),)
    PORTS: ClassVar = {"tokens": TokenIdsBT, "mask": MaskBT}
    too_long: LongText = "error"

    def __init__(self, *, encoder: NeuralModule, context: int = 256, pooling: Pooling = "mean") -> None:
        super().__init__(D=width_of(encoder))
        self.context = context
        self.encoder, self.pool = encoder, Pool(how=pooling)

    def forward(
        self,
        tokens: TokenIdsBT,
        mask: MaskBT | None = None,
        other_tokens: TokenIdsBS | None = None,
        other_mask: MaskBS | None = None,
    ) -> Embedded:
        others = None if other_tokens is None else self.vectors(other_tokens, other_mask)
        return Embedded(self.vectors(tokens, mask), others)

    def vectors(self, tokens_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Vectors of length one."""
        return F.normalize(self.pool(self.encoder(tokens=tokens_BT, mask=mask_BT), mask_BT), dim=-1)

    def objective(self) -> NeuralModule:
        """The contrastive loss."""
        return ContrastiveLoss()

    def measures(self) -> dict[str, NeuralModule]:
        """How often the right one of a batch is the nearest."""
        return {"nearest": NearestIsRight()}

    def embed(self, tokenizer: Tokenizer, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Vectors of raw texts, [texts, D], on the CPU.

        Raises:
            DataError: for an empty text, or one that is too long, naming its place.
        """
        encoding = TextEncoding(tokenizer, self.context, self.too_long)
        samples = [
            [{"tokens": ids} for ids in encoding.parts(text, f"text {i}")]
            for i, text in enumerate(as_list(texts, "texts"))
        ]

        def run(batch: dict[str, Tensor]) -> list[Tensor]:
            return list(self(**batch).vectors.float().cpu())

        found = in_windows(self, samples, self.PORTS, run, batch_size=batch_size)
        if not found:
            return torch.zeros(0, width_of(self.encoder))
        return torch.stack([F.normalize(torch.stack(parts).mean(0), dim=-1) for parts in found])

    def search(
        self, tokenizer: Tokenizer, queries: Sequence[str], texts: Sequence[str], *, top: int = 5
    ) -> list[list[Found]]:
        """The nearest texts of each query, the nearest first."""
        return nearest_vectors(self.embed(tokenizer, queries), self.embed(tokenizer, texts), top=top)

    def predict(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Vectors for records with a ``text``."""
        vectors = self.embed(tokenizer, fields_of(records, "text"))
        return [{"vector": [round(x, 6) for x in vector.tolist()]} for vector in vectors]


def nearest_vectors(queries_BD: Tensor, vectors_SD: Tensor, *, top: int = 5) -> list[list[Found]]:
    """The vectors with the largest products with each query, in blocks of bounded memory.

    Args:
        queries_BD: one row for each query.
        vectors_SD: what is searched, as wide.
        top: how many are found, or all where there are fewer.

    Raises:
        DataError: for vectors of another width, or numbers that are none.
        ConfigError: for a ``top`` below 1.

    Example:
        >>> nearest_vectors(torch.eye(2)[:1], torch.eye(2), top=1)
        [[Found(index=0, score=1.0)]]
    """
    if top < 1:
        raise ConfigError("nothing is to be found", where="top", expected="at least 1", found=top)
    for name, vectors in {"queries": queries_BD, "vectors": vectors_SD}.items():
        if vectors.ndim != 2 or vectors.shape[1] != vectors_SD.shape[-1] or not vectors.isfinite().all():
            raise DataError(
                "these vectors cannot be compared",
                where=name,
                expected=f"finite numbers in rows of {vectors_SD.shape[-1]}",
                found=f"{list(vectors.shape)}, {int((~vectors.isfinite()).sum())} of them not finite",
            )
    found = []
    for block in queries_BD.split(256):
        scores, indices = (block @ vectors_SD.T).topk(min(top, len(vectors_SD)), dim=-1)
        found += [[Found(i, s) for i, s in zip(row, near)] for row, near in zip(indices.tolist(), scores.tolist())]
    return found


class ContrastiveLoss(NeuralModule):
    """Each text has to find its own partner among all of the batch, and each partner its text (final).

    Args:
        temperature: divides the cosines (van den Oord et al., 2018).

    Shape: vectors_BD, others_BD -> scalar, scalar.

    Example:
        >>> loss, count = ContrastiveLoss(temperature=1.0)(torch.eye(2), torch.eye(2))
        >>> round(loss.item() / count.item(), 4)
        0.3133
    """

    CONFIG_RULES: ClassVar = (("temperature > 0", "the temperature is above 0"),)

    def __init__(self, *, temperature: float = 0.05) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, vectors: HiddenBD, others: HiddenBD | None) -> TokenLoss:
        scores = vectors.float() @ _partners(others).float().T / self.temperature
        own = torch.arange(len(scores), device=scores.device)
        loss = F.cross_entropy(scores, own, reduction="sum") + F.cross_entropy(scores.T, own, reduction="sum")
        return TokenLoss(loss / 2, torch.tensor(len(scores), device=scores.device))


class NearestIsRight(NeuralModule):
    """How many texts of a batch lie nearest to their own partner (final).

    Shape: vectors_BD, others_BD -> scalar, scalar.
    """

    def forward(self, vectors: HiddenBD, others: HiddenBD | None) -> Share:
        own = torch.arange(len(vectors), device=vectors.device)
        return Share(
            ((vectors @ _partners(others).T).argmax(-1) == own).sum(), torch.tensor(len(own), device=vectors.device)
        )


def _partners(others_BD: Tensor | None) -> Tensor:
    if others_BD is None:
        raise DataError(
            "there are no partners",
            where="others",
            expected="batches of pairs, as nemolet.data.SimilarTexts makes them",
            found="single texts",
        )
    return others_BD
