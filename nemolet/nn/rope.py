"""Rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemolet.errors import ShapeError, nearest

_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_context"),
}


class Rotation(NamedTuple):
    """Cosines and sines for one batch, computed once for all layers. Shape: [B or 1, T, 1, 1, K/2]."""

    cos: Tensor
    sin: Tensor


class RotaryEmbedding(torch.nn.Module):
    """Angles of the rotary position embedding (Su et al., 2021; final).

    The first half of a head is rotated against the second half, as Llama checkpoints in the Hugging Face
    layout expect.

    Args:
        head_size: K, even.
        base: of the geometric series of wavelengths.
        scaling: ``{"kind": "linear", "factor": f}`` stretches positions (Chen et al., 2023);
            ``{"kind": "llama3", "factor", "low_freq_factor", "high_freq_factor", "original_context"}``
            stretches long wavelengths only (Llama 3.1, 2024).

    Raises:
        ShapeError: for an odd head size, or scaling fields that are unknown or missing.

    Example:
        >>> rope = RotaryEmbedding(4)
        >>> query = torch.randn(1, 3, 1, 1, 4)
        >>> rotated = rotate(query, rope(torch.arange(3)[None]))
        >>> torch.allclose(rotated.norm(dim=-1), query.norm(dim=-1), atol=1e-5)
        True
    """

    frequencies: Tensor

    def __init__(self, head_size: int, *, base: float = 10000.0, scaling: dict[str, Any] | None = None) -> None:
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
        if scaling:
            frequencies = _scale(frequencies, dict(scaling))
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


_HEADS_FIRST, _TIME_FIRST = (0, 2, 3, 1, 4), (0, 3, 1, 2, 4)


def heads_first(heads: Tensor) -> Tensor:
    """The same tensor, with the positions of one head together in memory.

    Attention reads one head at a time, and is faster so. Shape: [B, T, ..., K] with two axes between T and K.
    """
    return heads.permute(_HEADS_FIRST).contiguous().permute(_TIME_FIRST)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the last axis, or its first part where the angles are fewer, by position.

    Shape: [B, T, ..., K] with two axes between T and K.
    """
    size = 2 * rotation.cos.shape[-1]
    if size < heads.shape[-1]:
        return torch.cat((rotate(heads[..., :size], rotation), heads[..., size:]), dim=-1)
    cos, sin = rotation.cos.to(heads.dtype), rotation.sin.to(heads.dtype)
    if type(heads) is Tensor and not torch.compiler.is_compiling():
        turned: Tensor = _Rotate.apply(heads, cos, sin)
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
        heads_first_shape = [heads.shape[axis] for axis in _HEADS_FIRST]
        return _turn(heads, cos, sin, into=heads.new_empty(heads_first_shape).permute(_TIME_FIRST))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, into=grad.new_empty(grad.shape)), None, None


def _turn(heads: Tensor, cos: Tensor, sin: Tensor, into: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    turned_first, turned_second = into.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin)
    return into


def _scale(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    kind = scaling.pop("kind", None)
    if kind not in _SCALINGS:
        close = nearest(str(kind), _SCALINGS)
        raise ShapeError(
            "unknown rotary scaling",
            where="rope_scaling.kind",
            expected=", ".join(_SCALINGS),
            found=kind,
            fix=f"did you mean {close!r}?" if close else f"set kind={next(iter(_SCALINGS))}, or no scaling",
        )
    if set(scaling) != set(_SCALINGS[kind]):
        raise ShapeError(
            f"{kind} scaling has other fields",
            where="rope_scaling",
            expected=", ".join(_SCALINGS[kind]),
            found=", ".join(scaling) or "nothing",
            fix=f"give exactly {', '.join(_SCALINGS[kind])}",
        )
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    wavelengths = 2 * math.pi / frequencies
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    # Between the two bounds the stretch fades in, linearly in the number of turns within the old context.
    share = ((float(scaling["original_context"]) / wavelengths - low) / (high - low)).clamp(0, 1)
    return frequencies * (share + (1 - share) / float(scaling["factor"]))
