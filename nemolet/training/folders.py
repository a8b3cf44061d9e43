"""From Lightning's checkpoint of a sharded run to a folder of shards, and back into any layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nemolet.errors import TrainingError
from nemolet.parallel.checkpoint import Entry, ShardReader, ShardWriter, compare
from nemolet.parallel.gradients import local, own_part
from nemolet.training.checkpoint import LAST, load_file, point
from nemolet.training.optim import Pair

WEIGHTS, OPTIMIZER, CALLBACKS = "weights.", "optimizer.", "callbacks"
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


class FolderCheckpoints(CheckpointIO):
    """Writes folders of shards; all ranks call it together (final).

    Args:
        background: copy the state to the memory of the host and write the copy while training goes on.
    """

    def __init__(self, *, background: bool = False) -> None:
        self.background = background
        self._writer: ShardWriter | None = None  # made when needed: trainers are copied between processes

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write the state, or start to; then move the link ``last`` to it."""
        self._writer = self._writer or ShardWriter(background=self.background, done=_point_last)
        self._writer.write(Path(path), *split(checkpoint))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: Any = None
    ) -> dict[str, Any]:
        """What is not in the shards."""
        return reader(Path(path)).rest()

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a folder."""
        shutil.rmtree(path, ignore_errors=True)

    def wait(self) -> None:
        """Until the last one is on the disk; raises what went wrong there."""
        if self._writer is not None:
            self._writer.wait()

    def teardown(self) -> None:
        """Finish writing."""
        if self._writer is not None:
            self._writer.close()


def _point_last(path: Path) -> None:
    point(path.parent / LAST, path)


def split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the rest of a checkpoint.

    Args:
        checkpoint: of Lightning; ``optimizer_states`` by the names of parameters.

    Example:
        >>> tensors, rest = split({"state_dict": {"w": torch.ones(1)}, "epoch": 3})
        >>> list(tensors), rest
        (['weights.w'], {'epoch': 3, 'callbacks': {}})
    """
    rest = dict(checkpoint)
    tensors = {f"{WEIGHTS}{name}": tensor for name, tensor in rest.pop("state_dict").items()}
    for optimizer in rest.pop("optimizer_states", ()):
        for name, slots in optimizer.items():
            tensors |= {f"{OPTIMIZER}{name}.{slot}": value for slot, value in slots.items()}
    rest["callbacks"] = {
        key: _without_tensors(state, (CALLBACKS, str(key)), tensors) for key, state in rest.get("callbacks", {}).items()
    }
    return tensors, rest


def _without_tensors(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """A state without the tensors in its dictionaries, which are added to ``tensors`` under their path."""
    if not isinstance(value, dict):
        return value
    kept: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Tensor):
            tensors["::".join((*path, str(key)))] = item
        else:
            kept[key] = _without_tensors(item, (*path, str(key)), tensors)
    return kept


# --------------------------------------------------------------------------------------------------
# The state of this rank
# --------------------------------------------------------------------------------------------------


def names_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they have in a model that nothing was done to; a tied one has its first name."""
    return {_plain(name, module): parameter for name, parameter in module.named_parameters()}


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, each once."""
    known: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            known.add(id(tensor))
            tensors[_plain(name, module)] = tensor.detach()
    return tensors


@torch.no_grad()
def take_whole(model: nn.Module, read: Callable[[str], Tensor], aliases: Mapping[str, str]) -> None:
    """Give a model whole weights on the host, in the place of those it has or of their parts.

    Args:
        model: that is not run any more.
        read: a weight by its name.
        aliases: from second names of tied weights, which stages of a pipeline hold apart, to their first.
    """
    owners: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                owners.setdefault(id(tensor), []).append((held, key))
    named: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), (_plain(name, model), tensor))
    made: dict[str, Tensor] = {}
    for name, tensor in named.values():
        first = aliases.get(name, name)
        if first not in made:
            value = read(first).detach().to("cpu", tensor.dtype, copy=True)
            made[first] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        for held, key in owners[id(tensor)]:
            held[key] = made[first]


def _plain(name: str, module: nn.Module) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    aliases: Mapping[str, str] = getattr(module, "aliases", {})
    return aliases.get(name, name)


