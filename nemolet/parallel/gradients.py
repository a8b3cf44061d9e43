"""Gradients of which every rank holds a part: their norm and their scaling, over all meshes at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from nemolet.errors import TrainingError


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank; it shares the memory of the whole.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, from the parts that lie on all ranks as those of another one do."""
    if not isinstance(like, DTensor):
        return part
    cut = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return cut.full_tensor()


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this rank holds of another one; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def parts(tensor: Tensor) -> int:
    """Into how many parts a tensor is cut: one for each rank that holds another piece of it."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = [tensor.device_mesh.size(dim) for dim, placement in enumerate(tensor.placements) if _cut(placement)]
    return int(torch.Size(sizes).numel())


def _cut(placement: Any) -> bool:
    return not placement.is_replicate() and not placement.is_partial()


class Gradients:
    """The gradients of a module, wherever their parts lie (final).

    Every part of a gradient counts once in the norm. A rank adds the squares of its own parts, each divided by
    the number of ranks that hold the same part; one sum over all ranks then is the square of the norm. This needs
    no word about which meshes there are, and every rank gets the same number, bit by bit.

    Args:
        parameters: by name.
        ranks: how many ranks hold (a part of) each parameter: all of them, or those of one pipeline stage.
        holders: the same for single parameters, by name, such as a tied weight that two stages hold.
        group: the ranks over which the norm is taken; None for all.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradients = Gradients({"weight": weight})
        >>> gradients.scale(2.0)
        >>> gradients.norm().item()
        10.0
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        ranks: int = 1,
        holders: Mapping[str, int] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.parameters, self.group, self.ranks = parameters, group, ranks
        holders = holders or {}
        # A part lies on as many ranks as hold the parameter, divided by the number of its parts.
        self.shares = {name: parts(p) / holders.get(name, ranks) for name, p in parameters.items()}
        self._kept: tuple[tuple[str, ...], Tensor] | None = None

    def norm(self) -> Tensor:
        """The 2-norm of all gradients together; the same on every rank."""
        named = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if self.ranks == 1 and self.group is None:
            return torch.nn.utils.get_total_norm(named.values())
        _refuse_partial(named)
        tensors = [local(gradient) for gradient in named.values()]
        device = next((local(p).device for p in self.parameters.values()), torch.device("cpu"))
        squares = torch.zeros((), dtype=torch.float64, device=device)
        if tensors:  # a pipeline stage may hold no parameters
            squares = (torch.stack(torch._foreach_norm(tensors)).double().square() * self._shares(named, device)).sum()
        dist.all_reduce(squares, group=self.group)
        return squares.sqrt().to(tensors[0].dtype if tensors else torch.float32)

    def _shares(self, named: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """What the square of each gradient counts; kept, because making it would wait for the device."""
        if self._kept is None or self._kept[0] != tuple(named):
            shares = torch.tensor([self.shares[name] for name in named], dtype=torch.float64, device=device)
            self._kept = tuple(named), shares
        return self._kept[1]

    def scale(self, factor: Tensor | float) -> None:
        """Multiply every gradient by a number."""
        tensors = [local(p.grad) for p in self.parameters.values() if p.grad is not None]
        if tensors:
            torch._foreach_mul_(tensors, factor)


def _refuse_partial(named: Mapping[str, Tensor]) -> None:
    """A gradient that waits for a sum would be clipped by a wrong norm."""
    for name, gradient in named.items():
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            raise TrainingError(
                "a gradient is not summed over the ranks",
                where=name,
                expected="the placement of its parameter",
                found=gradient.placements,
                fix="let the layer that owns it sum it in its backward pass",
            )


class LossScale(torch.amp.GradScaler):
    """A dynamic loss scale for float16 on which all ranks agree (final).

    Each rank looks at its own parts of the gradients; a step is skipped, and the scale lowered, on all ranks where
    one of them finds a number that is not finite.

    Args:
        device: of the gradients.
        group: the ranks that have to agree; None for all.
        options: as of ``torch.amp.GradScaler``.
    """

    def __init__(self, device: str, *, group: dist.ProcessGroup | None = None, **options: Any) -> None:
        super().__init__(device, **options)
        self.group = group

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        tensors = [local(p.grad) for p in _parameters(optimizer) if p.grad is not None]
        with torch.no_grad():
            for kind in {(tensor.device, tensor.dtype) for tensor in tensors}:
                same = [tensor for tensor in tensors if (tensor.device, tensor.dtype) == kind]
                torch._amp_foreach_non_finite_check_and_unscale_(same, found_inf, inv_scale)
        if dist.is_initialized():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX, group=self.group)
        return {found_inf.device: found_inf}


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[torch.nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])


def split_by_mesh(parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """Named parameters in lists of one kind each: plain ones, and those of each mesh.

    Kernels that update many parameters at once take only tensors of one kind.
    """
    kinds: dict[Any, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in parameters:
        kind = parameter.device_mesh if isinstance(parameter, DTensor) else None
        kinds.setdefault(kind, []).append((name, parameter))
    return list(kinds.values())
