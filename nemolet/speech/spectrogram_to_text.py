"""A recognizer that writes: an encoder of a spectrogram, and a decoder of text that attends to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from nemolet.errors import ShapeError
from nemolet.generation_rules import GenerationRules
from nemolet.graph import Graph
from nemolet.module import NeuralModule
from nemolet.nn.cache import KVCache
from nemolet.nn.conv import Conv1d
from nemolet.nn.embedding import Embedding, Head
from nemolet.nn.transformer import Decoder, Encoder
from nemolet.symbols import Input
from nemolet.types import LogitsBTV, MaskBT, MemoryBSD, SpectrogramBTC, TokenIdsBT


class ConvStem(NeuralModule):
    """Two convolutions over the frames of a spectrogram, of which the second halves them (final).

    Args:
        bins: C, features of a frame.
        width: D, of a hidden state.

    Shape: ``B T C -> B S D``, where S is T / 2, rounded up.

    Example:
        >>> import torch
        >>> ConvStem(bins=8, width=4)(torch.zeros(1, 9, 8)).shape
        torch.Size([1, 5, 4])
    """

    def __init__(self, *, bins: int, width: int) -> None:
        super().__init__(C=bins, D=width)
        self.widen = Conv1d("C", "D", bins, width, kernel=3)
        self.halve = Conv1d("D", "D", width, width, kernel=3, stride=2)

    def forward(self, spectrogram: SpectrogramBTC) -> MemoryBSD:
        return F.gelu(self.halve(F.gelu(self.widen(spectrogram))))


@dataclass(frozen=True)
class PromptTokens:
    """Tokens that tell a model of speech what to write: which language, whether translated, and whether with times.

    Args:
        languages: the token of each language, by its code; none for a model that knows one only.
        tasks: the token of each task.
        no_times: the token after which no times are written; None where there is none.
        latest: frames of the encoder after which no first segment may begin; None for any.
    """

    languages: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, int] = field(default_factory=dict)
    no_times: int | None = None
    latest: int | None = None


class SpectrogramToText(NeuralModule):
    """From a spectrogram to text, one token after another (Whisper: Radford et al., 2022; final).

    Args:
        vocab_size: number of tokens.
        bins: features of a frame.
        encoder: reads every second frame; no row may have more of them than its ``max_length``.
        decoder: writes text; its blocks attend to a memory (``cross=True``).
        embedding_scale: factor of the embeddings.
        tied: whether the head shares the embedding's weight.
        pad_vocab_to: round the stored vocabulary up to a multiple; padding is never visible.
        generation: how it writes; None for no rules but that it does.
        prompt: what it can be told before it writes; None for nothing.

    Shape: ``B T C``, tokens_BT -> logits_BTV.

    Raises:
        ShapeError: for a decoder without attention to a memory, or of another width.

    Example:
        >>> import torch
        >>> encoder = Encoder(layers=1, width=8, heads=2, position="learned", max_length=6)
        >>> decoder = Decoder(layers=1, width=8, heads=2, cross=True)
        >>> model = SpectrogramToText(vocab_size=11, bins=4, encoder=encoder, decoder=decoder)
        >>> model(torch.zeros(1, 12, 4), torch.zeros(1, 3, dtype=torch.long)).shape
        torch.Size([1, 3, 11])
    """

    CONFIG_RULES: ClassVar = (("vocab_size >= 1", "vocab_size is at least 1"),)

    def __init__(
        self,
        *,
        vocab_size: int,
        bins: int,
        encoder: Encoder,
        decoder: Decoder,
        embedding_scale: float = 1.0,
        tied: bool = True,
        pad_vocab_to: int = 1,
        generation: GenerationRules | None = None,
        prompt: PromptTokens | None = None,
    ) -> None:
        if not decoder.cross or encoder.width != decoder.width:
            raise ShapeError(
                "the decoder cannot read what the encoder found",
                where="SpectrogramToText.decoder",
                expected=f"cross=True and width={encoder.width}",
                found=f"cross={decoder.cross}, width={decoder.width}",
                fix="build the decoder with cross=True and the width of the encoder",
            )
        super().__init__(V=vocab_size, C=bins)
        self.vocab_size, self.bins, self.context = vocab_size, bins, decoder.max_length
        self.generation, self.prompt = generation or GenerationRules(), prompt or PromptTokens()
        self.source_frames = encoder.max_length  # states of the encoder; the spectrogram has twice as many
        stem = ConvStem(bins=bins, width=encoder.width)
        embed = Embedding("V", "D", vocab_size, decoder.width, pad_to_multiple_of=pad_vocab_to, scale=embedding_scale)
        if tied:
            head = Head("D", "V", tied=embed)
        else:
            head = Head("D", "V", decoder.width, vocab_size, pad_to_multiple_of=pad_vocab_to)
        memory = encoder(stem(Input(SpectrogramBTC, "spectrogram")))
        mask = Input(MaskBT, "mask", optional=True)
        scores = head(decoder(embed(Input(TokenIdsBT, "tokens")), mask=mask, memory=memory))
        names: dict[str, NeuralModule] = {
            "stem": stem,
            "embed": embed,
            "encoder": encoder,
            "decoder": decoder,
            "head": head,
        }
        self.graph = Graph(scores, names=names)
        self._parts = (stem, embed, encoder, decoder, head)  # a tuple: they are parts of the graph already

    def forward(self, spectrogram: SpectrogramBTC, tokens: TokenIdsBT, mask: MaskBT | None = None) -> LogitsBTV:
        logits: Tensor = self.graph(spectrogram=spectrogram, tokens=tokens, mask=mask)
        return logits

    def encode(self, spectrogram_BTC: Tensor) -> Tensor:
        """What the encoder finds in a spectrogram: the memory of the decoder. Shape: [B, S, D]."""
        stem, _, encoder, _, _ = self._parts
        memory_BSD: Tensor = encoder(stem(spectrogram_BTC))
        return memory_BSD

    def decode(
        self,
        tokens_BT: Tensor,
        memory_BSD: Tensor,
        *,
        mask_BT: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Scores of what follows each token, given a memory. Shape: [B, T, V]."""
        _, embed, _, decoder, head = self._parts
        hidden_BTD = decoder(embed(tokens_BT), mask=mask_BT, cache=cache, memory=memory_BSD)
        logits_BTV: Tensor = head(hidden_BTD, last_only=last_only)
        return logits_BTV

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` texts of up to ``capacity`` tokens, where the weights are."""
        return self._parts[3].new_cache(batch, capacity)
