"""Rules from letters to mesh axes."""

from __future__ import annotations

import pytest

from nemolet.errors import ParallelError
from nemolet.parallel.rules import Rules


def test_changes_replace_single_letters():
    rules = Rules.of({"parameters": {"V": []}, "activations": {"T": "cp"}})
    assert rules.parameters["V"] == () and rules.parameters["F"] == ("tp",)
    assert Rules().sequence and not rules.sequence


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parameters": {"X": "tp"}}, "unknown axis letter"),
        ({"parameters": {"f": "tp"}}, "did you mean 'F'"),
        ({"parameters": {"F": "tensor"}}, "unknown mesh axis"),
        ({"parameters": {"F": ["tp", "tp"]}}, "twice"),
        ({"weights": {"F": "tp"}}, "there is no such table"),
    ],
)
def test_impossible_rules_are_refused(changes, message):
    with pytest.raises(ParallelError, match=message):
        Rules.of(changes)


def test_a_mesh_axis_is_used_once_per_tensor():
    rules = Rules.of({"parameters": {"D": "tp"}})
    assert rules.axes_of(["D", "K"], "weight") == {0: ("tp",)}
    with pytest.raises(ParallelError, match="wanted twice"):
        rules.axes_of(["F", "D"], "weight")
