"""How likely a language model holds a continuation, and whether it would have written it itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nemolet.errors import DataError
from nemolet.language.tasks import in_batches
from nemolet.module import NeuralModule
from nemolet.types import IGNORED, LabelsBT, TokenIdsBT


class Likelihood(NamedTuple):
    """The log-probability of a continuation, in nats, and whether each of its tokens is the likeliest one."""

    log_prob: float
    greedy: bool


def likelihoods(
    model: NeuralModule, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int = 8
) -> list[Likelihood]:
    """The likelihood of each continuation after its context.

    Of a context that is too long for the model its end counts.

    Args:
        model: from tokens to logits, causal.
        pairs: ids of a context, at least one, and of what follows.
        batch_size: pairs at once; those of like length come together.

    Raises:
        DataError: for an empty context or continuation, or a continuation longer than the model's context.

    Example:
        >>> import nemolet as nl
        >>> model = nl.language.CausalLM(vocab_size=9, layers=1, width=8, heads=2, context=8)
        >>> every = likelihoods(model, [([1, 2], [token]) for token in range(9)])
        >>> round(torch.tensor([one.log_prob for one in every]).exp().sum().item(), 4), sum(one.greedy for one in every)
        (1.0, 1)
    """
    longest = getattr(model, "context", None)
    samples = [_sample(context, after, longest, f"pair {index}") for index, (context, after) in enumerate(pairs)]

    def run(batch: dict[str, Tensor]) -> list[Likelihood]:
        logits_BTV: Tensor = model(tokens=batch["tokens"])  # padding comes last, so no position sees it
        counted_BT = batch["labels"] != IGNORED
        logits_NV, labels_N = logits_BTV[counted_BT].float(), batch["labels"][counted_BT]
        found_N = logits_NV.log_softmax(-1).gather(1, labels_N[:, None])[:, 0].double()
        wrong_N = logits_NV.argmax(-1) != labels_N
        row_N = counted_BT.nonzero()[:, 0]
        sums_B = torch.zeros(len(counted_BT), dtype=torch.float64, device=found_N.device).index_add(0, row_N, found_N)
        wrong_B = torch.zeros_like(sums_B).index_add(0, row_N, wrong_N.double())
        return [Likelihood(total, not wrong) for total, wrong in zip(sums_B.tolist(), wrong_B.tolist())]

    return in_batches(model, samples, {"tokens": TokenIdsBT, "labels": LabelsBT}, run, batch_size=batch_size)


def _sample(
    context: Sequence[int], continuation: Sequence[int], longest: int | None, where: str
) -> dict[str, list[int]]:
    if not context or not continuation or (longest is not None and len(continuation) > longest):
        raise DataError(
            "this continuation cannot be scored",
            where=where,
            expected=f"at least one token before it, and from one to {longest or 'any number of'} tokens of it",
            found=f"{len(context)} tokens before {len(continuation)}",
            fix="let a text begin with a token that every text begins with; cut a longer one into windows",
        )
    tokens = [*context, *continuation]
    if longest is not None:
        tokens = tokens[-(longest + 1) :]
    quiet = len(tokens) - 1 - len(continuation)
    return {"tokens": tokens[:-1], "labels": [IGNORED] * quiet + [*continuation]}