def single(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """The optimizers of torch behind one."""
    optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning's wrapper
    return optimizer.both if isinstance(optimizer, Pair) else (optimizer,)


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """What an optimizer remembers, by the name of the parameter and of the slot.

    Raises:
        TrainingError: for an optimizer that remembers something else than tensors.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for inner in single(optimizer):
        for parameter, state in inner.state.items():
            slots = {slot: value for slot, value in state.items() if value is not None}
            odd = [slot for slot, value in slots.items() if not isinstance(value, Tensor)]
            if odd:
                raise TrainingError(
                    "this optimizer keeps what shards cannot hold",
                    where=type(inner).__name__,
                    expected="tensors",
                    found=f"{odd[0]}: {type(slots[odd[0]]).__name__}",
                    fix="use an optimizer of nemolet.training.Optim",
                )
            found[names[id(parameter)]] = slots
    return found


# --------------------------------------------------------------------------------------------------
# Reading into any layout
# --------------------------------------------------------------------------------------------------


class Reader(Protocol):
    """A checkpoint to read tensors from."""

    path: Path
    entries: dict[str, Entry]

    def rest(self) -> dict[str, Any]: ...

    def read(self, tensors: Mapping[str, Tensor]) -> None: ...

    def one(self, name: str) -> Tensor: ...


def reader(path: Path, *, optimizer: bool = True) -> Reader:
    """A folder of shards, or the single file of a run on one rank; there the state of the optimizer may be left out."""
    return ShardReader(path) if path.is_dir() else FileReader(path, optimizer=optimizer)


class FileReader:
    """Reads the single file of a run on one rank into the parts of many (final).

    Args:
        path: of the file.
        optimizer: whether the state of the optimizer is read.

    Raises:
        TrainingError: for an optimizer that does not name its parameters.
    """

    def __init__(self, path: Path, *, optimizer: bool = True) -> None:
        self.path = path
        content = load_file(path, mmap=True)
        content["state_dict"] = _each_once(content["state_dict"])
        content["optimizer_states"] = [
            _by_name(inner, path)
            for state in (content.get("optimizer_states", ()) if optimizer else ())
            for inner in ((state["first"], state["second"]) if "first" in state else (state,))
        ]
        self.tensors, self._rest = split(content)
        self.entries = {name: Entry(tensor.shape, tensor.dtype) for name, tensor in self.tensors.items()}

    def rest(self) -> dict[str, Any]:
        """What is not a tensor of a parameter."""
        return self._rest

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors, whole or in parts."""
        compare(self.path, self.entries, tensors)
        for name, tensor in tensors.items():
            whole = self.tensors[name].to(tensor.device)
            local(tensor).copy_(own_part(whole, tensor))

    def one(self, name: str) -> Tensor:
        """One whole tensor."""
        return self.tensors[name]


def _each_once(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without second names of tied ones, which lie in the same memory."""
    known: set[tuple[Any, ...]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape) if tensor.numel() else (name,)
        if place not in known:
            known.add(place)
            kept[name] = tensor
    return kept


def _by_name(state: Mapping[str, Any], path: Path) -> dict[str, dict[str, Tensor]]:
    """The state of an optimizer by the names in its groups, which count from the graph."""
    groups = state["param_groups"]
    names = {i: f"graph.{n}" for g in groups for i, n in zip(g["params"], g.get("param_names", ()))}
    nameless = [index for index in state["state"] if index not in names]
    if nameless:
        raise TrainingError(
            "the optimizer of the checkpoint does not name its parameters",
            where=str(path),
            expected="param_names in its groups, as an optimizer has that was made of named parameters",
            found=f"{len(nameless)} of {len(state['state'])} without a name",
            fix="resume on one rank without a mesh",
        )
    return {names[index]: slots for index, slots in state["state"].items()}


def read_state(
    source: Reader,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    whole: bool,
    updated: Mapping[str, nn.Parameter] | None = None,
) -> dict[str, Any]:
    """Fill a module and its optimizers, however they are cut, and return the rest of the checkpoint.

    Args:
        source: the checkpoint.
        module: what it is read into.
        optimizers: of the module; none to read weights only.
        whole: whether this rank holds a part of every parameter, so that what is unknown here is unknown.
        updated: what the optimizers update, by the name of the parameter; None for the parameters themselves.

    Raises:
        TrainingError: for the checkpoint of another model or another optimizer.
    """
    weights = {f"{WEIGHTS}{name}": tensor for name, tensor in weights_of(module).items()}
    compare(source.path, source.entries, weights, prefix=WEIGHTS if whole else None)
    parameters = names_of(module)
    updated = parameters if updated is None else updated
    rest = source.rest()
    inner = [each for optimizer in optimizers for each in single(optimizer)]
    slots: dict[str, dict[str, Tensor]] = {}
    if optimizers:
        _same_optimizers(source, rest, inner)
        for key, entry in source.entries.items():
            if key.startswith(OPTIMIZER):
                name, slot = key.removeprefix(OPTIMIZER).rsplit(".", 1)
                if name in updated:
                    slots.setdefault(name, {})[slot] = _empty(entry, updated[name])
    noted = {
        key: _empty(entry, parameters.get(key.rsplit("::", 1)[-1]))
        for key, entry in source.entries.items()
        if key.startswith(f"{CALLBACKS}::")
    }
    named = {f"{OPTIMIZER}{n}.{slot}": value for n, values in slots.items() for slot, value in values.items()}
    source.read({**weights, **named, **noted})
    for optimizer in optimizers:
        _fill(optimizer, updated, slots)
    for key, tensor in noted.items():
        _insert(rest, key.split("::"), tensor)
    return {**rest, "state_dict": {}, "optimizer_states": []}


def _empty(entry: Entry, like: Tensor | None) -> Tensor:
    """Room for a tensor: cut as the parameter it belongs to, where it has its shape."""
    if like is not None and like.shape == entry.shape:
        return torch.zeros_like(like.detach(), dtype=entry.dtype)
    return torch.zeros(entry.shape, dtype=entry.dtype)


def _same_optimizers(source: Reader, rest: Mapping[str, Any], inner: Iterable[Optimizer]) -> None:
    before, now = rest.get("optimizers"), kinds(inner)
    if before is not None and list(before) != now:
        raise TrainingError(
            "the checkpoint is of another optimizer",
            where=str(source.path),
            expected=", ".join(now),
            found=", ".join(before),
            fix="choose the optimizer that wrote it, or train under another name",
        )


def kinds(optimizers: Iterable[Optimizer]) -> list[str]:
    """The names of optimizers, whether they see whole parameters or parts."""
    return [type(optimizer).__name__.removeprefix("Sharded") for optimizer in optimizers]


def _fill(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], slots: Mapping[str, dict[str, Tensor]]) -> None:
    names = {id(parameter): name for name, parameter in parameters.items()}
    states = []
    for inner in single(optimizer):
        ordered = [names[id(p)] for group in inner.param_groups for p in group["params"]]
        state = {index: slots[name] for index, name in enumerate(ordered) if name in slots}
        states.append({"state": state, "param_groups": inner.state_dict()["param_groups"]})
    whole = states[0] if len(states) == 1 else dict(zip(("first", "second"), states))
    getattr(optimizer, "_optimizer", optimizer).load_state_dict(whole)


def _insert(rest: dict[str, Any], path: list[str], tensor: Tensor) -> None:
    place = rest
    for key in path[:-1]:
        place = place.setdefault(key, {})
    place[path[-1]] = tensor


def same_place(scheduler: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a schedule for groups of parameters that may be cut otherwise than when it was saved."""
    own, state = scheduler.state_dict(), dict(saved)
    groups = scheduler.optimizer.param_groups
    if len(groups) != len(saved["_last_lr"]):
        if not isinstance(scheduler, LambdaLR):
            raise TrainingError(
                "the schedule knows other groups of parameters",
                where=type(scheduler).__name__,
                expected=f"{len(groups)} groups",
                found=len(saved["_last_lr"]),
                fix="resume in the layout that wrote the checkpoint, or use a schedule of nemolet.training",
            )
        step = saved["last_epoch"]
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
        state = {**own, "last_epoch": step, "_step_count": saved["_step_count"], "_last_lr": rates}
    for group, rate in zip(groups, state["_last_lr"]):
        group["lr"] = rate
    return state
