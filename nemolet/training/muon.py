"""Muon: momentum whose directions are of one length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nemolet.nn.prepacking import has_products
from nemolet.parallel.gradients import gathered, local, own_part

_QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero, and within 0.7 to 1.2 after five rounds
_ROUNDS = 5


class Muon(Optimizer):
    """Nesterov's momentum of matrices, made orthogonal (Jordan et al., 2024) (final).

    As :class:`torch.optim.Muon` with the step of AdamW's size (Liu et al., 2025), with two differences. A matrix of
    which every rank holds a part is gathered, as its direction depends on all of it. And a processor that has no
    products in bfloat16 iterates in float32, where torch takes many times as long.

    Args:
        groups: parameters with two dims, whole or in parts, and what is particular to them.
        lr: learning rate; an update has the mean square that AdamW's would have.
        momentum: of the gradient.
        weight_decay: for each step, in parts of ``lr``.

    Example:
        >>> weight = nn.Parameter(torch.eye(2))
        >>> (3 * weight).sum().backward()
        >>> Muon([weight], lr=0.1).step()
        >>> bool(weight[0, 0] < 1)
        True
    """

    def __init__(self, groups: Any, *, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        momentum, gradient = local(state["momentum_buffer"]), local(parameter.grad)
        momentum.lerp_(gradient, 1 - group["momentum"])
        matrix = gathered(gradient.lerp(momentum, group["momentum"]), parameter)
        update = own_part(orthogonal(matrix), parameter)
        size = 0.2 * math.sqrt(max(matrix.shape))
        weight = local(parameter.data)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix whose rows, or columns, are orthogonal and of length 1 (singular values of 0.7 to 1.2).

    By iterations of Newton and Schulz, in bfloat16 where products in it are fast.

    Example:
        >>> directions = orthogonal(torch.tensor([[9.0, 0.0], [0.0, 1.0]]))
        >>> bool((directions.diagonal() > 0.6).all())
        True
    """
    slow = matrix.device.type == "cpu" and not has_products(torch.bfloat16)
    wide = matrix.float() if slow else matrix.bfloat16()
    tall = matrix.shape[0] > matrix.shape[1]
    wide = wide.T if tall else wide
    wide = wide / wide.norm().clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if tall else wide
