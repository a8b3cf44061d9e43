"""From prompts to text: the decoding loop, stop conditions and streaming.

:class:`Decoding` is the loop over tokens, :func:`stream` turns it into text, :func:`generate` collects
the text. Any module from tokens to logits will do; one whose ``forward`` takes a ``cache`` decodes in
linear instead of quadratic time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from nemolet.errors import GenerationError, TokenizerError
from nemolet.generation_rules import GenerationRules
from nemolet.module import NeuralModule
from nemolet.nn.cache import KVCache
from nemolet.nn.prepacking import pack, unpack
from nemolet.sampling import Sampling, choose
from nemolet.tokenizers.base import Tokenizer

_LONGEST = 128  # tokens of a continuation, where nobody says
_MANY = 64  # tokens after which it was worth laying out the weights


class CausalModel(Protocol):
    """What decoding needs of a model beyond its forward."""

    context: int
    vocab_size: int

    def new_cache(self, batch: int, capacity: int) -> KVCache: ...


class Decoding:
    """A batch of sequences that grow by one token at each step (final).

    Prompts of unequal length are padded on the left. Where a sequence grows out of the context, its oldest
    quarter is dropped and the rest is read anew. What is dropped depends on the length of the sequence alone:
    a row's text is the same in any batch, and with or without a cache.

    Args:
        model: from tokens to logits.
        prompts: token ids, at least one per row.
        sampling: how tokens are chosen.
        seed: of the random choice; row i uses seed + i, whatever the other rows are.
        max_new_tokens: how much room the cache needs.
        choices: how many tokens there are to choose from; None for all that the model has.
        truncate: whether the end of a prompt that is longer than the context is read, instead of refusing it.
        rules: of the model; what they bar is never chosen.
        longest: with how many tokens each row ends, which the rules may want to know; None for all the room.
    """

    def __init__(
        self,
        model: NeuralModule,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling,
        seed: int,
        max_new_tokens: int,
        choices: int | None = None,
        truncate: bool = False,
        rules: GenerationRules | None = None,
        longest: Sequence[int] | None = None,
    ) -> None:
        self.model, self.sampling, self.choices = model, sampling, choices
        self.rules = rules or GenerationRules()
        self.rows = [list(prompt) for prompt in prompts]
        self.prompts = [len(row) for row in self.rows]
        self.longest = list(longest or [length + max_new_tokens for length in self.prompts])
        parameter = next(model.parameters())
        self.device = parameter.device
        self.context: int = getattr(model, "context", 0) or max(map(len, self.rows)) + max_new_tokens
        self.capacity = min(self.context, max(map(len, self.rows)) + max_new_tokens)
        self.positions: dict[int, int] = {}  # of the token that each row reads next
        self.cached = "cache" in model.declared().options and hasattr(model, "new_cache")
        self.cache: KVCache | None = None
        self.generators = [torch.Generator(self.device).manual_seed(seed + row) for row in range(len(self.rows))]
        self.live = list(range(len(self.rows)))
        _check_prompts(self.rows, getattr(model, "vocab_size", None), None if truncate else self.context)

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        """Choose one more token for every live row; returns row -> token."""
        if self.cache is not None and self.cache.length < self.cache.capacity:
            last = [[self.rows[row][-1]] for row in self.live]
            logits_BV = self._forward(last, [[self.positions[row]] for row in self.live], None)
        else:
            logits_BV = self._read()
        of_live = [(self.rows[row], self.prompts[row], self.longest[row]) for row in self.live]
        logits_BV = self.rules.bound(logits_BV.float(), of_live)
        tokens = choose(logits_BV, self.sampling, [self.generators[row] for row in self.live])
        chosen = dict(zip(self.live, tokens.tolist()))
        for row, token in chosen.items():
            self.rows[row].append(token)
            self.positions[row] += 1
        return chosen

    def finish(self, rows: set[int]) -> None:
        """Stop growing these rows; the others go on with a smaller batch."""
        keep = [index for index, row in enumerate(self.live) if row not in rows]
        self.live = [self.live[index] for index in keep]
        if not self.live:
            return
        index = torch.tensor(keep, device=self.device)
        if self.cache is not None:
            self.cache.reorder(index)

    def _read(self) -> Tensor:
        """Run whole sequences: the prompts at first, later what is kept of a full context."""
        kept = [self._kept(self.rows[row]) for row in self.live]
        longest = max(map(len, kept))
        pads = [longest - len(tokens) for tokens in kept]
        if self.cached:
            model: CausalModel = self.model  # type: ignore[assignment]
            self.cache = model.new_cache(len(kept), self.capacity)
        self.positions = {row: len(tokens) - 1 for row, tokens in zip(self.live, kept)}
        tokens = [[tokens[0]] * pad + tokens for tokens, pad in zip(kept, pads)]
        positions = [[max(0, i - pad) for i in range(longest)] for pad in pads]
        mask = None
        if any(pads):
            mask = torch.tensor([[i >= pad for i in range(longest)] for pad in pads], device=self.device)
        return self._forward(tokens, positions, mask)

    def _kept(self, tokens: list[int]) -> list[int]:
        """The part that fits the context; dropping a quarter at once keeps reading anew rare."""
        over, chunk = len(tokens) - self.context, max(1, self.context // 4)
        return tokens if over <= 0 else tokens[-(-over // chunk) * chunk :]

    def _forward(self, tokens: list[list[int]], positions: list[list[int]], mask_BT: Tensor | None) -> Tensor:
        declared = self.model.declared()
        call: dict[str, object] = {"tokens": torch.tensor(tokens, device=self.device)}
        if mask_BT is not None and "mask" not in declared.inputs:
            raise GenerationError(
                "this model cannot tell padding",
                where=self.model.label,
                expected="an optional port `mask`",
                found=", ".join(declared.inputs),
                fix="generate from one prompt at a time, or give the model the port",
            )
        if "mask" in declared.inputs:
            call["mask"] = mask_BT
        if "positions" in declared.inputs:
            call["positions"] = torch.tensor(positions, device=self.device)
        if self.cached:
            call["cache"] = self.cache
        if "last_only" in declared.options:
            call["last_only"] = True
        logits_BTV: Tensor = self.model(**call)
        return logits_BTV[:, -1, : self.choices]


def _check_prompts(rows: list[list[int]], vocab_size: int | None, context: int | None) -> None:
    for index, tokens in enumerate(rows):
        if not tokens:
            raise GenerationError(
                "the prompt has no tokens",
                where=f"prompt {index}",
                expected="at least one token",
                found="an empty prompt",
                fix="start with a beginning-of-text token or a newline",
            )
        if context is not None and len(tokens) > context:
            raise GenerationError(
                "the prompt is longer than the model can read",
                where=f"prompt {index}",
                expected=f"at most {context} tokens",
                found=len(tokens),
                fix="shorten it, or set truncate=true to read its end only",
            )
        if vocab_size is not None and not all(0 <= token < vocab_size for token in tokens):
            bad = next(token for token in tokens if not 0 <= token < vocab_size)
            raise GenerationError(
                "a token is outside the vocabulary",
                where=f"prompt {index}",
                expected=f"ids from 0 to {vocab_size - 1}",
                found=bad,
                fix="encode the prompt with the tokenizer the model was trained with",
            )


@dataclass
class Completion:
    """The continuation of one prompt."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str = "length"  # or "stop": a stop sequence or the end-of-text token


