"""Rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemolet.errors import ConfigError, ShapeError, did_you_mean
from nemolet.rules import Checked


@dataclass(frozen=True)
class RopeScaling(Checked):
    """How rotary wavelengths are stretched for contexts longer than those of training.

    Args:
        kind: ``"linear"`` stretches all of them (Chen et al., 2023); ``"llama3"`` the long ones only (Llama 3.1, 2024).
        factor: by how much.
        low_freq_factor: of llama3: turns within the old context below which a wavelength is stretched fully.
        high_freq_factor: of llama3: turns from which it is not stretched.
        original_context: of llama3: the old context.

    Example:
        >>> RopeScaling("linear", 2.0).factor
        2.0
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_context: int | None = None

    CONFIG_RULES = (
        ("factor > 0", "the factor is above 0"),
        ("kind != 'llama3' or low_freq_factor is not None", "llama3 scaling needs low_freq_factor"),
        ("kind != 'llama3' or high_freq_factor is not None", "llama3 scaling needs high_freq_factor"),
        ("kind != 'llama3' or original_context is not None", "llama3 scaling needs original_context"),
        ("kind != 'linear' or low_freq_factor is None", "linear scaling has no low_freq_factor"),
        ("kind != 'linear' or high_freq_factor is None", "linear scaling has no high_freq_factor"),
        ("kind != 'linear' or original_context is None", "linear scaling has no original_context"),
        ("low_freq_factor < high_freq_factor", "low_freq_factor is below high_freq_factor"),
        ("original_context >= 1", "original_context is at least 1"),
    )


class Rotation(NamedTuple):
    """Cosines and sines for one batch, computed once for all layers. Shape: [B or 1, T, 1, 1, K/2]."""

    cos: Tensor
    sin: Tensor

    def to(self, dtype: torch.dtype) -> Rotation:
        """The same in another precision, which no layer has to change any more."""
        return Rotation(self.cos.to(dtype), self.sin.to(dtype))


class RotaryEmbedding(torch.nn.Module):
    """Angles of the rotary position embedding (Su et al., 2021; final).

    The first half of a head is rotated against the second half, as Llama checkpoints in the Hugging Face
    layout expect.

    Args:
        head_size: K, even.
        base: of the geometric series of wavelengths.
        scaling: how wavelengths are stretched, as settings or as a mapping of them.

    Raises:
        ShapeError: for an odd head size.
        ConfigError: for a scaling that is unknown or lacks values.

    Example:
        >>> rope = RotaryEmbedding(4)
        >>> query = torch.randn(1, 3, 1, 1, 4)
        >>> rotated = rotate(query, rope(torch.arange(3)[None]))
        >>> torch.allclose(rotated.norm(dim=-1), query.norm(dim=-1), atol=1e-5)
        True
    """

    frequencies: Tensor

    def __init__(
        self, head_size: int, *, base: float = 10000.0, scaling: RopeScaling | Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        if head_size % 2:
            raise ShapeError(
                "rotary positions need an even head size",
                where="RotaryEmbedding.head_size",
                expected="an even number",
                found=head_size,
                fix="choose width / heads even",
            )
        exponents = -torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu") / head_size
        frequencies = base**exponents
        if scaling is not None:
            frequencies = _scale(frequencies, _settings(scaling))
        self._exact = frequencies.float()
        self.register_buffer("frequencies", self._exact.to(torch.get_default_device()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Follow the model to another device, but not to half precision: far positions would be wrong."""
        super()._apply(fn, recurse)
        self.frequencies = self._exact.to(self.frequencies.device)
        return self

    def forward(self, positions_BT: Tensor) -> Rotation:
        angles = positions_BT[..., None, None, None].float() * self.frequencies
        return Rotation(angles.cos(), angles.sin())


def _settings(scaling: RopeScaling | Mapping[str, Any]) -> RopeScaling:
    if isinstance(scaling, RopeScaling):
        return scaling
    known = [field.name for field in fields(RopeScaling)]
    odd = [name for name in scaling if name not in known] + [n for n in known[:2] if n not in scaling]
    if odd:
        raise ConfigError(
            "the rotary scaling has other settings",
            where="rope_scaling",
            expected=", ".join(known),
            found=", ".join(scaling) or "nothing",
            fix=did_you_mean(odd[0], known) or "give kind and factor, and what else the kind needs",
        )
    return RopeScaling(**scaling)


_HEADS_FIRST, _TIME_FIRST = (0, 2, 3, 1, 4), (0, 3, 1, 2, 4)


def heads_first(heads: Tensor) -> Tensor:
    """The same tensor, with the positions of one head together in memory.

    Attention reads one head at a time, and is faster so. Shape: [B, T, H, K].
    """
    return heads.transpose(1, 2).contiguous().transpose(1, 2)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the last axis, or its first part where the angles are fewer, by position.

    Shape: [B, T, ..., K] with two axes between T and K.
    """
    size = 2 * rotation.cos.shape[-1]
    if size < heads.shape[-1]:
        return torch.cat((rotate(heads[..., :size], rotation), heads[..., size:]), dim=-1)
    cos, sin = rotation.to(heads.dtype)
    if type(heads) is Tensor and not torch.compiler.is_compiling():
        turned: Tensor = _Rotate.apply(heads, cos, sin) if torch.is_grad_enabled() else _turned(heads, cos, sin)
        return turned
    first, second = heads.chunk(2, dim=-1)  # a compiler plans these steps by itself
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, which takes half the steps of the product rule.

    The result is laid out as by :func:`heads_first`.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, into=grad.new_empty(grad.shape)), None, None


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads_first_shape = [heads.shape[axis] for axis in _HEADS_FIRST]
    return _turn(heads, cos, sin, into=heads.new_empty(heads_first_shape).permute(_TIME_FIRST))


def _turn(heads: Tensor, cos: Tensor, sin: Tensor, into: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    turned_first, turned_second = into.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin)
    return into


def _scale(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.low_freq_factor is None or scaling.high_freq_factor is None or scaling.original_context is None:
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # Between the two bounds the stretch fades in, linearly in the number of turns within the old context.
    share = ((scaling.original_context / wavelengths - low) / (high - low)).clamp(0, 1)
    return frequencies * (share + (1 - share) / scaling.factor)
