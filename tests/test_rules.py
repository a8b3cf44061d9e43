"""What a config refuses, Python refuses too: unknown choices, and values against the rules."""

from __future__ import annotations

import importlib
import pkgutil

import numpy as np
import pytest

import nemolet
import nemolet as nl
from nemolet.data import Corpus, PackedTokens
from nemolet.data.corpus import TokenizerSpec
from nemolet.errors import ConfigError
from nemolet.language import CausalLM
from nemolet.module import NeuralModule
from nemolet.nn import AttentionOptions, Decoder, ResidualOptions, RopeScaling
from nemolet.nn.norm import make_norm
from nemolet.rules import broken, check_rules
from nemolet.training import Optim, Schedule, Training
from nemolet.types import HiddenBTD

TINY = {"vocab_size": 9, "layers": 1, "width": 8, "heads": 2}


@pytest.mark.parametrize(
    ("make", "place", "fix"),
    [
        (lambda: Optim("adam"), "Optim.name", "adamw"),
        (lambda: Schedule("cosin"), "Schedule.name", "cosine"),
        (lambda: CausalLM(**TINY, norm="layernorm"), "CausalLM.norm", "layer"),
        (lambda: CausalLM(**TINY, position="learnt"), "CausalLM.position", "learned"),
        (lambda: Decoder(layers=1, width=8, heads=2, checkpointing="evry_2"), "Decoder.checkpointing", "every_2"),
        (lambda: make_norm("rsm", "D", 4, eps=0.1), "make_norm.kind", "rms"),
        (lambda: ResidualOptions("sandwhich"), "ResidualOptions.order", "sandwich"),
        (lambda: RopeScaling("liner", 2.0), "RopeScaling.kind", "linear"),
        (
            lambda: PackedTokens(np.arange(9), [0], [9], sequence_length=2, order="sequental"),
            "PackedTokens.order",
            "sequential",
        ),
        (lambda: TokenizerSpec("chars"), "TokenizerSpec.kind", "char"),
        (lambda: Training(precision="bf16"), "Training.precision", None),
        (lambda: Training(loggers=("tensorbord",)), "Training.loggers", None),
        (lambda: Training(devices="autp"), "Training.devices", "auto"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_nearest(make, place, fix):
    with pytest.raises(ConfigError, match="unknown choice") as caught:
        make()
    assert caught.value.where == place
    assert fix is None or fix in caught.value.fix


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Training(valid_every=0), "valid_every=0"),
        (lambda: Training(keep_checkpoints=-1), "keep_checkpoints=-1"),
        (lambda: Training(num_nodes=0), "num_nodes=0"),
        (lambda: Corpus(valid_fraction=1.5), "valid_fraction=1.5"),
        (lambda: Corpus(path=""), "path=''"),
        (lambda: Optim(muon_lr=-1.0), "muon_lr=-1.0"),
        (lambda: AttentionOptions(rotary=1e7), "rotary=10000000.0"),
        (lambda: AttentionOptions(softcap=0.0), "softcap=0.0"),
        (lambda: TokenizerSpec(vocab_size=200), "vocab_size=200"),
        (lambda: TokenizerSpec("byte", special_tokens=("<a>",)), "special_tokens=('<a>',)"),
    ],
)
def test_a_value_against_the_rules_is_refused(make, found):
    with pytest.raises(ConfigError) as caught:
        make()
    assert found in caught.value.found


def test_good_choices_are_taken():
    assert Training(devices="auto", loggers=("wandb", "mlflow"), precision="bf16-mixed").devices == "auto"
    assert TokenizerSpec(vocab_size=261, special_tokens=("<a>",)).expected_size == 261


def test_rules_know_lengths_and_what_is_not_set():
    rules = [("len(a) == b", "one"), ("a is None or b is not None", "a needs b"), ("c > 1", "three")]
    assert broken(rules, {"a": [1, 2], "b": 3, "c": None}) == [("one", {"a": [1, 2], "b": 3})]
    assert broken(rules, {"a": [1], "b": None}) == [("a needs b", {"a": [1], "b": None})]


