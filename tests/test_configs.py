"""Every option of every config group composes, validates and builds."""

from __future__ import annotations

import ast
import re

import pytest
import torch

import nemolet as nl
from nemolet.cli import SUPPLIED, VERBS, home, main
from nemolet.config import build, compose, config_folder, schema_of, validated
from nemolet.config.registry import construct

GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(config_folder().iterdir())
    if folder.is_dir() and not folder.name.startswith("_")
}
CHOICES = [(group, option) for group, options in GROUPS.items() for option in options]
# What an option needs beside itself.
NEEDS = {("tokenizer", "file"): ["tokenizer.path=tok"]}
SHORT = "data.sequence_length=8"  # so that it fits the shortest context
SPEECH = {  # what reads recordings, not text
    "model": {
        "conformer_ctc",
        "conformer_hybrid",
        "conformer_transducer",
        "fast_conformer_ctc",
        "matchboxnet",
        "quartznet_ctc",
        "quartznet_hybrid",
    },
    "data": {"audio"},
}
RECORDINGS = {"commands", "digit_strings", "digit_strings_transducer", "digits"}  # experiments on them
PUBLISHED = {  # numbers of parameters
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama31_8b": 8_030_261_248,
    "llama32_1b": 1_235_814_400,
}


def train(*overrides):
    schema = schema_of("nemolet.cli.train", "Settings")
    return validated("train", overrides, schema, supplied=SUPPLIED)


def kind(group, option):
    """What an option is used with: recordings, or short texts."""
    if group == "experiment" and option in RECORDINGS:
        return []
    speech = option in SPEECH.get(group, ())
    return ["model=conformer_ctc", "data=audio", "loss=ctc"] if speech else [SHORT]


def settings(*overrides):
    return construct(schema_of("nemolet.cli.train", "Settings"), train(*overrides))


@pytest.mark.parametrize("group, option", CHOICES)
def test_every_option_validates(group, option):
    config = train(*kind(group, option), f"{group}={option}", *NEEDS.get((group, option), []))
    assert set(config) == set(train(SHORT))


@pytest.mark.parametrize("option", GROUPS["model"])
def test_every_model_builds(option):
    config = {**train(*kind("model", option), f"model={option}")["model"]}
    for size in ("vocab_size", "classes"):
        if size in config:
            config[size] = config[size] or 1024
    with torch.device("meta"):
        model = build(config)
    assert isinstance(model, nl.speech.Recognizer | nl.speech.AudioClassifier | nl.language.CausalLM)
    assert set(nl.parameter_axes(model)) == {name for name, _ in model.named_parameters()}
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PUBLISHED.get(option, count)


@pytest.mark.parametrize("option", GROUPS["loss"])
def test_every_loss_builds(option):
    loss = build(train(f"loss={option}")["loss"])
    assert {"loss", "count"} <= set(loss.output_ports)


@pytest.mark.parametrize("schedule", GROUPS["schedule"])
@pytest.mark.parametrize("optim", GROUPS["optim"])
def test_every_optimizer_follows_every_schedule(optim, schedule):
    made = settings(f"optim={optim}", f"schedule={schedule}")
    model = nl.language.CausalLM(vocab_size=9, layers=1, width=8, heads=2)
    optimizer = made.optim.make(model)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    factors = [made.schedule.factor(step, 300) for step in range(301)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) == 1
    assert factors[0] < factors[made.schedule.warmup_steps]


@pytest.mark.parametrize("option", GROUPS["tokenizer"])
def test_every_tokenizer_is_made(option, poem, tmp_path):
    nl.tokenizers.save_tokenizer(nl.tokenizers.ByteTokenizer(), tmp_path / "tok")
    spec = settings(f"tokenizer={option}", f"tokenizer.path={tmp_path / 'tok'}").tokenizer
    if spec.kind == "sentencepiece":
        spec = type(spec)(spec.kind, vocab_size=300)  # the poem has few words
    tokenizer = spec.make(nl.data.TextFiles([str(poem)]))
    assert tokenizer.decode(tokenizer.encode("the rain in spain")) == "the rain in spain"


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_experiment_passes_check(experiment, capsys):
    assert main(["check", f"experiment={experiment}"]) == 0
    out = capsys.readouterr().out
    assert "of optimizer state" in out
    assert experiment in RECORDINGS or "GFLOP per token" in out  # what reads audio looks at its lengths


@pytest.mark.parametrize("verb", VERBS)
def test_the_file_of_a_verb_knows_only_its_settings(verb):
    config, problems = compose(verb)
    assert problems == []
    schema = schema_of(home(verb), "Settings")
    assert set(config) <= set(schema.parameters)


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_of_a_verb_is_described(verb):
    """Settings are documented where they are declared, and those of a family once."""
    source = __import__("importlib").import_module(home(verb)).Settings
    text = "".join(cls.__doc__ or "" for cls in source.__mro__)
    if verb in ("train", "check", "graph"):
        return  # made of groups, each of which describes itself
    for name in schema_of(home(verb), "Settings").parameters:
        assert re.search(rf"^\s+{name}: ", text, re.MULTILINE), name


def test_rules_speak_of_settings_that_exist():
    for name in ("train", "tokenize", "generate", "evaluate", "graph"):
        schema = schema_of(f"nemolet.cli.{name}", "Settings")
        for rule, _ in schema.rules:
            for node in ast.walk(ast.parse(rule)):
                if isinstance(node, ast.Name) and node.id != "len":
                    assert node.id in schema.parameters, rule


def test_shortened_training_runs_of_presets_differ_only_where_they_say():
    small, large = (train(f"model={name}", SHORT)["model"] for name in ("gpt2", "gpt2_xl"))
    assert {key for key in small if small[key] != large[key]} == {"layers", "width", "heads"}
