"""Learning rates that fall with the distance from the output: what is general changes less than what is new."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nemolet.errors import TrainingError
from nemolet.training.optim import Optim, PartOf, itself


@dataclass(frozen=True)
class LayeredOptim(Optim):
    """AdamW whose learning rate falls from layer to layer towards the input (Howard and Ruder, 2018; final).

    Args:
        layer_decay: the rate of a layer over that of the layer above it; what lies above all layers has the full rate.

    Example:
        >>> import nemolet as nl
        >>> model = nl.language.CausalLM(vocab_size=9, layers=2, width=8, heads=2)
        >>> optimizer = LayeredOptim(lr=1.0, layer_decay=0.5).make(model)
        >>> sorted({group["lr"] for group in optimizer.param_groups})
        [0.125, 0.25, 0.5, 1.0]
    """

    layer_decay: float = 1.0

    def make(self, module: nn.Module, part_of: PartOf = itself) -> Optimizer:
        """The optimizer of a module's parameters, or of what is updated in their place."""
        optimizer = super().make(module, part_of)
        if self.layer_decay == 1:
            return optimizer
        if not isinstance(optimizer, torch.optim.AdamW):
            raise TrainingError("layers have rates of their own with adamw only", where="optim.layer_decay")
        known = depth_of_parameters(module)
        depths = {id(part_of(p)): known[id(p)] for p in module.parameters() if p.requires_grad}
        top = max(depths.values())
        groups: dict[tuple[int, int], dict[str, Any]] = {}
        for index, group in enumerate(optimizer.param_groups):
            for named in zip(group["param_names"], group["params"]):
                depth = depths[id(named[1])]
                rate = group["lr"] * self.layer_decay ** (top - depth)
                own = {"params": [], "lr": rate, "weight_decay": group["weight_decay"]}
                groups.setdefault((index, depth), own)["params"].append(named)
        return self._adamw(list(groups.values()))


def depth_of_parameters(module: nn.Module) -> dict[int, int]:
    """The layer of each parameter by its ``id``: embeddings are 0, the blocks of a stack 1 and up, then the rest."""
    names = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    numbers = {name: re.search(r"(?:^|\.)blocks\.(\d+)\.", name) for name, _ in names}
    blocks = [int(found[1]) for found in numbers.values() if found]
    above = max(blocks, default=-1) + 2
    depths = {}
    for name, parameter in names:
        found = numbers[name]
        entry = re.search(r"(?:^|\.)(embed|position|tokens|types)\.", name)
        depths[id(parameter)] = int(found[1]) + 1 if found else 0 if entry else above
    return depths
