"""Tables of vectors: token embedding, output head, learned positions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.errors import DeclarationError, ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.linear import Product
from nemolet.types import Axis, BiasBHTS, HiddenBTD, LogitsBTV, PositionsBS, PositionsBT, TokenIdsBT, TokenTypesBT


def padded(vocab: int, multiple: int) -> int:
    """The size of a vocabulary rounded up to a multiple."""
    return -(-vocab // multiple) * multiple


class Embedding(NeuralModule):
    """A vector for each token (final).

    Args:
        token_axis: letter of the vocabulary.
        width_axis: letter of the vectors.
        vocab: number of tokens.
        width: size of a vector.
        pad_to_multiple_of: rows of the table are rounded up to it; the extra rows are never used.
        init_std: standard deviation of the initial vectors.
        scale: factor of the vectors, as the square root of their size (Vaswani et al., 2017).

    Shape: tokens_BT -> hidden_BTD; weight ``V D``.

    Example:
        >>> Embedding("V", "D", 10, 4)(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 4])
    """

    def __init__(
        self,
        token_axis: str,
        width_axis: str,
        vocab: int,
        width: int,
        *,
        pad_to_multiple_of: int = 1,
        init_std: float = 0.02,
        scale: float = 1.0,
    ) -> None:
        super().__init__(V=Axis(token_axis, vocab), D=Axis(width_axis, width))
        self.vocab, self.width, self.scale = vocab, width, scale
        rows = padded(vocab, pad_to_multiple_of)
        self.weight = nn.Parameter(torch.empty(rows, width).normal_(std=init_std))
        self.declare_axes(weight=f"{token_axis}={rows} {width_axis}={width}")

    def forward(self, tokens: TokenIdsBT) -> HiddenBTD:
        hidden_BTD = F.embedding(tokens, self.weight)
        if self.scale == 1.0:
            return hidden_BTD
        return hidden_BTD * torch.tensor(self.scale, dtype=hidden_BTD.dtype)  # rounded as the vectors are


class TextEmbedding(NeuralModule):
    """A vector for each token, and one for its type added to it (BERT, 2018; final).

    Args:
        vocab: number of tokens.
        width: size of a vector.
        types: number of token types, such as first and second text; 0 for none.
        pad_to_multiple_of: rows of the table of tokens are rounded up to it.
        init_std: standard deviation of the initial vectors.

    Shape: tokens_BT, types_BT -> hidden_BTD; weights ``V D`` and ``P D``.

    Example:
        >>> TextEmbedding(10, 4, types=2)(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 4])
    """

    def __init__(
        self, vocab: int, width: int, *, types: int = 0, pad_to_multiple_of: int = 1, init_std: float = 0.02
    ) -> None:
        super().__init__(V=vocab, D=width)
        self.tokens = Embedding("V", "D", vocab, width, pad_to_multiple_of=pad_to_multiple_of, init_std=init_std)
        self.types = Embedding("P", "D", types, width, init_std=init_std) if types else None

    def forward(self, tokens: TokenIdsBT, types: TokenTypesBT | None = None) -> HiddenBTD:
        hidden_BTD: Tensor = self.tokens(tokens)
        if self.types is None:
            return hidden_BTD
        kind_BTD: Tensor = self.types(tokens.new_zeros(1, 1) if types is None else types)
        return hidden_BTD + kind_BTD


class Head(NeuralModule):
    """Scores of all tokens from a hidden state (final).

    Args:
        in_axis: letter of the hidden states.
        out_axis: letter of the vocabulary.
        width: size of a hidden state; taken from ``tied`` where that is given.
        vocab: number of tokens; likewise.
        tied: an embedding whose weight is shared.
        softcap: bound the scores smoothly to this magnitude (Gemma 2, 2024).
        pad_to_multiple_of: rows of an untied weight are rounded up; padding never shows in the scores.
        init_std: standard deviation of an untied weight.
        bias: whether each token has a bias.
        scale: factor of the hidden states (T5: of tied weights, the inverse square root of their size).

    Shape: hidden_BTD -> logits_BTV; weight ``V D``, bias ``V``.

    Raises:
        ShapeError: where neither ``tied`` nor both sizes are given.
        DeclarationError: where ``tied`` is no embedding.

    Example:
        >>> head = Head("D", "V", tied=Embedding("V", "D", 10, 4))
        >>> head(torch.zeros(1, 2, 4)).shape
        torch.Size([1, 2, 10])
    """

    def __init__(
        self,
        in_axis: str,
        out_axis: str,
        width: int | None = None,
        vocab: int | None = None,
        *,
        tied: Embedding | None = None,
        softcap: float | None = None,
        pad_to_multiple_of: int = 1,
        init_std: float = 0.02,
        bias: bool = False,
        scale: float = 1.0,
    ) -> None:
        if tied is not None and not isinstance(tied, Embedding):
            raise _no_embedding(tied)
        width = tied.width if tied is not None else width
        vocab = tied.vocab if tied is not None else vocab
        if width is None or vocab is None:
            raise ShapeError(
                "a head needs its sizes",
                where="Head",
                expected="tied=..., or width and vocab",
                found=f"width={width}, vocab={vocab}",
                fix="give both sizes, or an embedding to share",
            )
        super().__init__(D=Axis(in_axis, width), V=Axis(out_axis, vocab))
        self.vocab, self.softcap, self.scale, self.tied = vocab, softcap, scale, tied is not None
        rows = padded(vocab, pad_to_multiple_of)
        if tied is not None:
            self.weight = tied.weight
        else:
            self.weight = nn.Parameter(torch.empty(rows, width).normal_(std=init_std))
        rows = self.weight.shape[0]
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None
        self.product: Product = F.linear
        self.declare_axes(weight=f"{out_axis}={rows} {in_axis}={width}", bias=f"{out_axis}={rows}")

    @property
    def multiplied(self) -> Tensor:
        """The weight without its padding."""
        return self.weight if self.weight.shape[0] == self.vocab else self.weight[: self.vocab]

    def forward(self, hidden: HiddenBTD, last_only: bool = False) -> LogitsBTV:
        if last_only:  # decoding looks at the last position only; a prompt need not be scored
            hidden = hidden[:, -1:]
        if self.scale != 1.0:
            hidden = hidden * self.scale
        bias = self.bias if self.bias is None else self.bias[: self.vocab]
        logits_BTV = self.product(hidden, self.multiplied, bias)
        return logits_BTV if self.softcap is None else self.softcap * torch.tanh(logits_BTV / self.softcap)


def _no_embedding(found: object) -> DeclarationError:
    """What is said where something else was to be shared; an embedding inside it is likely meant."""
    parts = found.named_modules() if isinstance(found, nn.Module) else ()
    inside = next((name for name, part in parts if isinstance(part, Embedding)), None)
    fix = f"pass its part: tied=....{inside}" if inside else "pass the embedding, or leave tied out and give both sizes"
    return DeclarationError(
        "only the weight of an embedding can be shared",
        where="Head.tied",
        expected="the nl.nn.Embedding that reads the tokens",
        found=type(found).__name__,
        fix=fix,
    )


class PositionEmbedding(NeuralModule):
    """A learned vector for each position (final).

    Args:
        max_length: number of positions.
        width: size of a vector.
        init_std: standard deviation of the initial vectors.
        offset: row of the first position; the rows before it are never used (RoBERTa, BART).

    Shape: hidden_BTD, positions_BT -> hidden_BTD; weight ``T D``.

    Example:
        >>> PositionEmbedding(8, 4)(torch.zeros(1, 3, 4), torch.arange(3)[None]).shape
        torch.Size([1, 3, 4])
    """

    def __init__(self, max_length: int, width: int, *, init_std: float = 0.02, offset: int = 0) -> None:
        super().__init__(D=width)
        self.max_length, self.offset = max_length, offset
        self.weight = nn.Parameter(torch.empty(max_length + offset, width).normal_(std=init_std))
        self.declare_axes(weight=f"T={max_length + offset} D")

    def forward(self, hidden: HiddenBTD, positions: PositionsBT | None = None, start: int = 0) -> HiddenBTD:
        if positions is None:  # from ``start`` on: a slice, where looking up each would be slower
            start += self.offset
            return hidden + self.weight[start : start + hidden.shape[1]]
        return hidden + F.embedding(positions + self.offset if self.offset else positions, self.weight)


class SinusoidalPositions(nn.Module):
    """Fixed waves of geometric lengths, one for each pair of numbers (Vaswani et al., 2017; final).

    All sines come first, then all cosines.

    Args:
        max_length: number of positions.
        width: size of a vector, even.

    Shape: hidden_BTD, positions_BT -> hidden_BTD.

    Example:
        >>> SinusoidalPositions(8, 4)(torch.zeros(1, 1, 4), torch.tensor([[0]])).tolist()
        [[[0.0, 0.0, 1.0, 1.0]]]
    """

    table: Tensor

    def __init__(self, max_length: int, width: int) -> None:
        super().__init__()
        steps = torch.arange(width // 2, dtype=torch.float64, device="cpu")
        frequencies = 10000.0 ** (-2 * steps / width)
        angles = torch.arange(max_length, dtype=torch.float64, device="cpu")[:, None] * frequencies
        self._exact = torch.cat((angles.sin(), angles.cos()), dim=1).float()
        self.register_buffer("table", self._exact.to(torch.get_default_device()), persistent=False)
        self.max_length = max_length

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SinusoidalPositions:
        """Follow the model to another device, but not to half precision."""
        super()._apply(fn, recurse)
        self.table = self._exact.to(self.table.device)
        return self

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor | None = None, start: int = 0) -> Tensor:
        chosen = slice(start, start + hidden_BTD.shape[1]) if positions_BT is None else positions_BT
        return hidden_BTD + self.table[chosen].to(hidden_BTD.dtype)


class RelativePositions(NeuralModule):
    """A learned number per head for the distance of two positions, added to attention scores (T5, 2020; final).

    Near distances have a number each; farther ones share it in ranges that grow with the distance.

    Args:
        heads: query heads H.
        buckets: how many numbers a head has.
        max_distance: all from here on share the last one.
        causal: whether only earlier positions are looked at.
        init_std: standard deviation of the initial numbers.

    Shape: positions_BT, sources_BS -> bias_BHTS; weight ``buckets H``.

    Example:
        >>> table = RelativePositions(2, causal=True)
        >>> table(torch.arange(3)[None], torch.arange(3)[None]).shape
        torch.Size([1, 2, 3, 3])
    """

    def __init__(
        self,
        heads: int,
        *,
        buckets: int = 32,
        max_distance: int = 128,
        causal: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(H=heads)
        self.buckets, self.max_distance, self.causal = buckets, max_distance, causal
        self.weight = nn.Parameter(torch.empty(buckets, heads).normal_(std=init_std))
        self.declare_axes(weight=f"{buckets} H={heads}")

    def forward(self, positions: PositionsBT, sources: PositionsBS) -> BiasBHTS:
        ahead_BTS = sources[:, None, :] - positions[:, :, None]
        return F.embedding(self._bucket(ahead_BTS), self.weight).permute(0, 3, 1, 2)

    def _bucket(self, ahead: Tensor) -> Tensor:
        """The number of a distance: half of them for each direction, and half of those for single steps."""
        count = self.buckets if self.causal else self.buckets // 2
        start = torch.zeros_like(ahead) if self.causal else (ahead > 0) * count
        distance = (-ahead).clamp(min=0) if self.causal else ahead.abs()
        near = count // 2
        log_share = torch.log(distance.float().clamp(min=1) / near) / math.log(self.max_distance / near)
        far = (near + (log_share * (count - near)).long()).clamp(max=count - 1)
        return start + torch.where(distance < near, distance, far)
