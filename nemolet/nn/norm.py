"""Normalisation over the last axis."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nemolet.module import NeuralModule
from nemolet.rules import check_choices
from nemolet.types import Axis, HiddenRestD

NormName = Literal["rms", "rms_zero", "layer"]


class LayerNorm(NeuralModule):
    """Zero mean, unit variance, learned scale (Ba et al., 2016; final).

    Args:
        axis: letter of the normalised axis.
        size: its size.
        eps: added to the variance.
        bias: whether a learned shift is added.

    Shape: ``... D -> ... D``; weight ``D``, bias ``D``.

    Example:
        >>> round(LayerNorm("D", 4)(torch.arange(4.0)).sum().item(), 5)
        0.0
    """

    def __init__(self, axis: str, size: int, *, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__(D=Axis(axis, size))
        self.size, self.eps = (size,), eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.declare_axes(weight=f"{axis}={size}", bias=f"{axis}={size}")

    def forward(self, hidden: HiddenRestD) -> HiddenRestD:
        return F.layer_norm(hidden, self.size, self.weight, self.bias, self.eps)


class RMSNorm(NeuralModule):
    """Unit root mean square, learned scale (Zhang and Sennrich, 2019; final).

    Args:
        axis: letter of the normalised axis.
        size: its size.
        eps: added to the mean square.
        zero_centred: whether the scale is one plus the weight, which then starts at zero (Gemma, 2024).

    Shape: ``... D -> ... D``; weight ``D``.

    Example:
        >>> round(RMSNorm("D", 4)(torch.arange(4.0)).square().mean().item(), 3)
        1.0
    """

    def __init__(self, axis: str, size: int, *, eps: float = 1e-5, zero_centred: bool = False) -> None:
        super().__init__(D=Axis(axis, size))
        self.size, self.eps, self.zero_centred = (size,), eps, zero_centred
        self.weight = nn.Parameter(torch.zeros(size) if zero_centred else torch.ones(size))
        self.declare_axes(weight=f"{axis}={size}")

    def forward(self, hidden: HiddenRestD) -> HiddenRestD:
        scale = 1 + self.weight if self.zero_centred else self.weight
        if _lacks_kernel(hidden) and hidden.dtype == scale.dtype:
            if not torch.is_grad_enabled():
                return _normed(hidden, scale, self.eps)[0]
            out: Tensor = _CpuRMSNorm.apply(hidden, scale, self.eps)
            return out
        return F.rms_norm(hidden, self.size, scale, self.eps)


def make_norm(kind: NormName, axis: str, size: int, *, eps: float, bias: bool = True) -> LayerNorm | RMSNorm:
    """A norm by its name: ``"rms"``, ``"rms_zero"`` (its weight counts from one) or ``"layer"``.

    Example:
        >>> make_norm("rms_zero", "D", 4, eps=1e-6).weight.tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    check_choices(make_norm, "make_norm", {"kind": kind})
    if kind == "layer":
        return LayerNorm(axis, size, eps=eps, bias=bias)
    return RMSNorm(axis, size, eps=eps, zero_centred=kind == "rms_zero")


def _lacks_kernel(hidden: Tensor) -> bool:
    plain = type(hidden) is Tensor and not torch.compiler.is_compiling()  # neither sharded nor traced
    return plain and hidden.device.type == "cpu" and hidden.dtype in (torch.float32, torch.float64)


def _normed(hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and what each row was multiplied by."""
    square_sum = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).square_()
    scale = square_sum.div_(hidden.shape[-1]).add_(eps).rsqrt_()
    return (hidden * scale).mul_(weight), scale


class _CpuRMSNorm(torch.autograd.Function):
    """The same norm in a third of the steps: on a CPU torch has no kernel, and differentiates its parts.

    With x the hidden state, s its scale and g the gradient, that of x is s w g - x s^3 (w g . x) / D.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _normed(hidden, weight, eps)
        ctx.save_for_backward(hidden, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        product = grad * hidden
        weight_grad = scale.flatten() @ product.flatten(0, -2)
        along = (product @ weight)[..., None] * scale**3 / hidden.shape[-1]
        hidden_grad = torch.mul(grad, weight, out=product).mul_(scale).addcmul_(hidden, along, value=-1)
        return hidden_grad, weight_grad, None
