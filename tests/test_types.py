"""Axes, elements and every outcome of comparing two types."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest

from nemolet import types
from nemolet.comparison import Outcome, compare
from nemolet.errors import DeclarationError
from nemolet.types import (
    LEGEND,
    Audio,
    Axis,
    DictOf,
    Element,
    Hidden,
    Index,
    Labels,
    Lengths,
    ListOf,
    Logits,
    LogProbs,
    Mask,
    NeuralType,
    Spectrogram,
    TokenIds,
    Void,
    bind,
    format_dims,
    parse_dims,
)


@dataclass(frozen=True)
class MelSpectrogram(Spectrogram):
    """A child of a library element, as users write them."""

    mel_scale: str = "slaney"


def T(axes: str, element: Element | None = None) -> NeuralType:
    return NeuralType(axes, Hidden() if element is None else element)


OUTCOMES = [
    # expected, found, outcome
    (T("B T D"), T("B T D"), Outcome.SAME),
    (T("B T D=8"), T("B T D=8"), Outcome.SAME),
    (T("B T D=8"), T("B T D"), Outcome.SAME),
    (T("B T D"), T("B S D"), Outcome.SAME),  # letters of one kind
    (T("B T"), T("B U"), Outcome.SAME),
    (T("", Void()), T("B T D"), Outcome.SAME),
    (T("B T", Void()), T("B T", Mask()), Outcome.SAME),
    (T("... D"), T("B T D"), Outcome.SAME),
    (T("... D"), T("D"), Outcome.SAME),
    (T("B T D"), T("... D"), Outcome.SAME),
    (T("... D"), T("... T D"), Outcome.SAME),
    (T("B Any D"), T("B T D"), Outcome.SAME),
    (T("B T D"), T("B T Any"), Outcome.SAME),
    (T("B N", Audio(16000)), T("B N", Audio()), Outcome.SAME),
    (T("B T", TokenIds(65)), T("B T", TokenIds("V")), Outcome.SAME),
    (T("B T", Index()), T("B T", TokenIds()), Outcome.GREATER),
    (T("B T", Element()), T("B T", Mask()), Outcome.GREATER),
    (T("B T C", Spectrogram()), T("B T C", MelSpectrogram()), Outcome.GREATER),
    (T("B T", TokenIds()), T("B T", Index()), Outcome.LESS),
    (T("B T", TokenIds()), T("B S D", Index()), Outcome.LESS),
    (T("B T D=8"), T("B T D=4"), Outcome.DIM_INCOMPATIBLE),
    (T("B=2 T"), T("B=3 T"), Outcome.DIM_INCOMPATIBLE),
    (T("... D=8"), T("B T D=4"), Outcome.DIM_INCOMPATIBLE),
    (T("B T D"), T("B D T"), Outcome.TRANSPOSE_SAME),
    (T("B T D"), T("T B D"), Outcome.TRANSPOSE_SAME),
    (T("B T D=8"), T("B D=8 T"), Outcome.TRANSPOSE_SAME),
    (T("B T D"), T("B T V"), Outcome.INCOMPATIBLE),
    (T("B T D"), T("B D"), Outcome.INCOMPATIBLE),
    (T(""), T("B"), Outcome.INCOMPATIBLE),
    (T("... T D"), T("D"), Outcome.INCOMPATIBLE),
    (T("B T", Mask()), T("B T", TokenIds()), Outcome.INCOMPATIBLE),
    (T("B T", TokenIds()), T("B T", Labels()), Outcome.INCOMPATIBLE),  # siblings
    (T("B T V", Logits()), T("B T V", LogProbs()), Outcome.INCOMPATIBLE),
    (T("B N", Audio(16000)), T("B N", Audio(8000)), Outcome.SAME_TYPE_INCOMPATIBLE_PARAMS),
    (T("B T", TokenIds(65)), T("B T", TokenIds(66)), Outcome.SAME_TYPE_INCOMPATIBLE_PARAMS),
    (T("B", Lengths("T")), T("B", Lengths("D")), Outcome.SAME_TYPE_INCOMPATIBLE_PARAMS),
    (T("B T C", Spectrogram(80)), T("B T C", MelSpectrogram(64)), Outcome.SAME_TYPE_INCOMPATIBLE_PARAMS),
    (ListOf(T("B T D")), ListOf(T("B T D")), Outcome.SAME),
    (ListOf(T("B T D")), ListOf(T("B T D"), 3), Outcome.SAME),
    (ListOf(T("B T D"), 2), ListOf(T("B T D"), 3), Outcome.CONTAINER_SIZE_MISMATCH),
    (ListOf(T("B T D")), T("B T D"), Outcome.CONTAINER_SIZE_MISMATCH),
    (T("B T D"), ListOf(T("B T D")), Outcome.CONTAINER_SIZE_MISMATCH),
    (DictOf(T("B T D")), ListOf(T("B T D")), Outcome.CONTAINER_SIZE_MISMATCH),
    (ListOf(ListOf(T("B T D"))), ListOf(T("B T D")), Outcome.CONTAINER_SIZE_MISMATCH),
    (DictOf(T("B T D")), DictOf(T("B D T")), Outcome.TRANSPOSE_SAME),
    (ListOf(T("B T D=8")), ListOf(T("B T D=4")), Outcome.DIM_INCOMPATIBLE),
    (T("B T D"), None, Outcome.UNCHECKED),
]


@pytest.mark.parametrize(("expected", "found", "outcome"), OUTCOMES, ids=lambda value: str(value))
def test_comparing(expected, found, outcome):
    assert compare(expected, found) is outcome


def test_every_outcome_is_met():
    assert {outcome for *_, outcome in OUTCOMES} == set(Outcome)


def test_only_same_and_greater_flow():
    assert {outcome for outcome in Outcome if outcome.flows} == {Outcome.SAME, Outcome.GREATER}


@pytest.mark.parametrize(
    ("expected", "found", "outcome"),
    [
        ("Any T D", "B T V", Outcome.INCOMPATIBLE),
        ("B T Any", "B V D", Outcome.INCOMPATIBLE),
        ("B Any D=8", "B T D=4", Outcome.DIM_INCOMPATIBLE),
        ("Any Any D=8", "B T D=4", Outcome.DIM_INCOMPATIBLE),
        ("B T D=8", "Any T D=4", Outcome.DIM_INCOMPATIBLE),
        ("Any D T", "Any T D", Outcome.TRANSPOSE_SAME),
        ("Any T", "B T D", Outcome.INCOMPATIBLE),
    ],
)
def test_an_axis_that_matches_anything_hides_no_mismatch_at_another(expected, found, outcome):
    assert compare(T(expected), T(found)) is outcome


def test_an_axis_that_matches_anything_hides_no_element():
    assert compare(T("Any T", Mask()), T("B T", TokenIds())) is Outcome.INCOMPATIBLE
    assert compare(T("Any T", Index()), T("B T", TokenIds())) is Outcome.GREATER
    assert compare(T("Any N", Audio(8000)), T("B N", Audio(16000))) is Outcome.SAME_TYPE_INCOMPATIBLE_PARAMS


@pytest.mark.parametrize("letter", LEGEND)
def test_every_letter_fits_its_own_kind_only(letter):
    fitting = {other for other in LEGEND if Axis(letter).fits(Axis(other))}
    assert fitting == {other for other, (kind, _) in LEGEND.items() if kind == LEGEND[letter][0]}


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Axis("X"), "unknown axis letter"),
        (lambda: Axis("d"), "write 'D'"),
        (lambda: Axis("D", 0), "at least one element"),
        (lambda: NeuralType("B T ...", Hidden()), "leading axes only"),
        (lambda: NeuralType("B T T", Hidden()), "T is written twice"),
        (lambda: NeuralType("B, T", Hidden()), "cannot read this axis"),
        (lambda: NeuralType("B T", Hidden), "with parentheses"),
        (lambda: NeuralType("B T", "Hidden"), "an Element such as"),
        (lambda: bind(NeuralType("B T D=8", Hidden()), {"D": 4}), "bound to another one"),
    ],
)
def test_wrong_declarations_are_refused(build, text):
    with pytest.raises(DeclarationError, match=text):
        build()


def test_any_may_stand_several_times():
    assert str(NeuralType("Any Any D", Hidden())) == "Any Any D Hidden"


@pytest.mark.parametrize("type_", [T("B T D=8"), T("", Mask()), T("... I"), T("B N", Audio(16000))])
def test_types_are_values(type_):
    for copied in (pickle.loads(pickle.dumps(type_)), copy.deepcopy(type_)):
        assert copied == type_
        assert hash(copied) == hash(type_)
    assert type_ != str(type_)
    with pytest.raises(AttributeError):
        type_.axes = ()


@pytest.mark.parametrize(
    ("declared", "bindings", "text"),
    [
        (T("... I"), {"I": Axis("D", 64)}, "... D=64 Hidden"),
        (T("B T D"), {"D": 64, "V": 5}, "B T D=64 Hidden"),
        (T("B T D=64"), {"D": 64}, "B T D=64 Hidden"),
        (T("B T", TokenIds()), {"V": 65}, "B T TokenIds(vocab=65)"),
        (T("B T", TokenIds()), {"V": Axis("P", 40)}, "B T TokenIds(vocab=40)"),
        (T("B T", TokenIds()), {"V": Axis("P")}, "B T TokenIds(vocab=P)"),
        (T("B N", Audio()), {"sample_rate": 16000}, "B N Audio(sample_rate=16000)"),
        (T("B T C", Spectrogram()), {"C": 80, "hop": 0.01}, "B T C=80 Spectrogram(bins=80, hop=0.01)"),
        (T("B", Lengths("T")), {"T": Axis("S")}, "B Lengths(of=S)"),
        (T("B", Lengths("T")), {"T": 9}, "B Lengths(of=T)"),
        (ListOf(T("B D"), 2), {"D": 3}, "list[B D=3 Hidden] of 2"),
        (DictOf(T("B D")), {"D": 3}, "dict[str, B D=3 Hidden]"),
    ],
)
def test_an_instance_fills_in_what_it_knows(declared, bindings, text):
    assert str(bind(declared, bindings)) == text


@pytest.mark.parametrize("text", ["D", "(H K) D=8", "(G 4 K) D", "E F D", "V=65 D=8"])
def test_parameter_axes_are_written_as_they_are_read(text):
    assert format_dims(parse_dims(text)) == text


def test_every_alias_is_a_tensor_with_one_type():
    from typing import get_args

    from torch import Tensor

    aliases = [value for value in vars(types).values() if get_args(value)[:1] == (Tensor,)]
    assert len(aliases) >= 20
    assert all(isinstance(get_args(alias)[1], NeuralType) for alias in aliases)
