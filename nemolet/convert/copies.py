"""Names in a file other than those of the table: with or without a prefix, of old versions, of what is stored twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from nemolet.convert.architecture import Architecture
from nemolet.convert.folder import Folder
from nemolet.convert.mapping import Entry
from nemolet.convert.operations import Repeated, chain
from nemolet.errors import ConversionError
from nemolet.tensor_files import Spec

# Before norms had weights and biases, and lengths of filters were parametrizations.
_RENAMED = {
    "LayerNorm.weight": "LayerNorm.gamma",
    "LayerNorm.bias": "LayerNorm.beta",
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


@dataclass(frozen=True)
class NamedEntries:
    """The entries of a folder under the names that it has.

    Args:
        entries: of all parameters.
        copies: names of tensors that repeat another, which is read.
    """

    entries: list[Entry]
    copies: Mapping[str, str]


def as_named(entries: list[Entry], architecture: Architecture, specs: Mapping[str, Spec]) -> NamedEntries:
    """The entries with names as in the file.

    A body has a prefix where it was saved with a head, and none else. A tensor that is missing is read from its copy.
    """

    def found(form: Callable[[str], str]) -> int:
        return sum(_old(form(name), specs) in specs for entry in entries for name in entry.theirs)

    form = max(forms(architecture.prefix), key=found)  # of several alike the first
    needed = {name for entry in entries for name in entry.theirs}
    copies = {
        _old(form(copy), specs): _old(form(name), specs)
        for copy, name in architecture.all_copies().items()
        if copy not in needed
    }
    stands_in = {name: copy for copy, name in copies.items() if copy in specs and name not in specs}

    def in_file(name: str) -> str:
        there = _old(form(name), specs)
        return stands_in.get(there, there)

    renamed = [replace(entry, theirs=tuple(in_file(name) for name in entry.theirs)) for entry in entries]
    return NamedEntries(renamed, {copy: stands_in.get(name, name) for copy, name in copies.items()})


def forms(prefix: str) -> tuple[Callable[[str], str], ...]:
    """What a name may be in a file: that of the table, that of the body alone, that of the body with any head."""
    return (
        lambda name: name,
        lambda name: name.removeprefix(prefix),
        lambda name: prefix + name.removeprefix(prefix),
    )


def _old(name: str, specs: Mapping[str, Spec]) -> str:
    """The name in old files, where the file has that."""
    old = name
    for new, before in _RENAMED.items():
        old = old.replace(new, before)
    return old if old in specs else name


def head_is_tied(architecture: Architecture, folder: Folder) -> bool:
    """Whether the head is the embedding, in a file that may have both."""
    head = architecture.head()
    return head is None or not _differ(folder, head, architecture.all_copies()[head])


def _differ(folder: Folder, one: str, other: str) -> bool:
    """Whether a file has two tensors, and they are not equal."""
    specs = folder.weights.specs
    if one == other or one not in specs or other not in specs:
        return False
    return specs[one] != specs[other] or not torch.equal(folder.weights.get(one), folder.weights.get(other))


def check_copies(named: NamedEntries, folder: Folder) -> None:
    """What is stored a second time, such as a tied head, has to be the same: it is not read.

    Raises:
        ConversionError: naming a tensor that is not.
    """
    for copy, name in named.copies.items():
        if _differ(folder, copy, name):
            raise ConversionError(
                "this tensor should be a copy of another, but is not",
                where=f"{folder.path}: {copy}",
                expected=f"the numbers of {name}, as tie_word_embeddings says",
                found="other numbers",
                fix="set tie_word_embeddings to false in config.json if the model has a head of its own",
            )


def with_copies(entries: list[Entry], architecture: Architecture) -> list[Entry]:
    """The entries for writing: where the head is a tensor of its own, theirs may keep what else was tied apart, too."""
    names = {name for entry in entries for name in entry.theirs}
    if architecture.head() not in names:
        return entries
    made = []
    for entry in entries:
        copies = tuple(copy for copy in architecture.apart if architecture.copies[copy] in entry.theirs)
        more = chain(Repeated(len(copies)), entry.operation) if copies else entry.operation
        made.append(replace(entry, theirs=(*entry.theirs, *copies), operation=more))
    return made
