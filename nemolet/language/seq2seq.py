"""Models from one text to another: an encoder, and a decoder that looks at what it found."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from nemolet.errors import ShapeError
from nemolet.generation_rules import GenerationRules
from nemolet.graph import Graph
from nemolet.module import NeuralModule
from nemolet.nn.cache import KVCache
from nemolet.nn.embedding import Embedding, Head
from nemolet.nn.transformer import Decoder, Encoder
from nemolet.symbols import inputs_of
from nemolet.types import LogitsBTV, MaskBS, MaskBT, PositionsBT, TokenIdsBS, TokenIdsBT


class EncoderDecoder(NeuralModule):
    """A model that writes one text after reading another: T5, BART, Marian (final).

    Source and target share one vocabulary and its embedding.

    Args:
        vocab_size: number of tokens.
        encoder: reads the source.
        decoder: writes the target; its blocks attend to a memory (``cross=True``).
        embedding_scale: factor of the embeddings.
        tied: whether the head shares the embedding's weight.
        head_bias: whether each token has a bias.
        head_scale: factor of the hidden states before the head (T5: the inverse square root of the width).
        pad_vocab_to: round the stored vocabulary up to a multiple; padding is never visible.
        generation: how it writes, where it came with rules for that; None for no rules.

    Shape: source_BS, tokens_BT -> logits_BTV.

    Raises:
        ShapeError: for a decoder without attention to a memory, or of another width.

    Example:
        >>> import torch
        >>> parts = {"encoder": Encoder(layers=1, width=8, heads=2),
        ...          "decoder": Decoder(layers=1, width=8, heads=2, cross=True)}
        >>> model = EncoderDecoder(vocab_size=11, **parts)
        >>> model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)).shape
        torch.Size([1, 3, 11])
    """

    CONFIG_RULES: ClassVar = (("vocab_size >= 1", "vocab_size is at least 1"),)

    def __init__(
        self,
        *,
        vocab_size: int,
        encoder: Encoder,
        decoder: Decoder,
        embedding_scale: float = 1.0,
        tied: bool = True,
        head_bias: bool = False,
        head_scale: float = 1.0,
        pad_vocab_to: int = 1,
        generation: GenerationRules | None = None,
    ) -> None:
        if not decoder.cross or encoder.width != decoder.width:
            raise ShapeError(
                "the decoder cannot read what the encoder found",
                where="EncoderDecoder.decoder",
                expected=f"cross=True and width={encoder.width}",
                found=f"cross={decoder.cross}, width={decoder.width}",
                fix="build the decoder with cross=True and the width of the encoder",
            )
        super().__init__(V=vocab_size)
        width = encoder.width
        self.vocab_size, self.context = vocab_size, decoder.max_length
        self.generation = generation or GenerationRules()
        embed = Embedding("V", "D", vocab_size, width, pad_to_multiple_of=pad_vocab_to, scale=embedding_scale)
        options: dict[str, Any] = {"bias": head_bias, "scale": head_scale}
        if tied:
            head = Head("D", "V", tied=embed, **options)
        else:
            head = Head("D", "V", width, vocab_size, pad_to_multiple_of=pad_vocab_to, **options)
        inputs = inputs_of(self)
        seen = inputs["source_mask"]
        memory = encoder(embed(inputs["source"]), mask=seen)
        hidden = decoder(embed(inputs["tokens"]), mask=inputs["mask"], memory=memory, memory_mask=seen)
        names: dict[str, NeuralModule] = {"embed": embed, "encoder": encoder, "decoder": decoder, "head": head}
        self.graph = Graph(head(hidden), names=names)
        self._parts = (embed, encoder, decoder, head)  # a tuple: they are parts of the graph already

    def forward(
        self,
        source: TokenIdsBS,
        tokens: TokenIdsBT,
        source_mask: MaskBS | None = None,
        mask: MaskBT | None = None,
    ) -> LogitsBTV:
        logits: Tensor = self.graph(source=source, tokens=tokens, source_mask=source_mask, mask=mask)
        return logits

    @property
    def start(self) -> int | None:
        """The token that stands before what is written; None for the one that the tokenizer begins texts with."""
        return self.generation.start

    def encode(self, source_BS: Tensor, source_mask_BS: Tensor | None = None) -> Tensor:
        """What the encoder finds in a source: the memory of the decoder. Shape: [B, S, D]."""
        embed, encoder, _, _ = self._parts
        memory_BSD: Tensor = encoder(embed(source_BS), mask=source_mask_BS)
        return memory_BSD

    def decode(
        self,
        tokens: TokenIdsBT,
        memory_BSD: Tensor,
        memory_mask_BS: Tensor | None = None,
        *,
        mask: MaskBT | None = None,
        positions: PositionsBT | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Scores of what follows each token, given a memory. Shape: [B, T, V]."""
        embed, _, decoder, head = self._parts
        hidden_BTD = decoder(
            embed(tokens),
            mask=mask,
            positions=positions,
            cache=cache,
            memory=memory_BSD,
            memory_mask=memory_mask_BS,
        )
        logits_BTV: Tensor = head(hidden_BTD, last_only=last_only)
        return logits_BTV

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` targets of up to ``capacity`` tokens, where the weights are."""
        return self._parts[2].new_cache(batch, capacity)
