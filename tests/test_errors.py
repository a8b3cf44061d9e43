"""Errors say where, what was expected, what was found and how to fix it, and survive pickling."""

from __future__ import annotations

import configparser
import copy
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import nemolet as nl
from nemolet import errors
from nemolet.data.audio import resample
from nemolet.errors import NemoletError, did_you_mean, nearest
from nemolet.training.experiment import _loggers
from nemolet.training.settings import Training

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, NemoletError) and kind is not NemoletError
]


def test_the_four_answers_stand_on_lines_of_their_own():
    error = NemoletError("width does not divide", where="model.heads", expected="a divisor", found=7, fix="8")
    assert str(error).splitlines() == [
        "model.heads: width does not divide",
        "  expected  a divisor",
        "  found     7",
        "  fix       8",
    ]


def test_answers_that_are_not_known_are_left_out():
    assert str(NemoletError("broken")) == "broken"
    assert str(NemoletError("broken", found=0)) == "broken\n  found     0"


def test_a_value_of_several_lines_stays_in_its_column():
    lines = str(NemoletError("broken", found="one\ntwo")).splitlines()
    assert lines[1].index("one") == lines[2].index("two")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_every_error_survives_pickling_whole(kind, copied):
    error = kind("what", where="here", expected="this", found=["that"], fix="so")
    again = copied(error)
    assert type(again) is kind
    assert str(again) == str(error)
    assert (again.what, again.where, again.expected, again.found, again.fix) == ("what", "here", "this", ["that"], "so")


def test_every_error_is_a_nemolet_error():
    assert len(KINDS) >= 9
    assert nl.NemoletError is NemoletError


@pytest.mark.parametrize(("name", "expected"), [("widht", "width"), ("layer", "layers"), ("zzz", None), ("", None)])
def test_the_nearest_name(name, expected):
    assert nearest(name, iter(["width", "layers"])) == expected


def test_a_suggestion_is_a_question_or_nothing():
    assert did_you_mean("tokns", ["tokens"]) == "did you mean 'tokens'?"
    assert did_you_mean("zzz", ["tokens"]) is None


def test_an_unknown_public_name_is_met_with_the_nearest():
    with pytest.raises(AttributeError, match="did you mean 'Graph'"):
        nl.Grpah  # noqa: B018


PACKAGES = {  # the extra that brings a package, and a use of it
    "tokenizers": ("hf", lambda: nl.tokenizers.HuggingFaceTokenizer(b"{}")),
    "huggingface_hub": ("hf", lambda: nl.load("hf://owner/name")),
    "soundfile": ("speech", lambda: nl.data.load_audio(__file__)),
    "soxr": ("speech", lambda: resample(np.zeros(9, np.float32), 2, 3)),
    "wandb": ("wandb", lambda: _loggers(Training(loggers=("wandb",)), Path())),
    "mlflow": ("mlflow", lambda: _loggers(Training(loggers=("mlflow",)), Path())),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_told_with_the_extra_that_brings_it(package, monkeypatch):
    extra, use = PACKAGES[package]
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(NemoletError) as refused:
        use()
    assert f"the package {package} is missing" in str(refused.value)
    assert f'pip install "nemolet[{extra}]"' in str(refused.value)
    extras = configparser.ConfigParser()
    extras.read(Path(__file__).parents[1] / "setup.cfg")
    assert re.search(rf"^{package}\b", extras["options.extras_require"][extra], re.MULTILINE)
