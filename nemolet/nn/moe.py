"""Mixture of experts: a feed-forward of which each token uses a few parts.

The router chooses experts for each token, a dispatch brings tokens and experts together, the experts compute.
No token is dropped: they are sorted by expert, and each expert gets as many rows as chose it.
"""

from __future__ import annotations

from typing import Annotated, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.module import NeuralModule
from nemolet.nn.feed_forward import ACTIVATIONS, ActivationName, FeedForward
from nemolet.nn.router import Mixture, Router
from nemolet.types import HiddenBTD, HiddenRestD, Index, NeuralType


class Experts(NeuralModule):
    """Gated feed-forwards side by side, each applied to its own rows (final).

    Args:
        width: model width D.
        hidden_width: feed-forward width F of each.
        number: how many, E.
        activation: its name.
        init_std: standard deviation of the initial weights.
        out_std: that of the narrowing projection.

    Shape: rows [..., D] sorted by expert, counts [E] -> rows; gate and up weights ``E F D``, down weight ``E D F``.

    Example:
        >>> Experts(4, 8, 2)(torch.zeros(3, 4), torch.tensor([1, 2])).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        number: int,
        *,
        activation: ActivationName = "silu",
        init_std: float = 0.02,
        out_std: float = 0.02,
    ) -> None:
        super().__init__(D=width)
        self.number, self.activate = number, ACTIVATIONS[activation]
        self.gate = nn.Parameter(torch.empty(number, hidden_width, width).normal_(std=init_std))
        self.up = nn.Parameter(torch.empty(number, hidden_width, width).normal_(std=init_std))
        self.down = nn.Parameter(torch.empty(number, width, hidden_width).normal_(std=out_std))
        wide = f"E={number} F={hidden_width} D={width}"
        self.declare_axes(gate=wide, up=wide, down=f"E={number} D={width} F={hidden_width}")

    def forward(self, hidden: HiddenRestD, counts: Annotated[Tensor, NeuralType("E", Index())]) -> HiddenRestD:
        gate_EFD, up_EFD, down_EDF = self.gate, self.up, self.down
        if _has_grouped_product(hidden, gate_EFD):
            ends_E = counts.cumsum(0, dtype=torch.int32)
            gated = self.activate(_grouped(hidden, gate_EFD, ends_E)) * _grouped(hidden, up_EFD, ends_E)
            return _grouped(gated, down_EDF, ends_E)
        rows = hidden.split(counts.tolist())
        weights = zip(gate_EFD.unbind(0), up_EFD.unbind(0), down_EDF.unbind(0))
        return torch.cat(
            [
                F.linear(self.activate(F.linear(each, gate)) * F.linear(each, up), down)
                for each, (gate, up, down) in zip(rows, weights)
            ]
        )


def _has_grouped_product(hidden: Tensor, weight: Tensor) -> bool:
    """Whether one kernel multiplies all groups: in bfloat16, with rows of whole 16 bytes."""
    aligned = hidden.shape[-1] % 8 == 0 and weight.shape[-2] % 8 == 0 and hidden.shape[0] > 0
    new_enough = hidden.device.type == "cpu" or (
        hidden.device.type == "cuda" and torch.cuda.get_device_capability(hidden.device) >= (9, 0)
    )
    return aligned and new_enough and hidden.dtype == weight.dtype == torch.bfloat16


def _grouped(rows: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    product: Tensor = F.grouped_mm(rows, weight_EOI.transpose(1, 2), offs=ends_E)
    return product


# --------------------------------------------------------------------------------------------------
# Bringing tokens and experts together
# --------------------------------------------------------------------------------------------------


class Dispatch(Protocol):
    """What brings tokens to experts and back; replaced where experts lie on several devices.

    Shape: hidden [N, D], chosen and weights [N, experts per token] -> [N, D].
    """

    def __call__(self, hidden_ND: Tensor, chosen: Tensor, weights: Tensor, experts: Experts) -> Tensor: ...


def sort_by_expert(chosen: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The order that puts choices of one expert together, and how many each expert has."""
    flat = chosen.flatten()
    counts_E = torch.zeros(number, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    return flat.argsort(stable=True), counts_E


def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Put the experts' rows back in the order of tokens, and add those of each token by their weights."""
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    mixed: Tensor = rows[back].unflatten(0, weights.shape) * weights[..., None].to(rows.dtype)
    return mixed.sum(1)


def dispatch_on_one_device(hidden_ND: Tensor, chosen: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Sort, compute, sort back."""
    order, counts_E = sort_by_expert(chosen, experts.number)
    rows = experts(hidden_ND[order // chosen.shape[-1]], counts_E)
    return combine(rows, order, weights)


class MixtureOfExperts(NeuralModule):
    """A feed-forward of which each token uses a few experts (Shazeer et al., 2017; Jiang et al., 2024; final).

    Args:
        width: model width D.
        hidden_width: feed-forward width F of each expert.
        mixture: how many experts, and how they are chosen.
        activation: its name.
        dropout: of the result, in training.
        init_std: standard deviation of the initial weights.
        out_std: that of the narrowing projections.

    Shape: hidden_BTD -> hidden_BTD.

    Example:
        >>> MixtureOfExperts(4, 8, Mixture(number=4, per_token=2))(torch.zeros(1, 3, 4)).shape
        torch.Size([1, 3, 4])
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        mixture: Mixture,
        *,
        activation: ActivationName = "silu",
        dropout: float = 0.0,
        init_std: float = 0.02,
        out_std: float = 0.02,
    ) -> None:
        super().__init__(D=width)
        self.dropout = dropout
        self.dispatch: Dispatch = dispatch_on_one_device
        self.router = Router(width, mixture, init_std=init_std)
        self.experts = Experts(
            width, hidden_width, mixture.number, activation=activation, init_std=init_std, out_std=out_std
        )
        self.shared: FeedForward | None = None
        if mixture.shared_width:
            self.shared = FeedForward(
                width, mixture.shared_width, activation=activation, gated=True, init_std=init_std, out_std=out_std
            )

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        routing = self.router(hidden)
        chosen, weights = routing.experts.flatten(0, 1), routing.weights.flatten(0, 1)
        mixed_BTD = self.dispatch(hidden.flatten(0, 1), chosen, weights, self.experts).view_as(hidden)
        if self.shared is not None:
            mixed_BTD = mixed_BTD + self.shared(hidden)
        return F.dropout(mixed_BTD, self.dropout, self.training) if self.dropout else mixed_BTD
