"""Adapters of PEFT for Hugging Face models both ways, through the tables by which their weights are converted.

The rows of an addition are laid out as those of the weight it is added to. So what an architecture's table does to a
weight it does to the ``up`` half of an addition as well; where several weights become one, their ranks are put side
by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemolet.config import build
from nemolet.convert.architecture import Architecture, fitting, named
from nemolet.convert.mapping import Entry, expand, expected_shapes
from nemolet.convert.operations import Chain, Operation, Transpose
from nemolet.errors import ConversionError
from nemolet.module import NeuralModule
from nemolet.nn.adapter_files import (
    Addition,
    additions_of,
    load_adapter,
    put_additions,
    read_additions,
    save_adapter,
    write_additions,
)
from nemolet.nn.quantized import numbers


def export_adapter(model: NeuralModule, folder: str | Path, *, architecture: str | None = None, base: str = "") -> Path:
    """Write the additions of a model so that PEFT loads them for the Hugging Face model of the same weights.

    Args:
        model: adapted by :func:`nemolet.nn.adapt`, not merged.
        folder: receives the two files.
        architecture: the class in transformers; None for the first that fits.
        base: name of the Hugging Face model, for PEFT.

    Raises:
        ConversionError: for a model that no architecture expresses.
    """
    entries, own = _entries(model, named(architecture) if architecture else None)
    additions = additions_of(model)
    theirs: dict[str, Addition] = {}
    for entry in entries:
        layers = [_layer(name) for name in entry.ours]
        if any(layer in additions for layer in layers):
            sizes = [own[name] for name in entry.ours]
            defaults = [_row_lengths(model, layer) for layer in layers]
            parts = [additions.get(layer) for layer in layers]
            outer = [_layer(name) for name in entry.theirs]
            theirs |= dict(zip(outer, _through(entry, parts, sizes, defaults, outwards=True), strict=True))
    return write_additions(theirs, folder, base=base)


def convert_adapter(source: str | Path, target: str | Path, *, model: NeuralModule, base: str = "") -> Path:
    """Turn an adapter for a Hugging Face model into one for ours, or back; which way is told by the names inside.

    Args:
        source: a folder in the format of PEFT, with names of their layers or of ours.
        target: receives the other one.
        model: the base model, of ours; it is adapted.
        base: its name, for people.

    Raises:
        ConversionError: for layers that the base model has under neither name.
    """
    additions, _ = read_additions(source)
    if all(name in dict(model.named_modules()) for name in additions):
        load_adapter(model, source)
        return export_adapter(model, target, base=base)
    import_adapter(model, source)
    return save_adapter(model, target, base=base)


def import_adapter(model: NeuralModule, folder: str | Path, *, architecture: str | None = None) -> list[str]:
    """Give a converted model the additions that PEFT saved for its original; returns the names of our layers.

    Args:
        model: read from a Hugging Face folder, or equal to one.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        architecture: the class in transformers; None for the first that fits.

    Raises:
        ConversionError: for additions to layers that the architecture does not have, all named at once.
        ConfigError: for an adapter of another kind, or of other sizes.
    """
    entries, _ = _entries(model, named(architecture) if architecture else None)
    additions, _ = read_additions(folder)
    shapes = expected_shapes(entries, _plain(model))
    ours: dict[str, Addition] = {}
    used: set[str] = set()
    for entry in entries:
        outer = [_layer(name) for name in entry.theirs]
        if any(layer in additions for layer in outer):
            used.update(outer)
            inner = [_layer(name) for name in entry.ours]
            flip = _transposes(entry.operation)
            sizes = [shapes[name][::-1] if flip else shapes[name] for name in entry.theirs]
            lengths = [_row_lengths(model, layer) for layer in inner]
            defaults = entry.operation.give(lengths, entry.layout)
            parts = [additions.get(layer) for layer in outer]
            ours |= dict(zip(inner, _through(entry, parts, sizes, defaults, outwards=False), strict=True))
    strangers = sorted(set(additions) - used)
    if strangers:
        raise ConversionError(
            "this adapter belongs to another base model",
            where=str(folder),
            expected="additions to layers of the architecture",
            found=", ".join(strangers[:8]),
            fix="convert the model that the adapter was trained on",
        )
    put_additions(model, ours, where=str(folder))
    return list(ours)


def _through(
    entry: Entry,
    parts: Sequence[Addition | None],
    sizes: Sequence[Sequence[int]],
    defaults: Sequence[Tensor],
    *,
    outwards: bool,
) -> list[Addition]:
    """The additions of one side, made of those of the other."""
    present = [part for part in parts if part is not None]
    scale, ranks = present[0].scale, [0 if part is None else part.down.shape[0] for part in parts]
    ups, start = [], 0
    for part, rank, size in zip(parts, ranks, sizes):
        up = torch.zeros(size[0], sum(ranks))
        if part is not None:
            up[:, start : start + rank] = part.up.float() * (part.scale / scale)
        ups.append(up)
        start += rank
    down = torch.cat([part.down.float() for part in present])
    flip = _transposes(entry.operation)
    move = entry.operation.give if outwards else entry.operation.take
    moved = move(ups if outwards or not flip else [up.T for up in ups], entry.layout)
    moved = [up.T for up in moved] if outwards and flip else moved
    lengths: Sequence[Tensor | None] = [None] * len(moved)
    if any(part.lengths is not None for part in present):
        own = [d if p is None or p.lengths is None else p.lengths.flatten() for p, d in zip(parts, defaults)]
        lengths = move(own, entry.layout)
    dropout = present[0].dropout
    return [Addition(down.clone(), up, scale, length, dropout) for up, length in zip(moved, lengths, strict=True)]


def _entries(model: NeuralModule, chosen: Architecture | None) -> tuple[list[Entry], Mapping[str, tuple[int, ...]]]:
    """The entries of matrices, and the shapes of ours."""
    plain = _plain(model)
    architecture = chosen or fitting(model.config())
    own = {name: tuple(p.shape) for name, p in plain.named_parameters()}
    entries = expand(architecture.rules, plain, vocab=int(getattr(model, "vocab_size", 0)))
    return [e for e in entries if all(len(own[name]) == 2 for name in e.ours)], own


def _plain(model: NeuralModule) -> NeuralModule:
    """The model as it was built, without numbers."""
    with torch.device("meta"):
        plain: NeuralModule = build(model.config(), where="model")
    return plain


def _row_lengths(model: NeuralModule, layer: str) -> Tensor:
    """Lengths of the rows of a weight, adapted or not."""
    module: Any = model.get_submodule(layer)
    lengths: Tensor = numbers(module.weight.detach()).float().norm(dim=1)
    return lengths


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _transposes(operation: Operation) -> bool:
    """Whether their weight has columns where ours has rows; additions have rows on both sides."""
    if isinstance(operation, Chain):
        return sum(_transposes(step) for step in operation.steps) % 2 == 1
    return isinstance(operation, Transpose)
