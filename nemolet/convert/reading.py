"""From a Hugging Face folder to a model of ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nemolet.archive import Archive
from nemolet.config import build
from nemolet.convert.architecture import Architecture, find
from nemolet.convert.copies import NamedEntries, as_named, check_copies, head_is_tied
from nemolet.convert.fields import Config
from nemolet.convert.folder import CONFIG, Folder, blank_of, described, open_folder
from nemolet.convert.mapping import Entry, expand, expected_shapes, ours_from
from nemolet.convert.tokenizer_files import read_tokenizer
from nemolet.errors import ConversionError, NemoletError
from nemolet.module import NeuralModule
from nemolet.nn.adapter_files import fingerprint

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """How one folder is read.

    Args:
        architecture: of the folder.
        config: of our model.
        model: without data, on the meta device.
        entries: which of their tensors make which of ours.
    """

    architecture: Architecture
    config: Config
    model: NeuralModule
    entries: list[Entry]


def read(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    pickles: bool = False,
    tokenizer: bool = True,
) -> Archive:
    """Read a Hugging Face folder: a model in evaluation mode, its tokenizer, and the files beside them.

    Nothing of the folder is executed. Beside the model, at most one tensor is in memory.

    Args:
        path: of the folder, or ``hf://owner/name``.
        device: where the model goes.
        dtype: of its parameters; None for that of the file.
        pickles: whether weights of ``torch.save`` may be read where there are no others.
        tokenizer: whether its tokenizer is read too.

    Raises:
        ConversionError: naming everything that does not fit.
    """
    folder = open_folder(path, pickles=pickles)
    plan = plan_for(folder)
    text = read_tokenizer(folder, vocab_size=vocabulary(plan.config)) if tokenizer else None
    with _no_initial_values():
        model: NeuralModule = build(plan.config, where="model")
    made = ((name, tensor.to(device=device, dtype=dtype)) for name, tensor in ours_from(plan.entries, folder.weights))
    _place(model, made)
    model.comes_from(fingerprint(model))
    card = f"Read from a Hugging Face folder of {plan.architecture.name}.\n"
    archive = Archive(model.to(device).eval(), text, card, {"model": model.config()})
    return replace(archive, extra=dict(folder.carried))


def plan_for(folder: Folder) -> Plan:
    """Compare a folder with its architecture before anything is read.

    Raises:
        ConversionError: for an unknown architecture, or naming all tensors that are missing, unknown, of another
            shape or of another type.
    """
    architecture = find(folder.config)
    config = architecture.read_config(described(folder.carried, folder.path))
    if architecture.head_by_file:
        config["tied"] = head_is_tied(architecture, folder)
    try:
        with torch.device("meta"):
            model: NeuralModule = build(config, where="model")
    except NemoletError as error:
        raise ConversionError(
            "the config builds no model", where=f"{folder.path}: config.json", found=str(error)[:500]
        ) from error
    blank = blank_of(folder.config, folder.path / CONFIG) or 0
    entries = expand(architecture.rules, model, vocab=vocabulary(config), blank=blank)
    named = as_named(entries, architecture, folder.weights.specs)
    _compare(named, model, architecture, folder)
    check_copies(named, folder)
    return Plan(architecture, config, model, named.entries)


def vocabulary(config: Mapping[str, Any]) -> int:
    """The number of tokens of a model's config, wherever in it that is said."""
    found = [
        v if k == "vocab_size" else vocabulary(v)
        for k, v in config.items()
        if k == "vocab_size" or isinstance(v, Mapping)
    ]
    return max((int(value) for value in found if value), default=0)


def _compare(named: NamedEntries, model: NeuralModule, architecture: Architecture, folder: Folder) -> None:
    specs, shapes = folder.weights.specs, expected_shapes(named.entries, model)
    known = [re.compile(pattern) for pattern in architecture.ignored]
    extra = [n for n in specs if n not in shapes and n not in named.copies and not any(p.fullmatch(n) for p in known)]
    present = [(name, specs[name], shape) for name, shape in shapes.items() if name in specs]
    problems = {
        "missing": sorted(shapes.keys() - specs.keys()),
        "unknown": sorted(extra),
        "of another shape": [
            f"{name} {found.shape} for {shape}" for name, found, shape in present if found.shape != shape
        ],
        "of another type": [f"{name} {found.dtype}" for name, found, _ in present if found.dtype not in _FLOATS],
    }
    if any(problems.values()):
        lines = [f"{what}: {_listed(names)}" for what, names in problems.items() if names]
        raise ConversionError(
            f"the weights are not those of a {architecture.name}",
            where=str(folder.path),
            expected=f"{len(shapes)} tensors of floating-point numbers, as the config says",
            found="\n".join(lines),
            fix=_advice(problems, architecture, folder.config),
        )


def _listed(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _advice(problems: Mapping[str, list[str]], architecture: Architecture, config: Mapping[str, Any]) -> str:
    if problems["of another type"]:
        return "quantized weights are not read: take the version in float32, float16 or bfloat16"
    if problems["of another shape"] and not problems["missing"]:
        left_out = [key for key in architecture.defaults if key not in config]
        usual = f"; config.json leaves out {_listed(left_out)}, which means the usual" if left_out else ""
        return f"config.json belongs to another size of the model; take both from one place{usual}"
    named = config.get("architectures")
    if named and architecture.name not in named:
        return (
            f"config.json names {', '.join(map(str, named))}, which is read as {architecture.name}: "
            "take the model with that head"
        )
    return "take config.json and weights from one place; a model with another head needs its own class"


class _KeepEmpty(TorchFunctionMode):
    """Leaves memory as it is where a layer would fill it with random numbers; all of it is replaced anyway."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_initial_values() -> Iterator[None]:
    with _KeepEmpty():
        yield


def _place(model: NeuralModule, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put tensors in the place of the parameters, tied ones included."""
    own = dict(model.named_parameters())
    places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    for full, tensor in tensors:
        parameter = torch.nn.Parameter(tensor.contiguous())
        for module, name in places[id(own[full])]:
            module._parameters[name] = parameter
