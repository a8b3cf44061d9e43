"""Which axes of tensors lie on which axes of the mesh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nemolet.errors import ParallelError, did_you_mean
from nemolet.types import LEGEND

RULE_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
_PARAMETERS = {"V": ("tp",), "H": ("tp",), "G": ("tp",), "F": ("tp",), "E": ("ep",), "L": ("pp",)}
_ACTIVATIONS = {"B": ("dp_replicate", "dp_shard"), "T": ("cp", "tp"), "V": ("tp",), "H": ("tp",), "G": ("tp",),
                "F": ("tp",), "E": ("ep",)}  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """Mesh axes by letter, for parameters and for activations apart.

    The T of a table of learned positions is not the T of an activation, hence two tables. With ``tp`` under the
    T of activations, what lies between the sharded layers of a stack is sharded along the sequence.

    Args:
        parameters: letter -> mesh axes.
        activations: letter -> mesh axes.

    Raises:
        ParallelError: for an unknown letter or mesh axis, or a mesh axis given twice to one letter.

    Example:
        >>> Rules().parameters["F"], Rules.of({"activations": {"T": "cp"}}).activations["T"]
        (('tp',), ('cp',))
    """

    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(_PARAMETERS))
    activations: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(_ACTIVATIONS))

    def __post_init__(self) -> None:
        for kind in ("parameters", "activations"):
            for letter, axes in getattr(self, kind).items():
                _check(f"parallel.rules.{kind}.{letter}", letter, axes)

    @classmethod
    def of(cls, changes: Mapping[str, Mapping[str, str | Sequence[str]]] | None) -> Rules:
        """The default rules with changes, as a config writes them; an empty list takes a letter off the mesh.

        Raises:
            ParallelError: for a table that is neither ``parameters`` nor ``activations``.
        """
        tables: dict[str, dict[str, tuple[str, ...]]] = {
            "parameters": dict(_PARAMETERS),
            "activations": dict(_ACTIVATIONS),
        }
        for kind, table in (changes or {}).items():
            if kind not in tables:
                raise ParallelError(
                    "there is no such table of rules",
                    where=f"parallel.rules.{kind}",
                    expected="parameters or activations",
                    found=kind,
                    fix=did_you_mean(kind, tables),
                )
            for letter, axes in table.items():
                tables[kind][letter] = (axes,) if isinstance(axes, str) else tuple(axes)
        return cls(**tables)

    @property
    def sequence(self) -> bool:
        """Whether activations between the sharded layers are sharded along T over tp."""
        return "tp" in self.activations.get("T", ())

    def axes_of(self, letters: Iterable[str], name: str) -> dict[int, tuple[str, ...]]:
        """Mesh axes by dim, for the major letters of a parameter's dims; the first dim that matches wins.

        Raises:
            ParallelError: where two dims want the same mesh axis.
        """
        found: dict[int, tuple[str, ...]] = {}
        taken: dict[str, str] = {}
        for dim, letter in enumerate(letters):
            axes = self.parameters.get(letter, ())
            for axis in axes:
                if axis in taken:
                    raise ParallelError(
                        f"mesh axis {axis} is wanted twice by one parameter",
                        where=name,
                        expected="each mesh axis at most once per tensor",
                        found=f"{taken[axis]} and {letter} both on {axis}",
                        fix=f"take one off: parallel.rules.parameters.{letter}=[]",
                    )
                taken[axis] = letter
            if axes:
                found[dim] = axes
        return found


def _check(where: str, letter: str, axes: Sequence[str]) -> None:
    if letter not in LEGEND:
        raise ParallelError(
            "a rule names an unknown axis letter",
            where=where,
            expected="a letter of the legend in nemolet.types",
            found=letter,
            fix=did_you_mean(letter.upper(), LEGEND),
        )
    for axis in axes:
        if axis not in RULE_AXES:
            raise ParallelError(
                "a rule names an unknown mesh axis",
                where=where,
                expected=", ".join(RULE_AXES),
                found=axis,
                fix=did_you_mean(axis, RULE_AXES),
            )
    if len(set(axes)) < len(axes):
        raise ParallelError("a rule names a mesh axis twice", where=where, found=", ".join(axes), fix="name it once")
