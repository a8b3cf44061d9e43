"""What a masked language model can be asked: which word fits the hole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nemolet.data.encoding import LongText, TextEncoding, as_list, as_text
from nemolet.data.masking import mask_token
from nemolet.errors import ConfigError, DataError
from nemolet.language.tasks import in_batches
from nemolet.module import NeuralModule
from nemolet.tokenizers import Tokenizer
from nemolet.types import MaskBT, TokenIdsBT

_LONGEST = 512  # tokens, of a model that does not say how much it can read


class Filling(NamedTuple):
    """What may stand in a hole, and how probable it is."""

    text: str
    probability: float


def fill(
    model: NeuralModule,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    hole: str = "[MASK]",
    top: int = 5,
    too_long: LongText = "error",
) -> list[list[Filling]]:
    """The likeliest tokens for the one hole of each text.

    Args:
        model: from tokens and a mask to logits.
        tokenizer: the one the model was trained with.
        texts: each with one hole.
        hole: how it is written.
        top: how many.
        too_long: what happens to a text that is longer than the context: an ``error``, ``truncate`` to its beginning,
            or ``window`` for what stands around the hole.

    Raises:
        DataError: for a text without exactly one hole, or one that is too long.
        ConfigError: for a ``top`` below 1.
    """
    if top < 1:
        raise ConfigError("nothing is asked for", where="top", expected="at least 1", found=top)
    mask, (begin, end) = mask_token(tokenizer), tokenizer.marks
    encoding = TextEncoding(tokenizer, int(getattr(model, "context", None) or _LONGEST), too_long)
    samples = []
    for index, text in enumerate(as_list(texts, "texts")):
        where = f"text {index}"
        parts = as_text(text, where).split(hole)
        if len(parts) != 2:
            raise DataError("a text needs one hole", where=where, expected=f"{hole!r} once", found=f"{text[:60]!a}")
        before = tokenizer.encode(parts[0].rstrip()) if parts[0].strip() else []
        after = tokenizer.encode(parts[1]) if parts[1] else []
        ids = [*before, mask, *after]
        encoding.fits(len(begin) + len(ids) + len(end), where)
        first = _beginning(len(before), len(ids), encoding.room) if too_long == "window" else 0
        ids = ids[first : first + encoding.room]
        if mask not in ids:
            raise DataError(
                "the hole lies beyond the context",
                where=where,
                expected=f"at most {encoding.room - 1} tokens before it",
                found=len(before),
                fix="set too_long=window",
            )
        samples.append({"tokens": [*begin, *ids, *end]})

    def run(batch: dict[str, Tensor]) -> list[list[Filling]]:
        logits_BTV = model(tokens=batch["tokens"], mask=batch["mask"]).float()
        rows, places = (batch["tokens"] == mask).nonzero(as_tuple=True)
        probs_BV, ids_BV = logits_BTV[rows, places].softmax(-1).topk(min(top, logits_BTV.shape[-1]), dim=-1)
        return [
            [Filling(tokenizer.decode([i]), p) for i, p in zip(ids, probs)]
            for ids, probs in zip(ids_BV.tolist(), probs_BV.tolist())
        ]

    return in_batches(model, samples, {"tokens": TokenIdsBT, "mask": MaskBT}, run)


def _beginning(hole: int, length: int, room: int) -> int:
    """Where a window begins that has the hole in its middle, or as near to it as the ends of the text allow."""
    return max(0, min(hole - room // 2, length - room))
