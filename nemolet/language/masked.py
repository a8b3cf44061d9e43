"""What a masked language model can be asked: which word fits the hole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nemolet.data.masking import mask_token
from nemolet.errors import DataError
from nemolet.language.tasks import in_batches
from nemolet.module import NeuralModule
from nemolet.tokenizers import Tokenizer
from nemolet.types import MaskBT, TokenIdsBT


class Filling(NamedTuple):
    """What may stand in a hole, and how probable it is."""

    text: str
    probability: float


def fill(
    model: NeuralModule, tokenizer: Tokenizer, texts: Sequence[str], *, hole: str = "[MASK]", top: int = 5
) -> list[list[Filling]]:
    """The likeliest tokens for the one hole of each text.

    Args:
        model: from tokens and a mask to logits.
        tokenizer: the one the model was trained with.
        texts: each with one hole.
        hole: how it is written.
        top: how many.

    Raises:
        DataError: for a text without exactly one hole.
    """
    mask, (begin, end) = mask_token(tokenizer), tokenizer.marks
    samples = []
    for index, text in enumerate(texts):
        parts = text.split(hole)
        if len(parts) != 2:
            raise DataError("a text needs one hole", where=f"text {index}", expected=f"{hole!r} once", found=repr(text))
        before = tokenizer.encode(parts[0].rstrip()) if parts[0].strip() else []
        after = tokenizer.encode(parts[1]) if parts[1] else []
        samples.append({"tokens": [*begin, *before, mask, *after, *end]})

    def run(batch: dict[str, Tensor]) -> list[list[Filling]]:
        logits_BTV = model(tokens=batch["tokens"], mask=batch["mask"]).float()
        rows, places = (batch["tokens"] == mask).nonzero(as_tuple=True)
        probs_BV, ids_BV = logits_BTV[rows, places].softmax(-1).topk(top, dim=-1)
        return [
            [Filling(tokenizer.decode([i]), p) for i, p in zip(ids, probs)]
            for ids, probs in zip(ids_BV.tolist(), probs_BV.tolist())
        ]

    return in_batches(model, samples, {"tokens": TokenIdsBT, "mask": MaskBT}, run)