def test_rules_know_the_smallest():
    rules = [("min(a) > 0", "one")]
    for value, holds in (([1, 2], True), ([0, 2], False), ({"x": 3, "y": -1}, False), ("a.txt", True), ({}, True)):
        assert (broken(rules, {"a": value}) == []) is holds


def test_a_setting_that_is_not_set_is_told_only_where_the_rule_asks_for_it():
    with pytest.raises(ConfigError) as caught:
        CausalLM(**{**TINY, "heads": 3})
    assert caught.value.found == "width=8, heads=3"  # and not attention.head_size=None
    assert caught.value.fix == "change width or heads"
    with pytest.raises(ConfigError) as caught:
        TokenizerSpec("file")
    assert caught.value.found == "kind='file', path=None"


def test_a_rule_may_say_not():
    assert broken([("not (a > 1 and b)", "one")], {"a": 2, "b": True}) == [("one", {"a": 2, "b": True})]
    assert broken([("not a", "one")], {"a": False}) == []


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: CausalLM(**{**TINY, "heads": 3}), "width=8, heads=3"),
        (lambda: CausalLM(**TINY, window=0), "window=0"),
        (lambda: CausalLM(**TINY, attention=AttentionOptions(head_size=3)), "attention.head_size=3"),
        (lambda: Decoder(layers=1, width=8, heads=2, dropout=1.0), "dropout=1.0"),
        (lambda: Recurrent(width=3), "width=3"),
        (lambda: Recurrent(4, flat=True), "flat=True"),
    ],
)
def test_a_typed_module_is_not_made_against_its_rules(make, found):
    with pytest.raises(ConfigError) as caught:
        make()
    assert found in caught.value.found


class Recurrent(NeuralModule):
    CONFIG_RULES = (("width % 2 == 0", "the width is even"), ("not (flat and width > 2)", "flat is narrow"))

    def __init__(self, width: int = 2, *, flat: bool = False) -> None:
        super().__init__(D=width)

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return hidden


def test_a_module_within_its_rules_is_made():
    assert Recurrent().config() == Recurrent.config(Recurrent())
    assert Recurrent(2, flat=True).bindings == {"D": 2}
    with pytest.raises(TypeError, match="wide"):
        Recurrent(wide=3)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("width in (2, 4)", "only compare and calculate"),
        ("max(width, 2) > 1", "only compare and calculate"),
        ("width >", "cannot be read"),
        ("widht > 1", "did you mean 'width'?"),
    ],
)
def test_a_rule_that_cannot_be_evaluated_is_refused_when_the_class_is_defined(rule, text):
    def init(self, width: int = 2) -> None: ...

    body = {"CONFIG_RULES": ((rule, "never said"),), "__init__": init}
    with pytest.raises(ConfigError, match=text.replace("?", r"\?")):
        type("Bad", (NeuralModule,), dict(body))
    with pytest.raises(ConfigError, match=text.replace("?", r"\?")):
        nl.register(type("Bad", (), dict(body)))


def classes_with_rules() -> list[type]:
    """All classes of the package that state rules of their own."""
    found = []
    for info in pkgutil.walk_packages(nemolet.__path__, "nemolet."):
        module = importlib.import_module(info.name)
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == info.name]
        found += [kind for kind in kinds if vars(kind).get("CONFIG_RULES")]
    return found


def test_every_rule_is_read_and_kept_in_python_too():
    """Settings of a verb apart, which are made of a checked config only."""
    kinds = classes_with_rules()
    assert len(kinds) > 40
    for kind in kinds:
        check_rules(kind)
        if not issubclass(kind, NeuralModule) and not kind.__module__.startswith("nemolet.cli."):
            assert "check_settings" in kind.__post_init__.__code__.co_names, kind
