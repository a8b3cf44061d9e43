"""What a checkpoint says of the texts that its model writes: where they begin and end, and what is never in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nemolet.errors import GenerationError
from nemolet.sampling import Sampling, penalise


@dataclass(frozen=True)
class Beam:
    """How far the search looks.

    Args:
        size: hypotheses that are kept; 1 is greedy.
        length_penalty: 0 compares sums of log-probabilities, which favours short texts; 1 their means.
        max_length: most tokens that are written; None for what the rules of the model say.
        ends: when the search for a text ends: once as many are complete as the beam is wide (``"first"``), when the
            best that goes on is worth less than those by its present length (``"likely"``), or when nothing that goes
            on can be worth more (``"never"`` early). They are ``early_stopping`` true, false and "never" in
            transformers.

    Raises:
        GenerationError: for a beam without hypotheses or length.
    """

    size: int = 4
    length_penalty: float = 1.0
    max_length: int | None = None
    ends: Literal["first", "likely", "never"] = "never"

    def __post_init__(self) -> None:
        if self.size < 1 or (self.max_length is not None and self.max_length < 1):
            raise GenerationError(
                "the beam is impossible", where="beam", expected="size and max_length of at least 1", found=self
            )

    def worth(self, score: float, length: int) -> float:
        """The score by which texts of different lengths are compared."""
        penalty: float = length**self.length_penalty
        return score / penalty


@dataclass(frozen=True)
class GenerationRules:
    """How a model writes: the ``generation_config.json`` of a checkpoint, as far as it is obeyed here (final).

    A model holds its rules, archives keep them with it, and whatever writes texts obeys them. What a caller asks for
    counts before them. Lengths are of a whole text, with its prompt or the token before it, unless they are new.

    Args:
        start: the token before a text, of a decoder that reads an encoder; None for where documents begin.
        stop: any of these tokens ends a text; none for the end of documents.
        first: the token that every text has first, where its prompt is one token.
        last: the token that a text has last where its length ends it.
        never: tokens that are never written.
        not_first: tokens that are not written first.
        forbidden: rows of tokens that are never written.
        no_repeat: length of rows of tokens that are not written twice; 0 for none.
        repetition_penalty: divides positive and multiplies negative scores of tokens seen (Keskar et al., 2019).
        min_length: tokens before a text may end.
        max_length: most tokens; None for no rule.
        min_new: new tokens before a text may end.
        max_new: most new tokens; it counts before ``max_length``.
        renormalize: whether a beam compares scores that are probabilities after these rules, too.
        stop_texts: any of these texts ends a text, and is no part of it.
        sampling: how tokens are chosen where nothing else is asked for.
        beam: how far the search looks, of a decoder that reads an encoder.
        unmet: what a checkpoint asks for and is not done here, by its own names; generation refuses it.

    Raises:
        GenerationError: for a penalty or a length that is impossible.

    Example:
        >>> rules = GenerationRules(stop=(2, 5), no_repeat=2)
        >>> rules.barred([7, 8, 9, 7], prompt=1)
        {8}
    """

    start: int | None = None
    stop: tuple[int, ...] = ()
    first: int | None = None
    last: int | None = None
    never: tuple[int, ...] = ()
    not_first: tuple[int, ...] = ()
    forbidden: tuple[tuple[int, ...], ...] = ()
    no_repeat: int = 0
    repetition_penalty: float = 1.0
    min_length: int = 0
    max_length: int | None = None
    min_new: int = 0
    max_new: int | None = None
    renormalize: bool = False
    stop_texts: tuple[str, ...] = ()
    sampling: Sampling | None = None
    beam: Beam | None = None
    unmet: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("stop", "never", "not_first", "stop_texts", "unmet"):  # lists, where they come from a file
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "forbidden", tuple(map(tuple, self.forbidden)))
        bounds = {
            "repetition_penalty": (self.repetition_penalty > 0, "above 0; 1 changes nothing"),
            "no_repeat": (self.no_repeat >= 0, "at least 0; 0 forbids nothing"),
            "forbidden": (all(self.forbidden), "at least one token in each row"),
            "max_new": (self.max_new is None or self.max_new >= 1, "at least 1"),
        }
        for name, (fits, expected) in bounds.items():
            if not fits:
                raise GenerationError(
                    "out of range", where=f"generation.{name}", expected=expected, found=getattr(self, name)
                )

    def check(self) -> None:
        """Refuse to write where that is not what the checkpoint asks for.

        Raises:
            GenerationError: naming what is not done here.
        """
        if self.unmet:
            raise GenerationError(
                "the checkpoint asks for what is not done here",
                where="generation_config.json",
                found=", ".join(self.unmet),
                fix="write with rules of your own (rules=GenerationRules(...); own_rules=false on the command line)",
            )

    def beginning(self) -> int:
        """The token before a text of a decoder that reads an encoder.

        Raises:
            GenerationError: where it is not known, or nothing is that ends a text.
        """
        if self.start is None or not self.stop:
            raise GenerationError(
                "it is not known how a text begins and ends",
                where="rules",
                expected="start, and at least one token in stop",
                found=f"start={self.start}, stop={self.stop}",
                fix="take them from the tokenizer that the model was trained with; a folder is converted with its"
                " generation_config.json",
            )
        return self.start

    def room(self, prompt: int) -> int | None:
        """Most new tokens after so many; None where the rules do not say."""
        if self.max_new is not None or self.max_length is None:
            return self.max_new
        return max(1, self.max_length - prompt)

    def barred(self, row: Sequence[int], *, prompt: int) -> set[int]:
        """Tokens that may not come next.

        Args:
            row: the tokens so far.
            prompt: how many of them the model did not write.
        """
        found, ends = set(self.never), set(self.stop)
        if len(row) < self.min_length or len(row) - prompt < self.min_new:
            found |= ends
        if len(row) == prompt + (self.first is not None and prompt == 1):
            found |= set(self.not_first)
        found |= {bad[-1] for bad in self.forbidden if _ends_with(row, bad[:-1]) and set(bad) - ends}
        size = self.no_repeat
        if size and len(row) >= size:
            tail = tuple(row[len(row) - size + 1 :])
            found |= {row[at + size - 1] for at in range(len(row) - size + 1) if tuple(row[at : at + size - 1]) == tail}
        return found

    def bound(self, scores_BV: Tensor, rows: Sequence[tuple[Sequence[int], int, int]]) -> Tensor:
        """Scores of the next token as the rules leave them; what they bar is minus infinity.

        Args:
            scores_BV: logits or log-probabilities.
            rows: of each its tokens so far, how many of them the model did not write, and with how many it ends.
        """
        if self.repetition_penalty != 1.0:
            seen_BV = torch.zeros_like(scores_BV, dtype=torch.bool)
            for index, (row, _, _) in enumerate(rows):
                seen_BV[index, [token for token in row if token < scores_BV.shape[1]]] = True
            scores_BV = penalise(scores_BV, seen_BV, self.repetition_penalty)
        out_BV, forced = torch.zeros_like(scores_BV, dtype=torch.bool), {}
        for index, (row, prompt, most) in enumerate(rows):
            only = self.last if len(row) == most - 1 else self.first if len(row) == 1 else None
            if only is not None and only < scores_BV.shape[1]:
                out_BV[index] = True
                forced[index] = only
            elif barred := self.barred(row, prompt=prompt):
                out_BV[index, [token for token in barred if token < scores_BV.shape[1]]] = True
        bound_BV = scores_BV.masked_fill(out_BV, -torch.inf)
        if forced:
            bound_BV[list(forced), list(forced.values())] = 0.0  # there is nothing else to choose
        return bound_BV


def chosen(rules: GenerationRules, **asked: Any) -> Sampling:
    """How tokens are chosen: what is asked for, then what the rules say, then what is usual.

    Who asks for a choice among the likeliest tokens asks for sampling, even of a model that is greedy by its rules.

    Example:
        >>> rules = GenerationRules(sampling=Sampling(temperature=0.0))
        >>> chosen(rules).greedy, chosen(rules, top_k=5).greedy, chosen(rules, top_k=5, temperature=0.0).greedy
        (True, False, True)
    """
    said = {name: value for name, value in asked.items() if value is not None}
    own = rules.sampling or Sampling()
    return replace(Sampling() if own.greedy and said else own, **said)


def _ends_with(row: Sequence[int], beginning: Sequence[int]) -> bool:
    return not beginning or tuple(row[-len(beginning) :]) == tuple(beginning)