def stream(
    model: NeuralModule,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    truncate: bool = False,
    rules: GenerationRules | None = None,
    completions: list[Completion] | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield ``(row, piece of text)`` as it is made; never half a character, never part of a stop sequence.

    Args:
        model: from tokens to logits.
        tokenizer: the one the model was trained with.
        prompts: texts to continue, or their ids.
        max_new_tokens: length limit of each continuation; None for what the rules say, or 128.
        sampling: how tokens are chosen; None for what the rules say.
        stop: texts that end a continuation; they are not part of it.
        seed: of the random choice.
        truncate: whether the end of a prompt that is longer than the model's context is read, instead of refusing it.
        rules: how the model writes; None for those it came with.
        completions: receives a :class:`Completion` for each prompt, filled while streaming.
    """
    rules = written_rules(model, tokenizer, rules)
    stop = (*stop, *rules.stop_texts)
    _check_request(max_new_tokens, stop, seed)
    if not prompts:
        return
    results = [Completion() for _ in prompts]
    if completions is not None:
        completions.extend(results)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    limits = [max_new_tokens or rules.room(len(prompt)) or _LONGEST for prompt in ids]
    decoding = Decoding(
        model,
        ids,
        sampling=sampling or rules.sampling or Sampling(),
        seed=seed,
        max_new_tokens=max(limits),
        choices=tokenizer.vocab_size,  # a model may have more rows than its tokenizer has tokens
        truncate=truncate,
        rules=rules,
        longest=[len(prompt) + limit for prompt, limit in zip(ids, limits)],
    )
    pieces = [_Piece(tokenizer, tuple(stop)) for _ in prompts]
    training = [module for module in model.modules() if module.training]  # all but parts that are frozen
    model.eval()
    laid_out = pack(model) if max(limits) >= _MANY else []
    try:
        yield from _flow(decoding, limits, pieces, results)
    finally:
        unpack(laid_out)
        for module in training:
            module.training = True


def _flow(
    decoding: Decoding, limits: Sequence[int], pieces: Sequence[_Piece], results: Sequence[Completion]
) -> Iterator[tuple[int, str]]:
    """Rows and pieces of their texts, until each has ended or reached its limit."""
    for count in range(1, max(limits) + 1):
        ended: set[int] = set()
        for row, token in decoding.step().items():
            if token in decoding.rules.stop:
                text, done = pieces[row].flush(), True
            else:
                results[row].tokens.append(token)
                text, done = pieces[row].push(token)
            if done:
                results[row].finish = "stop"
            elif count == limits[row]:
                text += pieces[row].flush()
            if done or count == limits[row]:
                ended.add(row)
            if text:
                results[row].text += text
                yield row, text
        if ended:
            decoding.finish(ended)
        if not decoding.live:
            return


def written_rules(
    model: NeuralModule, tokenizer: Tokenizer | None, rules: GenerationRules | None = None
) -> GenerationRules:
    """The rules by which a model writes: its own, and where they do not say it the marks of its tokenizer.

    Args:
        model: may have rules.
        tokenizer: its own.
        rules: instead of those of the model.

    Raises:
        GenerationError: without a tokenizer, or for rules that ask for what is not done here.
    """
    if tokenizer is None:
        raise GenerationError(
            "there is no tokenizer to write with",
            where="generate",
            expected="the one that the model was trained with",
            found="None, as nl.load gives it for an archive or folder without one",
            fix="put tokenizer.json into the folder, save with nl.save(..., tokenizer=...), or pass another tokenizer",
        )
    rules = rules or getattr(model, "generation", None) or GenerationRules()
    rules.check()
    end = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return replace(rules, stop=rules.stop or end)


def _check_request(max_new_tokens: int | None, stop: Sequence[str], seed: int) -> None:
    if max_new_tokens is not None and max_new_tokens < 1:
        raise GenerationError(
            "nothing to generate", where="max_new_tokens", expected="at least 1", found=max_new_tokens
        )
    if not 0 <= seed < 1 << 63:
        raise GenerationError("out of range", where="seed", expected="at least 0 and below 2 ** 63", found=seed)
    if "" in stop:
        raise GenerationError(
            "a stop sequence is empty",
            where="stop",
            expected="texts of at least one character",
            found=list(stop),
            fix="remove the empty one; it would stop everything at once",
        )


class _Piece:
    """The text of one row, held back while it may still turn out to be a stop sequence."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.decoder, self.stop, self.held = tokenizer.stream(), stop, ""

    def push(self, token: int) -> tuple[str, bool]:
        self.held += self.decoder.push(token)
        return self._release()

    def flush(self) -> str:
        self.held += self.decoder.flush()
        text, done = self._release()
        return text if done else text + self.held

    def _release(self) -> tuple[str, bool]:
        found = [at for at in (self.held.find(s) for s in self.stop) if at >= 0]
        if found:
            return self.held[: min(found)], True
        longest = max((len(s) for s in self.stop), default=0)
        lengths = range(min(longest, len(self.held)), 0, -1)
        hold = next((n for n in lengths if any(s.startswith(self.held[-n:]) for s in self.stop)), 0)
        cut = len(self.held) - hold
        text, self.held = self.held[:cut], self.held[cut:]
        return text, False


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Encode a prompt as the beginning of a document: after what opens one. Ids are taken as they are."""
    if not isinstance(prompt, str):
        return list(prompt)
    return tokenizer.encode_prompt(prompt) or [beginning(tokenizer)]


def beginning(tokenizer: Tokenizer) -> int:
    """The token with which a text begins: the mark of a beginning or an end, a line end, or else the first token."""
    for mark in (tokenizer.opener, tokenizer.bos_id, tokenizer.eos_id):
        if mark is not None:
            return mark
    try:
        return tokenizer.encode("\n")[0]
    except TokenizerError:
        return 0


def generate(
    model: NeuralModule,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    truncate: bool = False,
    rules: GenerationRules | None = None,
) -> list[Completion]:
    """Continue each prompt and return the continuations; arguments as for :func:`stream`."""
    completions: list[Completion] = []
    for _ in stream(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        seed=seed,
        truncate=truncate,
        rules=rules,
        completions=completions,
    ):
        pass
    return completions
