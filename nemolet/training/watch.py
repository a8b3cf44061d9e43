"""Where a number that is none came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nemolet.parallel.gradients import local


def first_bad_module(graph: nn.Module, run: Callable[[], Any]) -> str:
    """The first module, in running order, whose weights or output are not finite; else the last with such gradients.

    Args:
        graph: the modules.
        run: the forward pass that is looked at.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> _ = net[1].weight.data.fill_(float("nan"))
        >>> first_bad_module(net, lambda: net(torch.ones(1, 1)))
        '1: weight'
    """
    found: list[str] = []
    order: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            order.append(name)
            bad = [n for n, p in module.named_parameters(recurse=False) if not local(p).isfinite().all()]
            if bad:
                found.append(f"{name}: {bad[0]}")
            elif any(t.is_floating_point() and not local(t).isfinite().all() for t in _tensors(output)):
                found.append(f"{name}: output")

        return hook

    modules = {name: module for name, module in graph.named_modules() if name}
    handles = [module.register_forward_hook(look(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    for name in reversed(order):  # gradients flow backwards, so the last module spoils those before it
        for parameter_name, parameter in modules[name].named_parameters(recurse=False):
            if parameter.grad is not None and not local(parameter.grad).isfinite().all():
                return f"{name}: gradient of {parameter_name}"
    return "the gradients"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for item in value.values() for t in _tensors(item))
    elif isinstance(value, (list, tuple)):
        yield from (t for item in value for t in _tensors(item))
