"""Which experts a token uses, and what keeps the choice even."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.types import Element, HiddenRestD, Index, NeuralType


@dataclass(frozen=True)
class Mixture:
    """How a feed-forward is divided into experts.

    Args:
        number: experts E.
        per_token: how many of them each token uses.
        scoring: ``"softmax"`` over all experts (Mixtral, Qwen3), or a ``"sigmoid"`` of each (DeepSeek-V3).
        normalised: whether the weights of the chosen experts are divided by their sum.
        scale: the weights are multiplied by it.
        balance_loss: weight of the auxiliary loss that evens out how often experts are chosen; per sequence,
            1 times this weight for each token at perfect balance.
        z_loss: weight of the squared log-partition of the router's scores (Zoph et al., 2022).
        balance_rate: step of the bias that evens out the choice without a loss (Wang et al., 2024); 0 for none.
        shared_width: feed-forward width of an expert that every token uses; 0 for none.

    Raises:
        ShapeError: where a token would use more experts than there are.
    """

    number: int
    per_token: int = 2
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    scale: float = 1.0
    balance_loss: float = 0.0
    z_loss: float = 0.0
    balance_rate: float = 0.0
    shared_width: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.number:
            raise ShapeError(
                "a token cannot use this many experts",
                where="experts.per_token",
                expected=f"from 1 to {self.number}, the number of experts",
                found=self.per_token,
                fix=f"set experts.per_token={min(2, self.number)}",
            )
        if self.scoring not in ("softmax", "sigmoid"):
            raise ShapeError(
                "unknown scoring of experts",
                where="experts.scoring",
                expected="softmax or sigmoid",
                found=self.scoring,
                fix="softmax is usual",
            )


@dataclass(frozen=True)
class Share(Element):
    """How much each part of a mixture counts."""


OnDevices = Callable[[Tensor], Tensor]  # what has to be done where a tensor lies on several devices


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself: it lies on one device."""
    return tensor


class Routing(NamedTuple):
    """The experts each token uses, and how much each counts. Shape: [..., experts per token]."""

    experts: Annotated[Tensor, NeuralType("... Any", Index())]
    weights: Annotated[Tensor, NeuralType("... Any", Share())]


