"""Building a model without memory for its weights, and making each weight later, exactly as it would have been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from nemolet.errors import ParallelError


@dataclass
class Step:
    """One operation on tensors that do not exist yet."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]
    random: Tensor | None  # the random state before it, where that is not what the step before left


class Deferred(TorchDispatchMode):
    """Records how weights are made, instead of making them (final).

    Inside the block, tensors lie on ``meta`` and take no memory; what would fill them is written down. Later the
    same operations run one after another on the host, and each weight is handed out when it is complete. So a
    model has the same weights as when it is built on one device, whatever part of it a rank keeps, and only one
    whole weight exists at a time.

    Example:
        >>> def make():
        ...     torch.manual_seed(0)
        ...     return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
        >>> with Deferred() as deferred:
        ...     model = make()
        >>> model[1].weight.is_meta
        True
        >>> there = dict(make().named_parameters())
        >>> all(torch.equal(value, there[name]) for name, value in deferred.values(model))
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._random: Tensor | None = None
        self._meta = torch.device("meta")

    def __enter__(self) -> Deferred:
        self._meta.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._meta.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if any(t.is_meta for t in results):
            before = None
            if torch.Tag.nondeterministic_seeded in func.tags:
                state = torch.get_rng_state()
                if self._random is None or not torch.equal(state, self._random):
                    before = state  # the first draw, or somebody has sown again
                torch.empty((), device="cpu").uniform_()  # a draw leaves a trace, so that sowing again is seen
                self._random = torch.get_rng_state()
            # Of its own, since `.data = ...` gives a parameter other memory later.
            args, kwargs, results = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, results))
            self.steps.append(Step(func, args, kwargs, results, before))
        return out

    def fill_later(self, place: Tensor, read: Callable[[], Tensor]) -> None:
        """Write down that a tensor made inside the block has a value that is read from somewhere, such as a file.

        Args:
            place: the tensor, on ``meta``.
            read: gives the value, of the same shape, when it is its turn.

        Example:
            >>> with Deferred() as deferred:
            ...     layer = torch.nn.Linear(1, 1)
            ...     deferred.fill_later(layer.weight, lambda: torch.ones(1, 1))
            >>> dict(deferred.values(layer))["weight"]
            tensor([[1.]])
        """
        place = place.detach()
        self.steps.append(Step(_filled, (place, read), {}, [place], None))

    @torch.no_grad()
    def values(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters and buffers by name, in the order in which they are complete.

        Afterwards the random state is what it would be had the model been built on one device.

        Raises:
            ParallelError: for a tensor that was not made inside the block.
        """
        named = {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        yield from ((name, tensor) for name, tensor in named.items() if not tensor.is_meta)
        waiting = {name: tensor for name, tensor in named.items() if tensor.is_meta}
        last = self._last_uses()
        due: dict[int, list[str]] = {}
        for name, tensor in waiting.items():
            if _storage(tensor) not in last:
                raise ParallelError(
                    "nobody knows the value of a tensor",
                    where=name,
                    expected="a tensor made inside `with Deferred()`",
                    found="a tensor on meta from elsewhere",
                    fix="build the whole model inside the block",
                )
            due.setdefault(last[_storage(tensor)], []).append(name)
        real: dict[int, Tensor] = {}  # by storage
        for index, step in enumerate(self.steps):
            if step.random is not None:
                torch.set_rng_state(step.random)
            _replay(step, real)
            for name in due.get(index, ()):
                tensor = waiting[name]
                yield (
                    name,
                    torch.as_strided(real[_storage(tensor)], tensor.shape, tensor.stride(), tensor.storage_offset()),
                )
            for storage in {_storage(t) for t in _tensors(step)}:
                if last[storage] == index:
                    real.pop(storage, None)

    @torch.no_grad()
    def fill(self, module: nn.Module) -> None:
        """Give a module all its values, on this device.

        Raises:
            ParallelError: for a tensor that was not made inside the block.

        Example:
            >>> with Deferred() as deferred:
            ...     layer = torch.nn.Linear(2, 2)
            >>> deferred.fill(layer)
            >>> layer.weight.is_meta
            False
        """
        owners: dict[int, list[dict[str, Any]]] = {}
        for inner in module.modules():
            for held in (inner._parameters, inner._buffers):
                for tensor in held.values():
                    owners.setdefault(id(tensor), []).append(held)
        named = dict((*module.named_parameters(), *module.named_buffers()))
        for name, value in self.values(module):
            old = named[name]
            if not old.is_meta:
                continue
            value = value.clone()
            new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
            for place in owners[id(old)]:
                place.update({key: new for key, tensor in place.items() if tensor is old})

    def _last_uses(self) -> dict[int, int]:
        """For each piece of memory, the last step that touches it."""
        return {_storage(t): index for index, step in enumerate(self.steps) for t in _tensors(step) if t.is_meta}


def _filled(place: Tensor, read: Callable[[], Tensor]) -> Tensor:
    return place.copy_(read())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(step: Step) -> list[Tensor]:
    inputs = [t for t in tree_flatten((step.args, step.kwargs))[0] if isinstance(t, Tensor)]
    return [t for t in (*inputs, *step.results) if t.is_meta]


def _replay(step: Step, real: dict[int, Tensor]) -> None:
    def there(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        return torch.as_strided(real[_storage(tensor)], tensor.shape, tensor.stride(), tensor.storage_offset())

    args, kwargs = tree_map_only(Tensor, there, (step.args, step.kwargs))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    out = step.operator(*args, **kwargs)
    for meta, made in zip(step.results, [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]):
        real.setdefault(_storage(meta), made)
