"""The linear layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.module import NeuralModule
from nemolet.types import Axis, HiddenRestI, HiddenRestO

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Linear(NeuralModule):
    """A matrix product over the last axis (final).

    Args:
        in_axis: letter of the input axis; composite as ``"(H K)"`` in the weight's declaration.
        out_axis: letter of the output axis, or composite.
        in_size: its size.
        out_size: its size.
        bias: whether a vector is added.
        init_std: standard deviation of the initial weights; None for ``in_size ** -0.5``.

    Shape: ``... I -> ... O``; weight ``O I``, bias ``O``.

    Example:
        >>> layer = Linear("D", "F", 4, 16)
        >>> layer(torch.zeros(2, 3, 4)).shape, str(layer.input_ports["hidden"].type)
        (torch.Size([2, 3, 16]), '... D=4 Hidden')
    """

    def __init__(
        self,
        in_axis: str,
        out_axis: str,
        in_size: int,
        out_size: int,
        *,
        bias: bool = False,
        init_std: float | None = None,
    ) -> None:
        super().__init__(I=_port_axis(in_axis, in_size, "I"), O=_port_axis(out_axis, out_size, "O"))
        std = in_size**-0.5 if init_std is None else init_std
        self.weight = nn.Parameter(torch.empty(out_size, in_size).normal_(std=std))
        self.bias = nn.Parameter(torch.zeros(out_size)) if bias else None
        self.product: Product = F.linear  # in another arithmetic, where training asks for it
        self.declare_axes(
            weight=f"{_sized(out_axis, out_size)} {_sized(in_axis, in_size)}", bias=_sized(out_axis, out_size)
        )

    def forward(self, hidden: HiddenRestI) -> HiddenRestO:
        return self.product(hidden, self.weight, self.bias)


def _port_axis(axis: str, size: int, otherwise: str) -> Axis:
    """A composite axis is one flat axis at the port."""
    return Axis(otherwise if axis.startswith("(") else axis, size)


def _sized(axis: str, size: int) -> str:
    return axis if axis.startswith("(") else f"{axis}={size}"
