"""Task models of text: a graph and what a user wants to do with it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

from torch import Tensor

from nemolet.generation_rules import GenerationRules
from nemolet.graph import Graph
from nemolet.language.language_model import LanguageModel
from nemolet.nn.attention import AttentionOptions
from nemolet.nn.block import ResidualOptions
from nemolet.nn.cache import KVCache
from nemolet.nn.embedding import Embedding, Head
from nemolet.nn.feed_forward import ActivationName
from nemolet.nn.norm import NormName
from nemolet.nn.rope import RopeScaling
from nemolet.nn.router import Mixture
from nemolet.nn.transformer import CheckpointingName, Decoder, LocalLayers
from nemolet.symbols import inputs_of


class CausalLM(LanguageModel):
    """A language model that predicts the next token: embedding, decoder, head (final).

    One architecture serves the GPT-2, Llama, Mistral, Mixtral, Qwen, Gemma and Phi families; the presets in
    ``conf/model`` are overlays of it.

    Args:
        vocab_size: number of tokens; in a config it comes from the tokenizer.
        layers: number of transformer blocks.
        width: model width D.
        heads: query heads H.
        kv_heads: key/value heads G, a divisor of ``heads``; None for as many as ``heads``.
        ffn_width: feed-forward width F; None for 4 D, or 8/3 D where the feed-forward is gated.
        context: longest sequence.
        norm: ``"rms"`` (Llama), ``"rms_zero"`` (its weight counts from one; Gemma) or ``"layer"`` (GPT-2).
        norm_eps: added to the variance.
        activation: of the feed-forward.
        gated: whether the feed-forward is gated.
        position: ``"rope"``, ``"learned"`` or ``"none"``.
        rope_base: base of the rotary frequencies.
        rope_scaling: for example ``{"kind": "llama3", "factor": 8.0, ...}``; see
            :class:`nemolet.nn.RopeScaling`.
        bias: whether linear layers have a bias.
        tied: whether the head shares the embedding's weight.
        qk_norm: whether queries and keys are normalised per head.
        window: how far back attention looks; None for the whole context.
        local: the layers that obey the window; None for all.
        attention: what attention does beside the usual: head size, single biases, scale, bound of the scores.
        residual: where the residual stream is normalised; before each branch, where nothing is said.
        embedding_scale: factor of the embeddings (Gemma: the square root of the width).
        dropout: probability, in training only.
        softcap: bound of the logits (Gemma 2); None for none.
        pad_vocab_to: round the stored vocabulary up to a multiple; padding is never visible.
        checkpointing: activation checkpointing: ``"none"``, ``"full"``, or every n-th block, as ``"every_2"``.
        experts: the feed-forwards are mixtures of experts, each of width F; None for plain ones.
        generation: how it writes, where it came with rules for that; None for no rules.

    Shape: tokens_BT -> logits_BTV.

    Example:
        >>> import torch
        >>> model = CausalLM(vocab_size=11, layers=1, width=8, heads=2, context=16)
        >>> model(torch.zeros(1, 4, dtype=torch.long)).shape
        torch.Size([1, 4, 11])
    """

    CONFIG_RULES: ClassVar = (
        ("attention.head_size is not None or width % heads == 0", "width must be divisible by heads"),
        ("heads % kv_heads == 0", "heads must be divisible by kv_heads"),
        ("kv_heads <= heads", "kv_heads may not exceed heads"),
        (
            "attention is not None or width / heads % 2 == 0 or position != 'rope'",
            "rotary positions need an even head size (width / heads)",
        ),
        (
            "position != 'rope' or attention.head_size * attention.rotary // 1 % 2 == 0",
            "rotary positions need an even head size",
        ),
        ("rope_base > 0", "rope_base is above 0"),
        ("window >= 1", "window is at least 1; null for the whole context"),
        ("local is None or window is not None", "local layers need the window that binds them"),
        ("len(local.layers) == layers", "local.layers has one value for each layer"),
        ("softcap > 0", "softcap is above 0; null for none"),
        ("pad_vocab_to >= 1", "pad_vocab_to is at least 1"),
        ("dropout >= 0 and dropout < 1", "dropout is a probability below 1"),
        ("layers >= 1 and context >= 1", "layers and context are at least 1"),
        ("width >= 1 and heads >= 1", "width and heads are at least 1"),
        ("vocab_size >= 1", "vocab_size is at least 1; null takes it from the tokenizer"),
        ("ffn_width >= 1", "ffn_width is at least 1; null for the usual one"),
        ("kv_heads >= 1", "kv_heads is at least 1; null for as many as heads"),
        ("experts.per_token <= experts.number", "a token cannot use more experts than there are"),
    )

    def __init__(
        self,
        *,
        vocab_size: int,
        layers: int,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        ffn_width: int | None = None,
        context: int = 1024,
        norm: NormName = "rms",
        norm_eps: float = 1e-5,
        activation: ActivationName = "silu",
        gated: bool = True,
        position: Literal["rope", "learned", "none"] = "rope",
        rope_base: float = 10000.0,
        rope_scaling: RopeScaling | None = None,
        bias: bool = False,
        tied: bool = True,
        qk_norm: bool = False,
        window: int | None = None,
        local: LocalLayers | None = None,
        attention: AttentionOptions | None = None,
        residual: ResidualOptions | None = None,
        embedding_scale: float = 1.0,
        dropout: float = 0.0,
        softcap: float | None = None,
        pad_vocab_to: int = 1,
        checkpointing: CheckpointingName = "none",
        experts: Mixture | None = None,
        generation: GenerationRules | None = None,
    ) -> None:
        super().__init__(V=vocab_size)
        self.generation = generation or GenerationRules()
        self.vocab_size, self.context = vocab_size, context
        embed = Embedding("V", "D", vocab_size, width, pad_to_multiple_of=pad_vocab_to, scale=embedding_scale)
        decoder = Decoder(
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            ffn=ffn_width,
            norm=norm,
            norm_eps=norm_eps,
            activation=activation,
            gated=gated,
            position=position,
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            max_length=context,
            bias=bias,
            qk_norm=qk_norm,
            window=window,
            local=local,
            attention=attention,
            residual=residual,
            dropout=dropout,
            checkpointing=checkpointing,
            experts=experts,
        )
        head = (
            Head("D", "V", tied=embed, softcap=softcap)
            if tied
            else Head("D", "V", width, vocab_size, softcap=softcap, pad_to_multiple_of=pad_vocab_to)
        )
        inputs = inputs_of(self)
        hidden = decoder(embed(inputs.pop("tokens")), **inputs)
        self.graph = Graph(head(hidden), names={"embed": embed, "decoder": decoder, "head": head})

    def scores(self, tokens_BT: Tensor, **inputs: Any) -> Tensor:
        """Scores of what follows each token."""
        logits_BTV: Tensor = self.graph(tokens_BT, **inputs)
        return logits_BTV

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` sequences of up to ``capacity`` tokens, where the weights are."""
        return cast(Decoder, self.graph.decoder).new_cache(batch, capacity)
