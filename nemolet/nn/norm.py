"""Normalisation over the last axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nemolet.module import NeuralModule
from nemolet.types import Axis, HiddenRestD


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

    Shape: ``... D -> ... D``; weight ``D``.

    Example:
        >>> round(RMSNorm("D", 4)(torch.arange(4.0)).square().mean().item(), 3)
        1.0
    """

    def __init__(self, axis: str, size: int, *, eps: float = 1e-5) -> None:
        super().__init__(D=Axis(axis, size))
        self.size, self.eps = (size,), eps
        self.weight = nn.Parameter(torch.ones(size))
        self.declare_axes(weight=f"{axis}={size}")

    def forward(self, hidden: HiddenRestD) -> HiddenRestD:
        return F.rms_norm(hidden, self.size, self.weight, self.eps)
