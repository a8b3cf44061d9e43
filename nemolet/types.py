"""Axis letters, element types and types of ports: the only shape vocabulary of nemolet.

A :class:`NeuralType` says which axes a tensor has and what its numbers mean. Everything else in
the library that speaks of shapes (wiring checks, pictures, parameter layouts, export, serving)
is derived from the declarations written in this vocabulary.

Reading order: the legend of letters, :class:`Axis`, the element types, :class:`NeuralType`,
containers, and last the aliases that annotate ``forward`` methods. Whether a tensor of one type may enter a port
of another is said by :mod:`nemolet.comparison`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Annotated

from torch import Tensor

from nemolet.errors import DeclarationError, nearest

# --------------------------------------------------------------------------------------------------
# The legend. Letters of one kind may flow into each other (a decoder's T becomes the memory's S);
# letters of different kinds may not.
# --------------------------------------------------------------------------------------------------

LEGEND: dict[str, tuple[str, str]] = {
    "B": ("batch", "batch"),
    "N": ("samples", "audio samples"),
    "T": ("time", "time: frames or tokens"),
    "S": ("time", "source or memory time"),
    "U": ("time", "target time"),
    "C": ("channels", "feature channels (mel)"),
    "D": ("width", "model width"),
    "H": ("heads", "query heads"),
    "G": ("heads", "key/value heads"),
    "K": ("head size", "head size"),
    "F": ("feed-forward", "feed-forward width"),
    "V": ("vocabulary", "vocabulary"),
    "P": ("vocabulary", "phones or labels, where a second vocabulary is needed"),
    "E": ("experts", "experts"),
    "L": ("layers", "layers"),
    "I": ("input", "input axis of a layer used in several places; an instance says which letter it is"),
    "O": ("output", "output axis of a layer used in several places; an instance says which letter it is"),
}
IGNORED = -100  # the label of a position that does not count, as in torch
ANY, REST = "Any", "..."  # one axis of any kind; any number of leading axes


@dataclass(frozen=True)
class Axis:
    """One named axis, with a size where the size is fixed.

    Example:
        >>> Axis("D", 256), Axis("T").kind
        (Axis('D', 256), 'time')
    """

    letter: str
    size: int | None = None

    def __post_init__(self) -> None:
        if self.letter not in LEGEND and self.letter not in (ANY, REST):
            close = nearest(self.letter.upper(), LEGEND)
            raise DeclarationError(
                "unknown axis letter",
                where=f"axis {self.letter!r}",
                expected="one of " + " ".join(LEGEND) + ", Any or ...",
                found=repr(self.letter),
                fix=f"write {close!r}" if close else "use a letter of the legend in nemolet.types",
            )
        if self.size is not None and self.size < 1:
            raise DeclarationError("an axis has at least one element", where=str(self), found=self.size)

    @property
    def kind(self) -> str:
        """The group of letters that may stand for each other."""
        return LEGEND[self.letter][0] if self.letter in LEGEND else self.letter

    def fits(self, other: Axis) -> bool:
        """Whether the two letters may name the same axis, sizes aside."""
        return ANY in (self.letter, other.letter) or self.kind == other.kind

    def __str__(self) -> str:
        return self.letter if self.size is None else f"{self.letter}={self.size}"

    def __repr__(self) -> str:
        return f"Axis({self.letter!r})" if self.size is None else f"Axis({self.letter!r}, {self.size})"


_AXIS = re.compile(r"(\.\.\.|[A-Za-z]+)(?:=(\d+))?$")


def parse_axis(word: str) -> Axis:
    """Read ``"D"`` or ``"D=256"``."""
    match = _AXIS.match(word)
    if match is None:
        raise DeclarationError(
            "cannot read this axis", where=f"axis {word!r}", expected="a letter, or letter=size", found=word
        )
    return Axis(match[1], int(match[2]) if match[2] else None)


def parse_axes(text: str) -> tuple[Axis, ...]:
    """Read the axes of an activation, such as ``"B T D=256"`` or ``"... D"``."""
    axes = tuple(parse_axis(word) for word in text.split())
    if any(axis.letter == REST for axis in axes[1:]):
        raise DeclarationError("'...' stands for leading axes only", where=repr(text), fix="write it first")
    return axes


Dim = tuple[Axis | int, ...]  # the factors of one dimension of a parameter, the major one first


def parse_dims(text: str) -> tuple[Dim, ...]:
    """Read the axes of a parameter, where a dimension may be composite: ``"(H K) D"``, ``"(G 4 K) D"``.

    Only the first (major) factor of a dimension may be sharded, so the order says how rows are laid out.

    Example:
        >>> parse_dims("(G 4 K) D")
        ((Axis('G'), 4, Axis('K')), (Axis('D'),))
    """
    dims: list[Dim] = []
    for group, word in re.findall(r"\(([^()]*)\)|(\S+)", text):
        words = group.split() if group else [word]
        dims.append(tuple(int(w) if w.isdigit() else parse_axis(w) for w in words))
    return tuple(dims)


def format_dims(dims: tuple[Dim, ...]) -> str:
    """Write parameter axes as :func:`parse_dims` reads them."""
    words = (" ".join(map(str, dim)) for dim in dims)
    return " ".join(f"({word})" if len(dim) > 1 else word for word, dim in zip(words, dims))


# --------------------------------------------------------------------------------------------------
# Elements: what the numbers mean. A subclass may flow where its parent is expected. A field that is
# None is not known and agrees with everything; a field that is a letter refers to the size of that axis.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Element:
    """What the numbers of a tensor mean; the root of the tree."""

    def __str__(self) -> str:
        known = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) is not None]
        return type(self).__name__ + (f"({', '.join(known)})" if known else "")


@dataclass(frozen=True)
class Void(Element):
    """Matches any element; for tools that look at every tensor."""


@dataclass(frozen=True)
class Audio(Element):
    """A waveform in [-1, 1]; ``sample_rate`` in hertz."""

    sample_rate: int | None = None


@dataclass(frozen=True)
class Spectrogram(Element):
    """Features over frames; ``bins`` per frame, ``hop`` in seconds between frames."""

    bins: int | str | None = "C"
    hop: float | None = None


@dataclass(frozen=True)
class Hidden(Element):
    """Hidden states of a network."""


@dataclass(frozen=True)
class Index(Element):
    """Integers that count or point."""


@dataclass(frozen=True)
class TokenIds(Index):
    """Ids of a vocabulary of size ``vocab``."""

    vocab: int | str | None = "V"


@dataclass(frozen=True)
class Labels(Index):
    """Ids to be predicted; :data:`IGNORED` marks a position without a label."""

    vocab: int | str | None = "V"


@dataclass(frozen=True)
class Segments(Index):
    """Number of the document a position belongs to, from 1; 0 is padding."""


@dataclass(frozen=True)
class Positions(Index):
    """Position of each token within its document, from 0."""


@dataclass(frozen=True)
class Lengths(Index):
    """Valid entries along axis ``of``."""

    of: str = "T"


@dataclass(frozen=True)
class Mask(Element):
    """Booleans; True keeps a position."""


@dataclass(frozen=True)
class Logits(Element):
    """Unnormalised scores."""


@dataclass(frozen=True)
class LogProbs(Element):
    """Logarithms of probabilities."""


@dataclass(frozen=True)
class Loss(Element):
    """A loss summed over what it is counted by."""


@dataclass(frozen=True)
class Count(Element):
    """How many terms a sum has."""


# --------------------------------------------------------------------------------------------------
# Types
# --------------------------------------------------------------------------------------------------


class NeuralType:
    """The axes of a tensor and what its numbers mean.

    Args:
        axes: letters in order, for example ``"B T D=256"``; ``""`` for a scalar.
        element: an :class:`Element`.

    Raises:
        DeclarationError: for an unknown letter, a repeated letter, or an element that is not one.

    Example:
        >>> str(NeuralType("B T D=256", Hidden()))
        'B T D=256 Hidden'
    """

    __slots__ = ("axes", "element")
    axes: tuple[Axis, ...]
    element: Element

    def __init__(self, axes: str | tuple[Axis, ...], element: Element) -> None:
        parsed = parse_axes(axes) if isinstance(axes, str) else axes
        if not isinstance(element, Element):
            raise DeclarationError(
                "a type needs an element",
                where=f"NeuralType({axes!r}, ...)",
                expected="an Element such as Hidden()",
                found=repr(element),
                fix="write Hidden() with parentheses" if isinstance(element, type) else None,
            )
        repeated = [k for k, n in Counter(a.letter for a in parsed if a.letter != ANY).items() if n > 1]
        if repeated:
            raise DeclarationError(
                f"axis {repeated[0]} is written twice",
                where=f"NeuralType({axes!r}, {element})",
                fix="use another letter of the same kind, for example S beside T",
            )
        object.__setattr__(self, "axes", parsed)
        object.__setattr__(self, "element", element)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("NeuralType is immutable")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NeuralType) and (self.axes, self.element) == (other.axes, other.element)

    def __hash__(self) -> int:
        return hash((self.axes, self.element))

    def __reduce__(self) -> tuple[type[NeuralType], tuple[tuple[Axis, ...], Element]]:
        return NeuralType, (self.axes, self.element)

    def __str__(self) -> str:
        return f"{' '.join(map(str, self.axes)) or 'scalar'} {self.element}"

    def __repr__(self) -> str:
        return f"NeuralType({' '.join(map(str, self.axes))!r}, {self.element!r})"


@dataclass(frozen=True)
class ListOf:
    """A list of tensors of one type; ``size`` is None for any length."""

    item: PortType
    size: int | None = None

    def __str__(self) -> str:
        return f"list[{self.item}]" + ("" if self.size is None else f" of {self.size}")


@dataclass(frozen=True)
class DictOf:
    """A dictionary from names to tensors of one type."""

    item: PortType

    def __str__(self) -> str:
        return f"dict[str, {self.item}]"


PortType = NeuralType | ListOf | DictOf


Binding = int | float | str | Axis


def bind(declared: PortType, bindings: dict[str, Binding]) -> PortType:
    """Fill what an instance knows into a declared type: sizes, renamed axes, element fields.

    Example:
        >>> str(bind(NeuralType("... I", Hidden()), {"I": Axis("D", 64)}))
        '... D=64 Hidden'
        >>> str(bind(NeuralType("B T", TokenIds()), {"V": 65}))
        'B T TokenIds(vocab=65)'
    """
    if isinstance(declared, ListOf):
        return ListOf(bind(declared.item, bindings), declared.size)
    if isinstance(declared, DictOf):
        return DictOf(bind(declared.item, bindings))
    known: dict[str, Binding] = {}
    for field in fields(declared.element):
        value = getattr(declared.element, field.name)
        bound = bindings.get(value) if isinstance(value, str) else bindings.get(field.name) if value is None else None
        if isinstance(bound, Axis):
            bound = bound.letter if bound.size is None or field.name == "of" else bound.size
        if bound is not None and not (field.name == "of" and not isinstance(bound, str)):
            known[field.name] = bound
    axes = tuple(bind_axis(axis, bindings) for axis in declared.axes)
    return NeuralType(axes, replace(declared.element, **known) if known else declared.element)


def bind_axis(axis: Axis, bindings: dict[str, Binding]) -> Axis:
    """Fill a size or another letter into one axis."""
    bound = bindings.get(axis.letter)
    if isinstance(bound, Axis):
        return bound
    if isinstance(bound, int):
        if axis.size not in (None, bound):
            raise DeclarationError(
                "a fixed size is bound to another one", where=str(axis), expected=axis.size, found=bound
            )
        return Axis(axis.letter, bound)
    return axis


# --------------------------------------------------------------------------------------------------
# Aliases: what `forward` methods are annotated with. To a type checker each is a plain Tensor.
# --------------------------------------------------------------------------------------------------

AudioBN = Annotated[Tensor, NeuralType("B N", Audio())]
SpectrogramBTC = Annotated[Tensor, NeuralType("B T C", Spectrogram())]
HiddenBTD = Annotated[Tensor, NeuralType("B T D", Hidden())]
HiddenBTI = Annotated[Tensor, NeuralType("B T I", Hidden())]
MemoryBSD = Annotated[Tensor, NeuralType("B S D", Hidden())]
HiddenRestI = Annotated[Tensor, NeuralType("... I", Hidden())]
HiddenRestO = Annotated[Tensor, NeuralType("... O", Hidden())]
HiddenRestD = Annotated[Tensor, NeuralType("... D", Hidden())]
TokenIdsBT = Annotated[Tensor, NeuralType("B T", TokenIds())]
TokenIdsBS = Annotated[Tensor, NeuralType("B S", TokenIds())]
LabelsBT = Annotated[Tensor, NeuralType("B T", Labels())]
LabelsBU = Annotated[Tensor, NeuralType("B U", Labels())]
LabelsB = Annotated[Tensor, NeuralType("B", Labels())]
SegmentsBT = Annotated[Tensor, NeuralType("B T", Segments())]
PositionsBT = Annotated[Tensor, NeuralType("B T", Positions())]
AudioLengthsB = Annotated[Tensor, NeuralType("B", Lengths("N"))]
LengthsB = Annotated[Tensor, NeuralType("B", Lengths("T"))]
TokenTypesBT = Annotated[Tensor, NeuralType("B T", Index())]
PositionsBS = Annotated[Tensor, NeuralType("B S", Positions())]
BiasBHTS = Annotated[Tensor, NeuralType("B H T S", Logits())]
MaskBT = Annotated[Tensor, NeuralType("B T", Mask())]
MaskBS = Annotated[Tensor, NeuralType("B S", Mask())]
LogitsBTV = Annotated[Tensor, NeuralType("B T V", Logits())]
LogitsBV = Annotated[Tensor, NeuralType("B V", Logits())]
LogitsBTSV = Annotated[Tensor, NeuralType("B T S V", Logits())]
EmbeddingBD = Annotated[Tensor, NeuralType("B D", Hidden())]
LogProbsBTV = Annotated[Tensor, NeuralType("B T V", LogProbs())]
LossScalar = Annotated[Tensor, NeuralType("", Loss())]
CountScalar = Annotated[Tensor, NeuralType("", Count())]
