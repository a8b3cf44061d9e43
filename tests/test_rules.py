"""What a config refuses, Python refuses too: unknown choices, and values against the rules."""

from __future__ import annotations

import numpy as np
import pytest

from nemolet.data import Corpus, PackedTokens
from nemolet.data.corpus import TokenizerSpec
from nemolet.errors import ConfigError
from nemolet.language import CausalLM
from nemolet.nn import AttentionOptions, Decoder, ResidualOptions, RopeScaling
from nemolet.nn.norm import make_norm
from nemolet.rules import broken
from nemolet.training import Optim, Schedule, Training

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
    rules = [("len(a) == b", "one"), ("a is None or b is not None", "two"), ("c > 1", "three")]
    assert broken(rules, {"a": [1, 2], "b": 3, "c": None}) == [("one", {"a": [1, 2], "b": 3})]
    assert broken(rules, {"a": [1], "b": None}) == [("two", {"a": [1], "b": None})]
