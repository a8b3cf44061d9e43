"""Building a model from a config that nobody vouches for, with no more memory than its weights let expect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from nemolet.config import build
from nemolet.errors import ArchiveError, ConfigError, NemoletError, ShapeError
from nemolet.module import NeuralModule, first_names
from nemolet.tensor_files import Spec

_UNSTORED_BYTES, _BYTES_PER_NUMBER = 1 << 29, 16  # that building may take beside, and for, what is stored
_UNSTORED_CALLS, _CALLS_PER_TENSOR = 1 << 10, 64


def fits(config: dict[str, Any], specs: Mapping[str, Spec], where: str) -> None:
    """Build the model on no device and compare it with the weights, before memory is taken for it."""
    with torch.device("meta"):
        try:
            built(config, specs, where)
        except ArchiveError as error:
            if not looks_at_values(error):
                raise


def looks_at_values(error: BaseException) -> bool:
    """Whether a model could not be built without values: a class of the user's may look at them."""
    cause = error.__cause__
    if isinstance(error, ConfigError):
        return isinstance(cause, (NotImplementedError, RuntimeError)) and not isinstance(cause, RecursionError)
    return cause is not None and looks_at_values(cause)


def built(config: dict[str, Any], specs: Mapping[str, Spec], where: str) -> NeuralModule:
    """The model of a config, if it has the tensors that are stored, and takes no more memory than these let expect."""
    numbers = sum(math.prod(spec.shape) for spec in specs.values())
    bound = Bounded(
        most_bytes=_UNSTORED_BYTES + _BYTES_PER_NUMBER * numbers,
        most_calls=_UNSTORED_CALLS + _CALLS_PER_TENSOR * len(specs),
    )
    try:
        with bound:
            model = build(config, where="model")
    except NemoletError as error:
        found = str(error)[:1000]
        raise ArchiveError("the model cannot be rebuilt", where=where, found=found, fix=error.fix) from error
    except Exception as error:  # hostile values meet constructors; whatever those raise is a refusal
        found = f"{type(error).__name__}: {str(error)[:1000]}"
        raise ArchiveError("the model cannot be rebuilt", where=where, found=found) from error
    if not isinstance(model, NeuralModule):
        raise ArchiveError("the config builds no model", where=where, found=str(type(model)), expected="a typed module")
    _compare(first_names(model), specs, where)
    return model


def _compare(own: Mapping[str, Tensor], specs: Mapping[str, Spec], where: str) -> None:
    pairs = [(name, specs[name], tensor) for name, tensor in own.items() if name in specs]
    odd = {
        "missing": sorted(own.keys() - specs),
        "unknown": sorted(specs.keys() - own),
        "of another shape": [
            f"{name}: {found.shape} for {tuple(tensor.shape)}"
            for name, found, tensor in pairs
            if found.shape != tuple(tensor.shape)
        ],
        "of another kind": [
            f"{name}: {found.dtype} for {tensor.dtype}"
            for name, found, tensor in pairs
            if found.dtype.is_floating_point != tensor.is_floating_point()
        ],
    }
    if any(odd.values()):
        listed = "; ".join(f"{what} {', '.join(names[:5])}" for what, names in odd.items() if names)
        raise ArchiveError(
            "the weights do not fit the model",
            where=where,
            found=listed[:1000],
            expected=f"{len(own)} tensors",
        )


class Bounded(TorchDispatchMode):
    """Stops code of this thread that makes more tensors than allowed, before their memory is taken (final).

    Everything made inside the block counts, also what lies on ``meta`` or was dropped again. Other threads are not
    seen: each has its own bound.

    Args:
        most_bytes: of all tensors together.
        most_calls: operations on tensors; what makes none is not counted.

    Raises:
        ShapeError: inside the block, for the operation that goes beyond.

    Example:
        >>> with Bounded(most_bytes=4000, most_calls=100):
        ...     torch.zeros(1001)
        Traceback (most recent call last):
            ...
        nemolet.errors.ShapeError: aten.zeros.default: more tensors are made than the bound allows
          expected  at most 4,000 bytes in 100 operations
          found     4,004 bytes in 1
    """

    def __init__(self, *, most_bytes: int, most_calls: int) -> None:
        super().__init__()
        self.most_bytes, self.most_calls = most_bytes, most_calls
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        self.bytes += _told(func, args, kwargs)
        if self.calls > self.most_calls or self.bytes > self.most_bytes:
            raise ShapeError(
                "more tensors are made than the bound allows",
                where=str(func),
                expected=f"at most {self.most_bytes:,} bytes in {self.most_calls:,} operations",
                found=f"{self.bytes:,} bytes in {self.calls:,}",
            )
        return func(*args, **kwargs)


def _told(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """How many bytes an operation is going to make: it is tried without memory. Views and changes count nothing."""
    fresh = [returned.alias_info is None for returned in func._schema.returns]
    if not any(fresh):
        return 0
    with _disable_current_modes():
        args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        try:
            made = func(*args, **kwargs)
        except (NotImplementedError, RuntimeError):
            return 0  # its size depends on values, and is no larger than what it looks at
    made = made if isinstance(made, (tuple, list)) and len(fresh) > 1 else (made,)
    tensors = tree_flatten([each for each, is_fresh in zip(made, fresh, strict=True) if is_fresh])[0]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