class Router(NeuralModule):
    """Choose experts for each token, and keep the choice even (final).

    The auxiliary losses are sums over tokens, like the loss itself, and are attached to the weights: they add
    their gradient when the one of the loss comes by. So they need no wire of their own. ``seed`` is the
    gradient of what is trained with respect to a loss sum; see :func:`seed_auxiliary_losses`.

    Args:
        width: model width D.
        mixture: how experts are chosen.
        init_std: standard deviation of the initial weights.

    Shape: hidden_BTD -> experts and weights [B, T, experts per token]; weight ``Any D``: every rank scores all experts,
    so this axis is not the E over which they are spread.

    Example:
        >>> routing = Router(4, Mixture(8, 2))(torch.randn(1, 3, 4))
        >>> routing.experts.shape, torch.allclose(routing.weights.sum(-1), torch.ones(1, 3))
        (torch.Size([1, 3, 2]), True)
    """

    seed: Tensor
    bias: Tensor
    load: Tensor

    def __init__(self, width: int, mixture: Mixture, *, init_std: float = 0.02) -> None:
        super().__init__(D=width)
        self.mixture = mixture
        self.weight = nn.Parameter(torch.empty(mixture.number, width).normal_(std=init_std))
        self.declare_axes(weight=f"Any={mixture.number} D")
        self.register_buffer("seed", torch.ones((), dtype=torch.float32), persistent=False)
        # Only a biased choice has something to remember: the bias for good, the loads until the next step.
        self.register_buffer("bias", torch.zeros(mixture.number), persistent=mixture.balance_rate > 0)
        self.register_buffer("load", torch.zeros(mixture.number), persistent=False)
        self.sum_over_sequence: OnDevices = whole  # where a sequence lies on several devices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Follow the model to another device, but not to half precision, in which counts would be wrong."""
        before = {name: getattr(self, name) for name in ("seed", "bias", "load")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            device = getattr(self, name).device
            fresh = old.is_meta and device.type != "meta"
            made = torch.full(old.shape, float(name == "seed"), device=device) if fresh else old.to(device)
            setattr(self, name, made)
        return self

    def forward(self, hidden: HiddenRestD) -> Routing:
        mixture = self.mixture
        logits_BTE = F.linear(hidden, self.weight)
        logits_BTE = logits_BTE.to(torch.promote_types(logits_BTE.dtype, torch.float32))
        scores_BTE = logits_BTE.softmax(-1) if mixture.scoring == "softmax" else logits_BTE.sigmoid()
        preferred_BTE = scores_BTE.detach() + self.bias if mixture.balance_rate else scores_BTE.detach()
        chosen = preferred_BTE.topk(mixture.per_token, dim=-1).indices
        weights = scores_BTE.gather(-1, chosen)
        if mixture.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * mixture.scale
        if self.training:
            if mixture.balance_rate:
                self.load += torch.zeros_like(self.load).scatter_add_(
                    0, chosen.flatten(), torch.ones_like(chosen.flatten(), dtype=self.load.dtype)
                )
            if mixture.balance_loss or mixture.z_loss:
                weights = _Attach.apply(weights, self.auxiliary_loss(logits_BTE, scores_BTE, chosen), self.seed)
        return Routing(chosen, weights)

    def auxiliary_loss(self, logits_BTE: Tensor, scores_BTE: Tensor, chosen: Tensor) -> Tensor:
        """The auxiliary losses of these tokens, summed over them.

        For each sequence: E times the dot product of how often experts were chosen and how probable they were
        (Fedus et al., 2022), times its tokens. Sequences are independent of each other, so it does not matter
        how they are spread over micro-batches and ranks.
        """
        loss = logits_BTE.new_zeros(())
        if self.mixture.balance_loss:
            chosen_BN = chosen.flatten(1)
            counts_BE = scores_BTE.new_zeros(chosen.shape[0], self.mixture.number)
            counts_BE.scatter_add_(1, chosen_BN, torch.ones_like(chosen_BN, dtype=counts_BE.dtype))
            counts_BE = self.sum_over_sequence(counts_BE)
            often_BE = counts_BE / counts_BE.sum(-1, keepdim=True)
            probable_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).sum(1)
            loss = loss + self.mixture.balance_loss * self.mixture.number * (often_BE * probable_BE).sum()
        if self.mixture.z_loss:
            loss = loss + self.mixture.z_loss * logits_BTE.logsumexp(-1).square().sum()
        return loss


class _Attach(torch.autograd.Function):
    """Pass weights through, and start the gradient of a loss on the way back."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, seed: Tensor) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.dtype = loss.dtype
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (seed,) = ctx.saved_tensors
        return grad, seed.to(ctx.dtype), None


def routers(module: nn.Module) -> Iterator[Router]:
    """All routers inside a module."""
    return (child for child in module.modules() if isinstance(child, Router))


def seed_auxiliary_losses(module: nn.Module, seed: float | Tensor) -> None:
    """Say how much one unit of a loss sum counts in what is trained, before the forward pass.

    Where ``(loss / n).backward()`` runs, the seed is 1 / n; a loss scaler multiplies it.
    """
    for router in routers(module):
        router.seed.copy_(seed) if isinstance(seed, Tensor) else router.seed.fill_(seed)


@torch.no_grad()
def balance_experts(module: nn.Module, reduce: OnDevices = whole) -> None:
    """Move the bias of each router against its load since the last step; to be called once a step.

    Args:
        module: that has the routers.
        reduce: the sum over all ranks with the same layers. Ranks that saw the same tokens may count twice,
            since only the sign of a load against the mean matters.
    """
    for router in routers(module):
        if router.mixture.balance_rate:
            load_E = reduce(router.sum_over_sequence(router.load.clone()))
            router.bias += router.mixture.balance_rate * (load_E.mean() - load_E).sign()
            router.load.zero_()
