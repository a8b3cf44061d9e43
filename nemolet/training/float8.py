"""Products of linear layers in eight bits, where training asks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nemolet.errors import TrainingError, needs
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
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        result: Tensor = self.apply(hidden, weight.t(), *self.settings)
        return result if bias is None else result + bias.to(result.dtype)


def use_float8(graph: nn.Module, *, emulate: bool = False) -> list[str]:
    """Let the linear layers of a graph multiply in eight bits; heads, embeddings and convolutions stay as they are.

    Args:
        graph: that is trained.
        emulate: see :class:`Float8Product`.

    Returns:
        Names of the linear layers that stay as they are, since a size is no multiple of 16.

    Raises:
        TrainingError: for a device without such products.
    """
    if not emulate:
        _check_device()
    product, odd = Float8Product(emulate=emulate), []
    for name, module in graph.named_modules():
        if isinstance(module, Linear):
            if any(size % _MULTIPLE for size in module.weight.shape):
                odd.append(name)
            else:
                module.product = product
    return odd


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
