"""The feed-forward half of a transformer block."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from nemolet.module import NeuralModule
from nemolet.nn.linear import Linear
from nemolet.types import HiddenBTD

ActivationName = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "tanh"]


def _gelu_tanh(hidden: Tensor) -> Tensor:
    return F.gelu(hidden, approximate="tanh")


def _relu2(hidden: Tensor) -> Tensor:
    return F.relu(hidden).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
    "silu": F.silu,
    "tanh": F.tanh,
}


class FeedForward(NeuralModule):
    """Widen, activate, narrow; optionally gated (Shazeer, 2020; final).

    Args:
        width: model width D.
        hidden_width: feed-forward width F.
        activation: its name.
        gated: whether a second projection is multiplied with the activated one.
        bias: whether the projections have a bias.
        dropout: of the result, in training.
        init_std: standard deviation of the initial weights.
        out_std: that of the narrowing projection.

    Shape: hidden_BTD -> hidden_BTD; up and gate weights ``F D``, down weight ``D F``.

    Example:
        >>> import torch
        >>> FeedForward(4, 8, activation="silu", gated=True)(torch.zeros(1, 2, 4)).shape
        torch.Size([1, 2, 4])
    """

    branch: ClassVar[bool] = True

    def __init__(
        self,
        width: int,
        hidden_width: int,
        *,
        activation: ActivationName = "gelu",
        gated: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        init_std: float = 0.02,
        out_std: float = 0.02,
    ) -> None:
        super().__init__(D=width)
        self.activate, self.dropout = ACTIVATIONS[activation], dropout
        self.up = Linear("D", "F", width, hidden_width, bias=bias, init_std=init_std)
        self.gate = Linear("D", "F", width, hidden_width, bias=bias, init_std=init_std) if gated else None
        self.down = Linear("F", "D", hidden_width, width, bias=bias, init_std=out_std)

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        if self.gate is None:
            wide_BTF = self.activate(self.up(hidden))
        else:
            wide_BTF = self.activate(self.gate(hidden)) * self.up(hidden)
        narrow_BTD: Tensor = self.down(wide_BTF)
        return F.dropout(narrow_BTD, self.dropout, self.training) if self.dropout else narrow_BTD
