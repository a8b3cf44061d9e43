"""Weights laid out as the products of a CPU read them, while nothing is trained."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.nn.embedding import Head
from nemolet.nn.linear import Linear

_ROWS = 64  # the layout for so many rows serves one row and thousands as well


class PackedProduct:
    """The product with one weight, which oneDNN has laid out in blocks once instead of at each product (final).

    That happens at the second product, as it takes longer than it saves at a single one, such as that of a prompt. A
    weight that another one has replaced, or that was changed in place, is laid out anew. What needs gradients, another
    precision or a graph of operations gets the ordinary product.

    Args:
        dtype: of the weight, float32 or bfloat16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.multiply = torch.ops.mkldnn._linear_pointwise.default
        self.wide_registers = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        self.source: Tensor | None = None  # held, so that its place is no other's
        self.state: tuple[int, int] | None = None
        self.blocks: Tensor | None = None

    def gains(self, rows: int, outputs: int) -> bool:
        """Whether so many rows take less time: with AVX2 alone neither one nor, but in a head, hundreds do."""
        return self.wide_registers or (rows > 1 and (rows <= 96 or outputs > 8192))

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ordinary = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        ordinary = ordinary or not self.gains(hidden.numel() // hidden.shape[-1], weight.shape[0])
        ordinary = ordinary or weight.is_inference()  # whose changes are not counted
        if ordinary or not hidden.dtype is weight.dtype is self.dtype or weight.device.type != "cpu":
            return F.linear(hidden, weight, bias)
        if _state(weight) != self.state:  # the first product may be the only one
            self.source, self.state, self.blocks = weight, _state(weight), None
            return F.linear(hidden, weight, bias)
        if self.blocks is None:
            self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        out: Tensor = self.multiply(hidden, self.blocks, bias, "none", [], "")
        return out


def pack(model: nn.Module) -> list[Linear | Head]:
    """Let linear layers and heads on a CPU multiply with weights laid out for it, while the weights stay as they are.

    One row at a time, as in decoding, takes two thirds of the time with AVX512 and as long as before with AVX2, eight
    rows half to three quarters, hundreds up to a tenth less with AVX512, and with AVX2 in a head a quarter less. The
    layouts take the memory of the weights once more.

    Args:
        model: that is not trained any more; for a while only, see :func:`packed`.

    Returns:
        The layers that do now. Not among them are those on another device, those whose weights are spread over ranks or
        held in four bits, and none at all where the weights fill more than a quarter of the machine's memory.

    Example:
        >>> len(pack(Linear("D", "F", 64, 32))) in (0, 1)  # by machine
        True
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Linear | Head) and _gains(layer)]
    if sum(layer.weight.nbytes for layer in layers) > _memory() // 4:
        return []
    for layer in layers:
        layer.product = PackedProduct(layer.weight.dtype)
    return layers


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside the block, weights are laid out as by :func:`pack`, and anew when an optimizer, an adapter or
    ``load_state_dict`` has changed them. Only a change through ``.data`` is not seen.

    Example:
        >>> model = Linear("D", "F", 64, 32)
        >>> hidden = torch.randn(1, 64)
        >>> with packed(model), torch.inference_mode():
        ...     same = torch.allclose(model(hidden), hidden @ model.weight.T, atol=1e-5)
        >>> same, model.product is F.linear
        (True, True)
    """
    layers = pack(model)
    try:
        yield
    finally:
        unpack(layers)


def unpack(layers: Iterable[Linear | Head]) -> None:
    """Give layers their ordinary product back."""
    for layer in layers:
        layer.product = F.linear


def _state(weight: Tensor) -> tuple[int, int]:
    """Where the numbers lie, and how often they were changed there; views of one tensor count together."""
    return weight.data_ptr(), weight._version


def _gains(layer: Linear | Head) -> bool:
    weight = layer.weight
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and layer.product is F.linear
    counted = not weight.is_inference()  # whose changes are not
    return plain and counted and _has_layouts() and has_products(weight.dtype)


def has_products(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have fast matrix products of numbers of a type.

    Example:
        >>> has_products(torch.float64)
        False
    """
    has = torch.backends.mkldnn.is_available()
    if dtype is torch.bfloat16:
        return has and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return has and dtype is torch.float32


def _has_layouts() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
