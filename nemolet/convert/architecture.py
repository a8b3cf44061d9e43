"""What is known of one architecture of Hugging Face, and finding it.

An :class:`Architecture` is two tables: parts of ``config.json`` and rules of tensors. Everything else is derived.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemolet.config.schema import schema_of
from nemolet.convert.fields import Config, Part, read_config, write_config
from nemolet.convert.folder import class_names
from nemolet.convert.generation import Generation
from nemolet.convert.mapping import Rule
from nemolet.convert.settled import settled
from nemolet.differences import Difference, differences
from nemolet.errors import ConversionError, nearest

# Module below nemolet.convert.architectures -> names of its Architecture objects, in the order they are tried.
_MODULES = (
    "gpt2",
    "llama",
    "gemma",
    "phi3",
    "mixtral",
    "bert",
    "modernbert",
    "t5",
    "bart",
    "whisper",
    "wav2vec2",
    "scored",
)


@dataclass(frozen=True)
class Architecture:
    """One class of transformers and our module for it.

    Args:
        model_type: as in ``config.json``.
        name: of the class in transformers.
        target: our class.
        parts: the config.
        rules: the tensors.
        defaults: what a key means that ``config.json`` leaves out, as the config class of transformers says.
        prefix: what the names of the body begin with where it was saved with a head; files are read with and without.
        ignored: regular expressions of tensors that are not read: constants, other heads.
        copies: other names of tensors, which files may have instead, or too: what is tied. A tied head is known
            without.
        apart: those of them that theirs keeps apart where the head is not tied.
        head_by_file: whether the head is tied is told by the weights, whatever the config says.
        unsaid: arguments of ours that ``config.json`` has no word for, and that no output depends on.
        bodies_of: further classes that are read, without their heads; a model is never written as one of them.
    """

    model_type: str
    name: str
    target: str
    parts: tuple[Part, ...]
    rules: tuple[Rule, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = ()
    bodies_of: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    apart: tuple[str, ...] = ()
    head_by_file: bool = False

    def head(self) -> str | None:
        """Their name of the weight of the head, where it can be one of its own."""
        return self._theirs("graph.head.weight")

    def all_copies(self) -> dict[str, str]:
        """Other names of tensors, that of a tied head included."""
        head, embedding = self.head(), self._theirs("graph.embed.weight")
        return {**self.copies, **({head: embedding} if head and embedding else {})}

    def _theirs(self, ours: str) -> str | None:
        found = [rule.theirs for rule in self.rules if rule.ours == ours]
        return found[0] if found and isinstance(found[0], str) else None

    @property
    def whole(self) -> tuple[Part, ...]:
        """The config, and how it writes, of a model that writes texts."""
        schema = schema_of(*self.target.rsplit(".", 1))
        taken = schema.parameters if schema else {}
        return (*self.parts, Generation(reads="encoder" in taken)) if "generation" in taken else self.parts

    def read_config(self, theirs: Mapping[str, Any]) -> Config:
        """Our config of their model."""
        return read_config(self.whole, {**self.defaults, **theirs}, self.target)

    def write_config(self, ours: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> Config:
        """Their config of our model; what is ``known`` of theirs beside it stays.

        Raises:
            ConversionError: where the architecture cannot say what our model does, naming all that would be lost.
        """
        lost = self.lost(ours, known)
        if lost:
            raise ConversionError(
                f"{self.name} cannot express this model",
                where="model",
                expected="a config that says the same when it is read back",
                found=f"lost on the way there and back: {'; '.join(map(str, lost))}",
                fix="choose another architecture, or keep it as a .nemolet file",
            )
        written = write_config(self.whole, ours, known)
        return {**written, "architectures": [self.name], "model_type": self.model_type}

    def builds(self, ours: Mapping[str, Any]) -> bool:
        """Whether a config of ours is for the kind of model that this architecture becomes here."""
        return str(ours.get("_target_")).split(".")[-1] == self.target.split(".")[-1]

    def lost(self, ours: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> list[Difference] | list[str]:
        """What is not the same after writing a config and reading it back, option by option; or why it cannot be."""
        if not self.builds(ours):
            return [f"{ours.get('_target_')}, not {self.target}"]
        try:
            again = self.read_config(write_config(self.whole, ours, known))
        except (ConversionError, KeyError, TypeError, ValueError) as error:
            return [str(error)]
        return self.compared(ours, again)

    def compared(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
        """Where two configs of ours differ, option by option, apart from what their side has no word for."""
        return [each for each in differences(settled(one), settled(other)) if each.path not in self.unsaid]


def known_architectures() -> dict[str, Architecture]:
    """All known architectures by the name of their class in transformers.

    Example:
        >>> known_architectures()["LlamaForCausalLM"].target
        'nemolet.language.CausalLM'
    """
    found: dict[str, Architecture] = {}
    for module in _MODULES:
        table = importlib.import_module(f"nemolet.convert.architectures.{module}").ARCHITECTURES
        found |= {architecture.name: architecture for architecture in table}
    return found


def find(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` names; with several classes of one model type, the first known.

    Raises:
        ConversionError: listing the known ones.
    """
    known = known_architectures()
    names = class_names(config)
    for name in names:
        if name in known:
            return known[name]
        body = next((architecture for architecture in known.values() if name in architecture.bodies_of), None)
        if body is not None:
            return body
    kind = config.get("model_type")
    same = [architecture for architecture in known.values() if architecture.model_type == kind]
    if same and (not names or all(name.endswith("Model") for name in names)):
        return same[0]
    kinds = sorted({architecture.model_type for architecture in known.values()})
    close = nearest(names[0] if names else str(kind), [architecture.name for architecture in same] or known)
    raise ConversionError(
        "this architecture is not known",
        where="config.json",
        expected=", ".join(architecture.name for architecture in same) or f"a model of {', '.join(kinds)}",
        found=f"{', '.join(names) or 'no class'}, model type {kind}",
        fix=(f"is it {close}? " if close else "") + "docs/huggingface.md lists all, and shows how to add one",
    )


