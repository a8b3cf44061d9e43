"""Products of linear layers in eight bits, where training asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.errors import ShapeError, TrainingError, needs
from nemolet.nn.adapters import AdaptedLinear
from nemolet.nn.linear import Linear

_MULTIPLE = 16  # what the products of a GPU take
_CAPABILITY = (8, 9)  # Ada and Hopper have them


class Float8Product:
    """A linear layer's product in eight bits, by torchao: one scale for each tensor, found as it comes (final).

    Weights stay as they are; they, what comes in, and the gradient are rounded for each product (Micikevicius et al.,
    2022: e4m3 forward, e5m2 for gradients).

    Args:
        emulate: multiply the rounded numbers in their own precision, on any device; for tests.
    """

    def __init__(self, *, emulate: bool = False) -> None:
        with needs("torchao", extra="quantize"):
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
            from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
        config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
        layer = nn.Sequential(nn.Linear(_MULTIPLE, _MULTIPLE, bias=False, device="meta"))
        self.settings: tuple[Any, ...] = (convert_to_float8_training(layer, config=config)[0].linear_mm_config, config)
        self.apply = matmul_with_hp_or_float8_args.apply

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product of what autocast would multiply."""
        if _is_odd(weight):  # the whole weight is not, so this is a rank's part of it
            raise ShapeError(
                "a part of a weight has no product in eight bits",
                where="parallel.tp",
                expected=f"multiples of {_MULTIPLE} on each rank",
                found=tuple(weight.shape),
                fix="set trainer.precision=bf16-mixed, or a smaller parallel.tp",
            )
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        result: Tensor = self.apply(hidden, weight.t(), *self.settings)
        return result if bias is None else result + bias.to(result.dtype)


@contextmanager
def in_float8(graph: nn.Module, *, emulate: bool = False) -> Iterator[list[str]]:
    """Let the linear layers of a graph multiply in eight bits; heads, embeddings and convolutions stay as they are.

    Args:
        graph: that is trained.
        emulate: see :class:`Float8Product`.

    Yields:
        Names of the linear layers that stay as they are: they have an addition, or a size that is no multiple of 16.

    Raises:
        TrainingError: for a device without such products.
    """
    if not emulate:
        _check_device()
    linear = {name: module for name, module in graph.named_modules() if isinstance(module, Linear | AdaptedLinear)}
    taken = [m for m in linear.values() if isinstance(m, Linear) and not _is_odd(m.weight)]
    product = Float8Product(emulate=emulate)
    for module in taken:
        module.product = product
    try:
        yield [name for name, module in linear.items() if module not in taken]
    finally:
        for module in taken:
            module.product = F.linear


def _is_odd(weight: Tensor) -> bool:
    return any(size % _MULTIPLE for size in weight.shape)


def _check_device() -> None:
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if found is None or found < _CAPABILITY:
        raise TrainingError(
            "fp8-mixed needs a GPU with products in eight bits",
            where="trainer.precision",
            expected="compute capability 8.9 or more, as Ada and Hopper have",
            found="no GPU" if found is None else f"{found[0]}.{found[1]}",
            fix="set trainer.precision=bf16-mixed",
        )
