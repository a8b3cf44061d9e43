"""Stacks of transformer blocks: causal ones, and ones that look both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.attention import AttentionOptions
from nemolet.nn.block import Block, BlockPlan, ResidualOptions
from nemolet.nn.cache import KVCache
from nemolet.nn.embedding import PositionEmbedding, RelativePositions, SinusoidalPositions
from nemolet.nn.feed_forward import ActivationName
from nemolet.nn.linear import Linear
from nemolet.nn.mask import AttentionMask, MakeMask, attention_mask, memory_mask
from nemolet.nn.norm import NormName
from nemolet.nn.rope import RopeScaling, RotaryEmbedding, Rotation
from nemolet.nn.router import Mixture
from nemolet.types import Axis, HiddenBTD, HiddenBTI, MaskBS, MaskBT, MemoryBSD, PositionsBT, SegmentsBT

PositionName = Literal["rope", "learned", "sinusoidal", "relative", "none"]
CheckpointingName = Literal["none", "full", "every_2", "every_3", "every_4", "every_6", "every_8"]


@dataclass(frozen=True)
class PositionOptions:
    """How positions are counted beside the usual.

    Args:
        offset: row of the first learned position (RoBERTa and BART begin at 2).
        skip_padding: whether padding is not counted, where no positions are given (RoBERTa).
        buckets: how many numbers a head has for relative positions (T5).
        max_distance: from where on relative positions share one.
    """

    offset: int = 0
    skip_padding: bool = False
    buckets: int = 32
    max_distance: int = 128


@dataclass(frozen=True)
class LocalLayers:
    """Layers of a stack whose attention is bound by its window, while the others look at everything.

    Args:
        layers: for each layer, whether it is bound.
        rope_base: base of their rotary wavelengths, without scaling; None for that of the others.
    """

    layers: tuple[bool, ...]
    rope_base: float | None = None


class Stack(NeuralModule):
    """Transformer blocks one after the other (abstract: a decoder or an encoder).

    Args:
        layers: number of blocks L.
        width: model width D.
        heads: query heads H.
        kv_heads: key/value heads G; None for as many as ``heads``.
        ffn: feed-forward width F; None for 4 D, or 8/3 D rounded up to 32 where gated.
        norm: ``"rms"``, ``"rms_zero"`` (its weight counts from one; Gemma) or ``"layer"``.
        norm_eps: added to the variance.
        activation: of the feed-forward.
        gated: whether the feed-forward is gated.
        position: ``"rope"``, ``"learned"``, ``"sinusoidal"``, ``"relative"`` or ``"none"``.
        rope_base: base of the rotary wavelengths.
        rope_scaling: see :class:`nemolet.nn.RopeScaling`.
        max_length: longest sequence; needed by learned and sinusoidal positions.
        bias: whether linear layers and layer norms have a bias.
        qk_norm: whether queries and keys are normalised per head.
        window: how far attention looks; None for everything.
        local: the layers that obey the window; None for all.
        attention: what attention does beside the usual.
        residual: where the residual stream is normalised.
        positions: how positions are counted beside the usual.
        input_width: size of the vectors that come in, where a projection makes D of them (ELECTRA).
        cross: whether blocks also attend to a memory (decoders only).
        experts: the feed-forwards are mixtures of experts, each of width F; None for plain ones.
        dropout: probability, in training.
        checkpointing: recompute activations in the backward pass: ``"none"``, ``"full"``, or ``"every_2"``
            (3, 4, 6, 8) for every second block.
        init_std: standard deviation of the initial weights; what writes to the residual stream has it divided
            by the square root of 2 L (Radford et al., 2019).

    Raises:
        ConfigError: for settings against the rules.
        ShapeError: for sizes that do not divide, or a sequence longer than learned positions.
    """

    causal: ClassVar[bool]
    CONFIG_RULES: ClassVar = (
        ("layers >= 1 and width >= 1 and heads >= 1", "layers, width and heads are at least 1"),
        ("kv_heads >= 1", "kv_heads is at least 1; null for as many as heads"),
        ("ffn >= 1", "ffn is at least 1; null for the usual one"),
        ("rope_base > 0", "rope_base is above 0"),
        ("max_length >= 1", "max_length is at least 1"),
        ("input_width >= 1", "input_width is at least 1"),
        ("window >= 1", "window is at least 1; null for everything"),
        ("dropout >= 0 and dropout < 1", "dropout is a probability below 1"),
        ("local is None or window is not None", "local layers need the window that binds them"),
        ("len(local.layers) == layers", "local.layers has one value for each layer"),
    )

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        ffn: int | None = None,
        norm: NormName = "rms",
        norm_eps: float = 1e-5,
        activation: ActivationName = "silu",
        gated: bool = True,
        position: PositionName = "rope",
        rope_base: float = 10000.0,
        rope_scaling: RopeScaling | None = None,
        max_length: int = 1024,
        bias: bool = False,
        qk_norm: bool = False,
        window: int | None = None,
        local: LocalLayers | None = None,
        attention: AttentionOptions | None = None,
        residual: ResidualOptions | None = None,
        positions: PositionOptions | None = None,
        input_width: int | None = None,
        cross: bool = False,
        experts: Mixture | None = None,
        dropout: float = 0.0,
        checkpointing: CheckpointingName = "none",
        init_std: float = 0.02,
    ) -> None:
        attention, residual = attention or AttentionOptions(), residual or ResidualOptions()
        entry = input_width or width
        super().__init__(D=width, I=Axis("D", entry))
        plan = BlockPlan(
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            ffn=ffn,
            norm=norm,
            norm_eps=norm_eps,
            activation=activation,
            gated=gated,
            bias=bias,
            qk_norm=qk_norm,
            attention=attention,
            residual=residual,
            cross=cross,
            experts=experts,
            dropout=dropout,
            init_std=init_std,
        )
        self.width, self.entry_width, self.cross = width, entry, cross
        self.make_mask: MakeMask = attention_mask
        self.window, self.max_length, self.dropout = window, max_length, dropout
        self.checkpoint_every = _checkpoint_every(checkpointing)
        self.blocks = nn.ModuleList(plan.make_block(layer) for layer in range(layers))
        self.is_local = _local_layers(len(self.blocks), window, local)
        self.norm = plan.make_norm() if residual.ends_normalised else None
        self.input_norm = plan.make_norm(entry) if residual.input_norm else None
        self.input_proj = Linear("D", "D", entry, width, bias=bias, init_std=init_std) if input_width else None
        self._make_positions(plan, position, positions or PositionOptions(), entry)
        self.rope: RotaryEmbedding | None = None
        self.local_rope: RotaryEmbedding | None = None
        if position == "rope":
            turned = int((attention.head_size or width // heads) * attention.rotary)
            self.rope = RotaryEmbedding(turned, base=rope_base, scaling=rope_scaling)
            if local is not None and local.rope_base is not None:
                self.local_rope = RotaryEmbedding(turned, base=local.rope_base)

    def _make_positions(self, plan: BlockPlan, kind: PositionName, options: PositionOptions, width: int) -> None:
        self.skip_padding = options.skip_padding
        self.position: PositionEmbedding | SinusoidalPositions | None = None
        self.relative: RelativePositions | None = None
        if kind == "learned":
            self.position = PositionEmbedding(self.max_length, width, init_std=plan.init_std, offset=options.offset)
        elif kind == "sinusoidal":
            self.position = SinusoidalPositions(self.max_length, width)
        elif kind == "relative":
            self.relative = RelativePositions(
                plan.heads,
                buckets=options.buckets,
                max_distance=options.max_distance,
                causal=self.causal,
                init_std=plan.init_std,
            )

    def run(
        self,
        hidden_BTD: Tensor,
        *,
        segments_BT: Tensor | None,
        positions_BT: Tensor | None,
        mask_BT: Tensor | None,
        cache: KVCache | None = None,
        memory_BSD: Tensor | None = None,
        memory_BS: Tensor | None = None,
    ) -> Tensor:
        """What decoders and encoders have in common."""
        length, offset = hidden_BTD.shape[1], 0 if cache is None else cache.length
        valid_BS = mask_BT if cache is None else cache.valid_with(length, mask_BT)
        if positions_BT is None and self.skip_padding and mask_BT is not None:
            positions_BT = (mask_BT.long().cumsum(1) - 1).clamp(min=0)
        masks = self._masks(length, offset, segments_BT, valid_BS, hidden_BTD.device)
        hidden_BTD = self._enter(hidden_BTD, positions_BT, offset)
        rotations = self._rotations(hidden_BTD, offset, positions_BT)
        seen = memory_mask(memory_BS)
        every = self.checkpoint_every if self.training and cache is None else 0
        for layer, (block, local) in enumerate(zip(self.blocks, self.is_local)):
            mask, rotation = masks[int(local)], rotations[int(local)]  # torch 2.11 compiles no index that is a bool
            if every and layer % every == 0:
                hidden_BTD = checkpoint(
                    block, hidden_BTD, mask, rotation, None, layer, memory_BSD, seen, use_reentrant=False
                )
            else:
                hidden_BTD = block(hidden_BTD, mask, rotation, cache, layer, memory_BSD, seen)
        if cache is not None:
            cache.advance(length, valid_BS)
        return hidden_BTD if self.norm is None else self.norm(hidden_BTD)

    def _masks(
        self, length: int, offset: int, segments_BT: Tensor | None, valid_BS: Tensor | None, device: torch.device
    ) -> tuple[AttentionMask | None, AttentionMask | None]:
        """The mask of layers that look everywhere, and of those that a window binds; None where there are none."""

        def make(window: int | None) -> AttentionMask:
            mask = self.make_mask(
                length,
                offset=offset,
                segments_BT=segments_BT,
                valid_BS=valid_BS,
                window=window,
                causal=self.causal,
                device=device,
            )
            return mask if self.relative is None else _biased(mask, self.relative, length, offset, device)

        used = set(self.is_local)
        return make(None) if False in used else None, make(self.window) if True in used else None

    def _rotations(
        self, hidden_BTD: Tensor, offset: int, positions_BT: Tensor | None
    ) -> tuple[Rotation | None, Rotation | None]:
        """The angles of layers that look everywhere, and of those that a window binds; precise as the states."""
        if self.rope is None:
            return None, None
        if positions_BT is None:
            positions_BT = torch.arange(offset, offset + hidden_BTD.shape[1], device=hidden_BTD.device)[None]
        rotation = self.rope(positions_BT).to(hidden_BTD.dtype)
        return rotation, rotation if self.local_rope is None else self.local_rope(positions_BT).to(hidden_BTD.dtype)

    def _enter(self, hidden_BTD: Tensor, positions_BT: Tensor | None, offset: int) -> Tensor:
        """Add positions, normalise, drop out and widen, as far as this stack does."""
        if self.position is not None:
            if offset + hidden_BTD.shape[1] > self.max_length:
                raise ShapeError(
                    "the sequence is longer than its positions",
                    where=f"{self.label}.hidden",
                    expected=f"at most {self.max_length}",
                    found=offset + hidden_BTD.shape[1],
                    fix="shorten the sequence, or build the model with a longer context",
                )
            hidden_BTD = self.position(hidden_BTD, positions_BT, offset)
        if self.input_norm is not None:
            hidden_BTD = self.input_norm(hidden_BTD)
        if self.dropout:
            hidden_BTD = F.dropout(hidden_BTD, self.dropout, self.training)
        return hidden_BTD if self.input_proj is None else self.input_proj(hidden_BTD)


class Decoder(Stack):
    """A stack of causal transformer blocks; with ``cross=True`` they also attend to a memory (final).

    Arguments and errors: see :class:`Stack`.

    Shape: hidden_BTD (, memory_BSD) -> hidden_BTD.

    Example:
        >>> Decoder(layers=2, width=8, heads=2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    causal = True

    def forward(
        self,
        hidden: HiddenBTD,
        segments: SegmentsBT | None = None,
        positions: PositionsBT | None = None,
        mask: MaskBT | None = None,
        cache: KVCache | None = None,
        memory: MemoryBSD | None = None,
        memory_mask: MaskBS | None = None,
    ) -> HiddenBTD:
        return self.run(
            hidden,
            segments_BT=segments,
            positions_BT=positions,
            mask_BT=mask,
            cache=cache,
            memory_BSD=memory,
            memory_BS=memory_mask,
        )

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` sequences of up to ``capacity`` tokens, where the weights are."""
        attention = next(block.attention for block in self.blocks if isinstance(block, Block))  # others are elsewhere
        weight = next(self.parameters())
        return KVCache(
            layers=len(self.blocks),
            batch=batch,
            kv_heads=attention.kv_heads,
            capacity=capacity,
            head_size=attention.head_size,
            device=weight.device,
            dtype=weight.dtype,
        )


class Encoder(Stack):
    """A stack of transformer blocks that look both ways (final).

    Arguments and errors: see :class:`Stack`.

    Shape: hidden_BTD -> hidden_BTD.

    Example:
        >>> Encoder(layers=2, width=8, heads=2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    causal = False

    def forward(
        self,
        hidden: HiddenBTI,
        segments: SegmentsBT | None = None,
        positions: PositionsBT | None = None,
        mask: MaskBT | None = None,
    ) -> HiddenBTD:
        return self.run(hidden, segments_BT=segments, positions_BT=positions, mask_BT=mask)


def _biased(
    mask: AttentionMask, relative: RelativePositions, length: int, offset: int, device: torch.device
) -> AttentionMask:
    """Relative positions as numbers added to the scores, with minus infinity where the mask forbids."""
    key_S = torch.arange(offset + length, device=device)
    query_T = key_S[offset:]
    bias_BHTS: Tensor = relative(query_T[None], key_S[None])
    allowed = query_T[:, None] >= key_S if mask.causal else mask.allowed
    if allowed is not None:
        bias_BHTS = bias_BHTS.masked_fill(~allowed, -torch.inf)
    return AttentionMask(bias_BHTS, causal=False)


def _local_layers(layers: int, window: int | None, local: LocalLayers | None) -> tuple[bool, ...]:
    if local is None:
        return (window is not None,) * layers
    return tuple(local.layers)


def _checkpoint_every(name: CheckpointingName) -> int:
    return {"none": 0, "full": 1}[name] if name in ("none", "full") else int(name.removeprefix("every_"))