def named(name: str) -> Architecture:
    """An architecture by its class, or by its model type.

    Raises:
        ConversionError: for an unknown one.
    """
    return find(
        {"architectures": [name], "model_type": name} if name in known_architectures() else {"model_type": name}
    )


def fitting(config: Mapping[str, Any]) -> Architecture:
    """The first architecture that can express a model of ours.

    Raises:
        ConversionError: saying for each why not.
    """
    return all_fitting(config)[0]


def all_fitting(config: Mapping[str, Any]) -> list[Architecture]:
    """All architectures that can express a model of ours, in the order they are tried.

    Raises:
        ConversionError: saying for each why not.
    """
    same = [each for each in known_architectures().values() if each.builds(config)]
    lost = [(architecture, architecture.lost(config)) for architecture in same]
    found = [architecture for architecture, reasons in lost if not reasons]
    if found:
        return found
    lost.sort(key=lambda each: _distance(each[1]))
    raise ConversionError(
        "no known architecture can express this model",
        where="model",
        found="\n".join(f"{each.name}: {' '.join('; '.join(map(str, why)).split())}"[:300] for each, why in lost)[:1500]
        or f"a {config.get('_target_')}, which transformers has no class for",
        fix=(_other_settings(*lost[0]) if lost else "")
        + "keep it as a .nemolet file, or add the architecture (docs/huggingface.md)",
    )


def _distance(lost: Sequence[Difference | str]) -> float:
    """How many options differ; what cannot be said at all is furthest."""
    return len(lost) if all(isinstance(each, Difference) for each in lost) else float("inf")


def _other_settings(architecture: Architecture, lost: Sequence[Difference | str]) -> str:
    """With which settings of the model itself it would fit an architecture; nothing where its parts differ, too."""
    wanted = [each for each in lost if isinstance(each, Difference) and "." not in each.path]
    if len(wanted) < len(lost):
        return ""
    return f"train it with {' '.join(f'model.{each.path}={each.other}' for each in wanted)} for {architecture.name}, "
