"""Weights in fewer bits, for layers that are not trained."""

from __future__ import annotations

import math

from torch import Tensor

from nemolet.errors import ShapeError, needs

BLOCK, BLOCKS = 64, 256  # numbers that share a scale, and scales that share one themselves


def nf4(weight: Tensor, *, where: str = "weight") -> Tensor:
    """A weight in four bits a number, by quantiles of a normal distribution (NF4: Dettmers et al., 2023).

    The result is a tensor of torchao: it can be multiplied with, and :func:`numbers` gives back what it stands for.

    Args:
        weight: any matrix of whole blocks of 64 numbers.
        where: it is, for people.

    Raises:
        ShapeError: for another matrix.
        MissingPackageError: without torchao.
    """
    check_nf4(weight, where=where)
    from torchao.quantization import to_nf4

    quantized: Tensor = to_nf4(weight, BLOCK, math.gcd(weight.numel() // BLOCK, BLOCKS))
    return quantized


def check_nf4(weight: Tensor, *, where: str) -> None:
    """Raise what :func:`nf4` would, without its work."""
    with needs("torchao", extra="quantize"):
        from torchao.quantization import to_nf4  # noqa: F401

    if weight.numel() % BLOCK:
        raise ShapeError(
            "this weight cannot be quantized",
            where=where,
            expected=f"a multiple of {BLOCK} numbers",
            found=f"{tuple(weight.shape)}, {weight.numel()} numbers",
            fix="leave the layer out of adapter.targets, or set adapter.quantize=null",
        )


def numbers(weight: Tensor) -> Tensor:
    """What a weight stands for, quantized or not."""
    plain: Tensor = weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight
    return plain
