"""Optimizers and their parameter groups, made from the declared axes of parameters."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from nemolet.errors import TrainingError
from nemolet.module import NeuralModule
from nemolet.parallel.gradients import split_by_mesh
from nemolet.rules import Checked
from nemolet.training.muon import Muon
from nemolet.types import Axis

NamedParameter = tuple[str, nn.Parameter]
PartOf = Callable[[nn.Parameter], nn.Parameter]


def itself(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter is updated as it is."""
    return parameter


@dataclass(frozen=True)
class Optim(Checked):
    """How weights are updated.

    Args:
        name: ``"adamw"``; ``"muon"`` for the matrices inside the network, with AdamW for the rest (Jordan et al.,
            2024); ``"adafactor"`` where memory is short (Shazeer and Stern, 2018).
        lr: learning rate; the peak of the schedule. Muon's is scaled so that one value serves both halves.
        weight_decay: of matrices, embeddings and heads; norms, biases and learned positions have none.
        betas: of AdamW.
        eps: of AdamW.
        momentum: of Muon.
        muon_lr: learning rate of Muon; None for ``lr``.
        fused: AdamW in one kernel; None where that is faster.
    """

    name: Literal["adamw", "muon", "adafactor"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    muon_lr: float | None = None
    fused: bool | None = None

    CONFIG_RULES = (
        ("lr > 0", "the learning rate is above 0"),
        ("muon_lr > 0", "muon_lr is above 0; null for lr"),
        ("weight_decay >= 0", "weight decay is at least 0"),
        ("momentum >= 0 and momentum < 1", "momentum is at least 0 and below 1"),
        ("betas[0] >= 0 and betas[0] < 1 and betas[1] >= 0 and betas[1] < 1", "betas are at least 0 and below 1"),
        ("eps >= 0", "eps is at least 0"),
    )

    def make(self, module: nn.Module, part_of: PartOf = itself) -> Optimizer:
        """The optimizer of a module's parameters; its groups know their names.

        Args:
            module: whose parameters they are.
            part_of: what is updated in the place of a parameter.
        """
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        named = {
            kind: [(names[id(parameter)], part_of(parameter)) for parameter in parameters]
            for kind, parameters in group_parameters(module).items()
        }
        groups = {kind: split_by_mesh(parameters) for kind, parameters in named.items()}
        if self.name == "adamw":  # one kernel for each group, so as few groups as possible
            decayed = split_by_mesh(named["matrix"] + named["table"])
            return self._adamw(_groups(decayed, self.weight_decay) + _groups(groups["vector"], 0.0))
        if self.name == "adafactor":
            return self._adafactor(groups)
        if not groups["matrix"]:
            raise TrainingError(
                "there is no matrix for Muon",
                where="optim.name",
                expected="a parameter with two axes inside the network",
                found="none",
                fix="set optim=adamw",
            )
        muon = Muon(_groups(groups["matrix"], self.weight_decay), lr=self.muon_lr or self.lr, momentum=self.momentum)
        rest = _groups(groups["table"], self.weight_decay) + _groups(groups["vector"], 0.0)
        return Pair(muon, self._adamw(rest))

    def _adamw(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.AdamW(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=True if self.fused is None else self.fused,
        )

    def _adafactor(self, groups: dict[str, list[list[NamedParameter]]]) -> Optimizer:
        cut = [name for kind in groups.values() for part in kind for name, p in part if isinstance(p, DTensor)]
        if cut:
            raise TrainingError(
                "Adafactor needs whole rows and columns",
                where="optim.name",
                expected="whole parameters",
                found=f"{len(cut)} parameters in parts, such as {cut[0]}",
                fix="set optim=adamw or optim=muon, or parallel=ddp",
            )
        decayed = _groups(groups["matrix"] + groups["table"], self.weight_decay)
        return torch.optim.Adafactor(decayed + _groups(groups["vector"], 0.0), lr=self.lr)


def _groups(parts: list[list[NamedParameter]], weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": part, "weight_decay": weight_decay} for part in parts]


def group_parameters(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by their axes: ``matrix`` (inside the network), ``table`` (rows that are looked up: a
    vocabulary, or so many numbers; kernels of convolutions too), ``vector`` (no decay).

    A parameter whose axes are not declared is told by its number of dims alone.

    Example:
        >>> import nemolet as nl
        >>> groups = group_parameters(nl.language.CausalLM(vocab_size=9, layers=1, width=8, heads=2))
        >>> {name: len(parameters) for name, parameters in groups.items()}
        {'matrix': 5, 'table': 1, 'vector': 3}
    """
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "table": [], "vector": []}
    declared = _declared(module)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        kinds = declared.get(name, set())
        if parameter.ndim < 2 or "time" in kinds:
            groups["vector"].append(parameter)
        else:
            looked_up = kinds & {"vocabulary", "number"}
            groups["table" if looked_up or parameter.ndim > 2 else "matrix"].append(parameter)
    return groups


def _declared(module: nn.Module) -> dict[str, set[str]]:
    """What the axes of each parameter are, by its name; "number" for a dim that is one."""
    found: dict[str, set[str]] = {}
    for prefix, child in module.named_modules():
        if isinstance(child, NeuralModule):
            for name, dims in child.parameter_dims.items():
                kinds = {factor.kind for dim in dims for factor in dim if isinstance(factor, Axis)}
                if any(all(isinstance(factor, int) for factor in dim) for dim in dims):
                    kinds.add("number")
                found.setdefault(f"{prefix}.{name}" if prefix else name, kinds)
    return found


class Pair(Optimizer):
    """Two optimizers that step as one (final). Their groups are shared, so a schedule reaches both."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.both = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})
        self.param_groups = [*first.param_groups, *second.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        first, second = self.both
        loss = first.step(closure)  # which computes the gradients of both
        second.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.both:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        first, second = (optimizer.state_dict() for optimizer in self.both)
        return {"state": {}, "param_groups": [], "first": first, "second": second}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, key in zip(self.both, ("first", "second")):
            optimizer.load_state_dict(state_dict[key])
        self.param_groups = [*self.both[0].param_groups, *self.both[1].param_groups]


def states(optim: Optim, module: nn.Module) -> dict[str, int]:
    """How many numbers the optimizer keeps for each parameter, found by a step of each on shapes alone.

    Example:
        >>> import nemolet as nl
        >>> states(Optim("adamw"), nl.nn.Linear("D", "F", 8, 4))
        {'weight': 64}
    """
    made = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    shapes = copy.deepcopy(module, dict(made))
    optimizer = replace(optim, fused=False).make(shapes)
    for parameter in shapes.parameters():
        parameter.grad = torch.empty_like(parameter)
        with contextlib.suppress(RuntimeError):  # Adafactor looks at values, after it has made what it keeps
            optimizer.step()
        parameter.grad = None
    kept = {p: s for inner in getattr(optimizer, "both", (optimizer,)) for p, s in inner.state.items()}
    return {
        name: sum(value.numel() for value in kept.get(parameter, {}).values() if value.ndim)  # steps are not counted
        for name, parameter in shapes.named_parameters()
    }
