"""Adapters of PEFT for Hugging Face models both ways, through the tables by which their weights are converted.

The rows of an addition are laid out as those of the weight it is added to. So what an architecture's table does to a
weight it does to the ``up`` half of an addition as well; where several weights become one, their ranks are put side
by side.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemolet.archive import Archive
from nemolet.config import build
from nemolet.convert.architecture import Architecture, all_fitting, find, named
from nemolet.convert.copies import forms
from nemolet.convert.folder import CONFIG, described
from nemolet.convert.mapping import Entry, expand, expected_shapes
from nemolet.convert.operations import Chain, Operation, Transpose
from nemolet.errors import ConfigError, ConversionError
from nemolet.language.models import CausalLM
from nemolet.language.prompt_tuning import load_prompt
from nemolet.module import NeuralModule
from nemolet.nn.adapter_files import (
    Addition,
    StoredAdapter,
    additions_of,
    load_adapter,
    put_additions,
    read_adapter,
    save_adapter,
    write_additions,
)
from nemolet.nn.adapter_settings import CONFIG as SETTINGS
from nemolet.nn.adapter_settings import PROMPT, WEIGHTS, read_config
from nemolet.nn.adapters import merge
from nemolet.nn.linear import Linear
from nemolet.nn.quantized import numbers


@dataclass(frozen=True)
class Layers:
    """Which of their layers are which of ours.

    Args:
        architecture: that names theirs.
        entries: of linear layers.
        others: their names of everything else, and why no addition is read for it.
        shapes: of their weights.
    """

    architecture: Architecture
    entries: list[Entry]
    others: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    def outer(self) -> set[str]:
        """The names of their layers."""
        return {_layer(name) for entry in self.entries for name in entry.theirs}

    def of(self, inner: Mapping[str, Any]) -> list[Entry]:
        """The entries of some layers of ours."""
        return [entry for entry in self.entries if any(_layer(name) in inner for name in entry.ours)]

    def size(self, entry: Entry, name: str) -> tuple[int, ...]:
        """Rows and columns of an addition to one of their layers."""
        return self.shapes[name][::-1] if _transposes(entry.operation) else self.shapes[name]

    def why_not(self, layer: str) -> str:
        """Why one of their names is no linear layer of ours."""
        weight = f"{layer}.weight"
        if weight in self.others:
            return self.others[weight]
        if weight in self.architecture.all_copies():
            return "tied to the embedding here"
        if any(re.fullmatch(pattern, weight) for pattern in self.architecture.ignored):
            return "a head that is not read"
        return f"no linear layer of {self.architecture.name} has this name"


def export_adapter(
    model: NeuralModule,
    folder: str | Path,
    *,
    architecture: str | None = None,
    extra: Mapping[str, bytes] | None = None,
    base: str = "",
) -> Path:
    """Write the additions of a model so that PEFT loads them for the Hugging Face model of the same weights.

    Args:
        model: adapted by :func:`nemolet.nn.adapt`, not merged.
        folder: receives the two files.
        architecture: class or model type in transformers; None for the one it came from.
        extra: small files it came with (:attr:`nemolet.archive.Archive.extra`), which say where it came from.
        base: name of the Hugging Face model, for PEFT.

    Raises:
        ConversionError: for a model that no architecture expresses, or that several do under other names.
    """
    additions = additions_of(model)
    layers = _one(_known(model, architecture, extra), additions)
    own = {name: tuple(parameter.shape) for name, parameter in _plain(model).named_parameters()}
    theirs: dict[str, Addition] = {}
    for entry in layers.of(additions):
        inner, outer = ([_layer(name) for name in names] for names in (entry.ours, entry.theirs))
        sizes = [own[name] for name in entry.ours]
        defaults = [_row_lengths(model, layer) for layer in inner]
        parts = [additions.get(layer) for layer in inner]
        theirs |= dict(zip(outer, _through(entry, parts, sizes, defaults, outwards=True), strict=True))
    flipped = any(_transposes(entry.operation) for entry in layers.of(additions))
    return write_additions(theirs, folder, base=base, transposed=flipped)


def convert_adapter(
    source: str | Path,
    target: str | Path,
    *,
    model: NeuralModule,
    architecture: str | None = None,
    extra: Mapping[str, bytes] | None = None,
    base: str = "",
) -> Path:
    """Turn an adapter for a Hugging Face model into one for ours, or back; which way is told by the names inside.

    Args:
        source: a folder in the format of PEFT, with names of their layers or of ours.
        target: receives the other one.
        model: the base model, of ours; it is adapted.
        architecture: class or model type in transformers; None for the one it came from.
        extra: small files it came with, which say where it came from.
        base: its name, for people.

    Raises:
        ConversionError: for layers that the base model has under neither name.
    """
    if put_adapter(model, source, architecture=architecture, extra=extra):
        return export_adapter(model, target, architecture=architecture, extra=extra, base=base)
    return save_adapter(model, target, base=base)


def put_adapter(
    model: NeuralModule,
    folder: str | Path,
    *,
    architecture: str | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> bool:
    """Give a model the additions in a folder, whether that names our layers or theirs.

    Args:
        model: the base model.
        folder: of :func:`nemolet.nn.save_adapter`, or of PEFT.
        architecture: class or model type in transformers, where the names are theirs; None for the one it came from.
        extra: small files it came with, which say where it came from.

    Returns:
        Whether the names are ours.

    Raises:
        ConversionError: for layers that the base model has under neither name.
        ConfigError: for an adapter of another kind, or of another base model.
    """
    additions = read_adapter(folder).additions
    inner = {name for name, _ in model.named_modules()}
    if inner.issuperset(additions):
        load_adapter(model, folder)
        return True
    import_adapter(model, folder, architecture=architecture, extra=extra)
    return False


def with_adapter(archive: Archive, folder: str | Path) -> Archive:
    """An archive whose model has an adapter in it for good: additions in its weights, or a prompt before its texts.

    Args:
        archive: of the base model, which is changed.
        folder: of additions, with names of ours or of the Hugging Face model it came from, or of a prompt.

    Raises:
        ConversionError: for layers that the model has under neither name.
        ConfigError: for an adapter of another kind, or of another base model.
    """
    folder, model = Path(folder), archive.model
    kind = read_config(folder).get("peft_type")
    digest = hashlib.sha256(f"{model.came_from} ".encode())
    for name in (SETTINGS, WEIGHTS):
        digest.update((folder / name).read_bytes())
    if kind == PROMPT.name:
        if not isinstance(model, CausalLM):
            raise ConfigError(
                "a prompt belongs to a language model",
                where=str(folder),
                expected="a nemolet.language.CausalLM",
                found=type(model).__name__,
            )
        model = load_prompt(model, folder).eval()
    else:
        put_adapter(model, folder, extra=archive.extra)
        merge(model)
    model.comes_from(digest.hexdigest())
    return replace(archive, model=model)


def import_adapter(
    model: NeuralModule,
    folder: str | Path,
    *,
    architecture: str | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> list[str]:
    """Give a converted model the additions that PEFT saved for its original; returns the names of our layers.

    Args:
        model: read from a Hugging Face folder, or equal to one.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        architecture: class or model type in transformers; None for the one it came from, or the one that has the
            layers of the adapter.
        extra: small files it came with, which say where it came from.

    Raises:
        ConversionError: for additions to layers that the architecture does not have, or of other sizes, all named at
            once.
        ConfigError: for an adapter of another kind.
    """
    stored = read_adapter(folder)
    additions = stored.additions
    known = [each for layers in _known(model, architecture, extra) for each in _namings(layers)]
    layers = max(known, key=lambda each: len(each.outer() & additions.keys()))  # of several alike the first
    _compare(stored, layers, str(folder))
    ours: dict[str, Addition] = {}
    for entry in layers.entries:
        outer = [_layer(name) for name in entry.theirs]
        if not any(layer in additions for layer in outer):
            continue
        inner = [_layer(name) for name in entry.ours]
        sizes = [layers.size(entry, name) for name in entry.theirs]
        defaults = entry.operation.give([_row_lengths(model, layer) for layer in inner], entry.layout)
        parts = [additions.get(layer) for layer in outer]
        ours |= dict(zip(inner, _through(entry, parts, sizes, defaults, outwards=False), strict=True))
    put_additions(model, ours, where=str(folder))
    return list(ours)


def _known(model: NeuralModule, architecture: str | None, extra: Mapping[str, bytes] | None) -> list[Layers]:
    """What the architectures that may be meant call the layers."""
    plain, original = _plain(model), described(extra) if extra and CONFIG in extra else {}
    config = plain.config()
    if architecture is not None:
        chosen = [named(architecture)]
    elif original and not find(original).lost(config, original):
        chosen = [find(original)]
    else:
        chosen = all_fitting(config)
    return [_layers(each, plain) for each in chosen]


def _layers(architecture: Architecture, plain: NeuralModule) -> Layers:
    entries = expand(architecture.rules, plain, vocab=int(getattr(plain, "vocab_size", 0)))
    modules = dict(plain.named_modules())
    linear: list[Entry] = []
    others: dict[str, str] = {}
    for entry in entries:
        kinds = {type(modules[name.rpartition(".")[0]]) for name in entry.ours}
        if kinds == {Linear} and all(name.endswith(".weight") for name in entry.ours):
            linear.append(entry)
        else:
            kind = ", ".join(sorted(each.__name__ for each in kinds))
            others |= dict.fromkeys(entry.theirs, f"a part of {kind} here, not a linear layer")
    return Layers(architecture, linear, others, expected_shapes(linear, plain))


def _namings(layers: Layers) -> list[Layers]:
    """The same under the names that adapters of the body alone have, or of the body with another head."""
    found = []
    for form in forms(layers.architecture.prefix):
        entries = [replace(entry, theirs=tuple(map(form, entry.theirs))) for entry in layers.entries]
        shapes = {form(name): shape for name, shape in layers.shapes.items()}
        found.append(replace(layers, entries=entries, shapes=shapes))
    return found


def _one(known: Sequence[Layers], additions: Mapping[str, Addition]) -> Layers:
    """The architecture that is written for; those that call the adapted layers alike are one.

    Raises:
        ConversionError: where there are several.
    """
    ways = {tuple((e.ours, e.theirs, e.operation) for e in layers.of(additions)): layers for layers in reversed(known)}
    if len(ways) > 1:
        first = {each.architecture.name: _layer(entries[0][1][0]) for entries, each in reversed(ways.items())}
        raise ConversionError(
            "several architectures have such a model, under other names",
            where="architecture",
            expected="one of " + ", ".join(first),
            found=", ".join(f"{name} calls a layer {layer}" for name, layer in first.items()),
            fix="name the one that the adapter is for: architecture=..., or extra=archive.extra of the converted model",
        )
    return known[0]


def _compare(stored: StoredAdapter, layers: Layers, where: str) -> None:
    """Whether each addition belongs to a linear layer of its size.

    Raises:
        ConversionError: naming all that do not.
    """
    sizes = {_layer(n): layers.size(entry, n) for entry in layers.entries for n in entry.theirs}
    found = {name: (each.up.shape[0], each.down.shape[1]) for name, each in stored.additions.items()}
    wrong = [f"{name}: {layers.why_not(name)}" for name in sorted(found.keys() - sizes.keys())]
    wrong += [
        f"{n}: for a weight of {found[n]}, here it is {sizes[n]}" for n in found if found[n] != sizes.get(n, found[n])
    ]
    if wrong:
        more = [f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise ConversionError(
            "these additions do not fit this base model",
            where=where,
            expected=f"additions to linear layers of this {layers.architecture.name}",
            found="\n".join(wrong[:8] + more),
            fix=f"convert the model that the adapter was trained on ({stored.base or 'which it does not name'}); "
            "what is no linear layer here can be merged by PEFT and read with the whole model",
        )


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
