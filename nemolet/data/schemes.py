"""Schemes that write spans of words as tags: which tag may follow which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

from nemolet.errors import ConfigError

SchemeName = Literal["iob1", "iob2", "ioe1", "ioe2", "bioes", "bilou", "free"]
OUTSIDE = "O"
ENDING, SINGLE = "EL", "SU"  # marks of a span's last word, and of its only one


class Tag(NamedTuple):
    """A tag in its two parts, as ``B-city`` marks a beginning of a city; one that marks no span has the mark ``O``."""

    mark: str
    kind: str


def tag_of(label: str) -> Tag:
    """The parts of a label.

    Example:
        >>> tag_of("B-city"), tag_of("NOUN")
        (Tag(mark='B', kind='city'), Tag(mark='O', kind=''))
    """
    mark, _, kind = label.partition("-")
    return Tag(mark, kind) if len(mark) == 1 and mark in "BIESLU" else Tag(OUTSIDE, "")


@dataclass(frozen=True)
class Scheme:
    """Which tags a scheme has, and which of them need a neighbour of the same kind (final).

    Args:
        name: of the scheme.
        marks: that it has beside ``O``.
        after: marks that only follow these marks.
        before: marks that are only followed by these marks.

    Example:
        >>> SCHEMES["iob2"].allows(tag_of("O"), tag_of("I-x")), SCHEMES["iob1"].allows(tag_of("O"), tag_of("I-x"))
        (False, True)
    """

    name: SchemeName
    marks: str
    after: dict[str, str] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)

    def allows(self, first: Tag, second: Tag) -> bool:
        """Whether one tag may follow another; a sentence begins as after ``O``."""
        alike = first.kind == second.kind
        fits = second.mark not in self.after or (alike and first.mark in self.after[second.mark])
        return fits and (first.mark not in self.before or (alike and second.mark in self.before[first.mark]))


SCHEMES: dict[SchemeName, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("iob2", "BI", after={"I": "BI"}),
        Scheme("iob1", "BI", after={"B": "BI"}),
        Scheme("ioe2", "IE", before={"I": "IE"}),
        Scheme("ioe1", "IE", before={"E": "IE"}),
        Scheme("bioes", "BIES", after={"I": "BI", "E": "BI"}, before={"B": "IE", "I": "IE"}),
        Scheme("bilou", "BILU", after={"I": "BI", "L": "BI"}, before={"B": "IL", "I": "IL"}),
        Scheme("free", "BIESLU"),
    )
}


def scheme_for(labels: Sequence[str], name: SchemeName | None = None) -> Scheme:
    """The scheme of a label set: the one named, or else the usual one with its marks.

    Raises:
        ConfigError: for marks that the scheme, or every scheme, lacks.

    Example:
        >>> scheme_for(["O", "B-x", "E-x"]).name, scheme_for(["O", "I-x"]).name, scheme_for(["NOUN"]).name
        ('bioes', 'iob1', 'free')
    """
    marks = {tag_of(label).mark for label in labels} - {OUTSIDE}
    if name is None and not marks:
        return SCHEMES["free"]
    fitting = [scheme for scheme in SCHEMES.values() if marks <= set(scheme.marks) and scheme.name != "free"]
    if marks == {"I"} and name is None:  # nothing begins with B, so it is not needed for that
        return SCHEMES["iob1"]
    if name is None and fitting:
        return fitting[0]
    if name is not None and marks <= set(SCHEMES[name].marks):
        return SCHEMES[name]
    raise ConfigError(
        "these labels belong to another scheme" if name else "these labels belong to no scheme",
        where="scheme",
        expected=f"marks {', '.join(SCHEMES[name].marks)}, as {name} has"
        if name
        else "marks of one scheme, as B and I",
        found=", ".join(labels[:20]),
        fix="set scheme to " + " or ".join([*(scheme.name for scheme in fitting), "free"]),
    )


def scheme_of(sentences: Iterable[Sequence[str]]) -> SchemeName:
    """The first scheme that all sentences follow, where nothing else is said; ``free`` for none.

    Example:
        >>> scheme_of([["O", "I-x"], ["B-x"]]), scheme_of([["I-x", "B-x"]]), scheme_of([["S-x", "O"]])
        ('free', 'iob1', 'bioes')
    """
    read = [[tag_of(label) for label in labels] for labels in sentences]
    marks = {tag.mark for tags in read for tag in tags} - {OUTSIDE}
    steps = {step for tags in read for step in pairwise([Tag(OUTSIDE, ""), *tags, Tag(OUTSIDE, "")])}
    followed = (
        s for s in SCHEMES.values() if marks and marks <= set(s.marks) and all(s.allows(*step) for step in steps)
    )
    return next((scheme.name for scheme in followed), "free")
