"""What every language model is: ports, and texts that go on."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from nemolet.generation_rules import GenerationRules, chosen
from nemolet.language.decoding import Completion, generate, stream
from nemolet.module import NeuralModule
from nemolet.nn.cache import KVCache
from nemolet.sampling import Sampling
from nemolet.tokenizers.base import Tokenizer
from nemolet.types import LogitsBTV, MaskBT, PositionsBT, SegmentsBT, TokenIdsBT


class LanguageModel(NeuralModule):
    """Predicts the next token (abstract: :class:`CausalLM`, :class:`PromptTuned`).

    Shape: tokens_BT -> logits_BTV.

    Attributes:
        vocab_size: number of tokens.
        context: most tokens of a text.
        generation: how it writes.
    """

    vocab_size: int
    context: int
    generation: GenerationRules

    def forward(
        self,
        tokens: TokenIdsBT,
        segments: SegmentsBT | None = None,
        positions: PositionsBT | None = None,
        mask: MaskBT | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> LogitsBTV:
        inputs = {"segments": segments, "positions": positions, "mask": mask}
        return self.scores(tokens, **inputs, cache=cache, last_only=last_only)

    @abc.abstractmethod
    def scores(self, tokens_BT: Tensor, **inputs: Any) -> Tensor:
        """Scores of what follows each token, of the inputs that :meth:`forward` declares. Shape: [B, T, V]."""

    @abc.abstractmethod
    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` sequences of up to ``capacity`` tokens."""

    def generate(
        self,
        tokenizer: Tokenizer,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        truncate: bool = False,
        rules: GenerationRules | None = None,
    ) -> list[Completion]:
        """Continue one or several prompts; see :class:`nemolet.language.Sampling` for the choices.

        What is not given is as the rules say that the model came with, or else as ``Sampling`` has it. A prompt that is
        longer than the context is refused; with ``truncate``, its end is read.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        rules = rules or self.generation
        sampling = chosen(rules, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        if repetition_penalty is not None:
            rules = replace(rules, repetition_penalty=repetition_penalty)
        return generate(
            self,
            tokenizer,
            texts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            seed=seed,
            truncate=truncate,
            rules=rules,
        )

    def stream(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        truncate: bool = False,
    ) -> Iterator[str]:
        """Continue a prompt piece by piece."""
        pieces = stream(
            self,
            tokenizer,
            [prompt],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            seed=seed,
            truncate=truncate,
        )
        for _, piece in pieces:
            yield piece
