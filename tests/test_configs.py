"""Every option of every config group composes, validates and builds."""

from __future__ import annotations

import ast
import re

import pytest
import torch
from omegaconf import OmegaConf

import nemolet as nl
from nemolet.cli import SUPPLIED, VERBS, home, main
from nemolet.cli.train import with_sizes
from nemolet.config import build, compose, config_folder, schema_of, validated
from nemolet.config.registry import construct
from tests.golden.test_golden import ON_ARCHIVES

GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(config_folder().iterdir())
    if folder.is_dir() and not folder.name.startswith("_")
}
FINETUNE = {"adapter", "task"}  # groups of nemolet finetune alone
GROUPS["experiment"] = [name for name in GROUPS["experiment"] if name not in ON_ARCHIVES]
CHOICES = [(group, option) for group, options in GROUPS.items() for option in options if group not in FINETUNE]
# What an option needs beside itself.
NEEDS = {
    ("tokenizer", "file"): ["tokenizer.path=tok"],
    ("tokenizer", "phone"): ["tokenizer.path=words.dict"],
    ("data", "features"): ["data.path=an4.jsonl", "data.arrays=an4.npz"],
}
SHORT = "data.sequence_length=8"  # so that it fits the shortest context
PATH = ["data.path=examples"]  # what sources of examples need
EXAMPLES = {"labelled", "multi_labelled", "requests", "tagged", "questions", "similar", "parallel"}
EXAMPLES |= {"instructions", "preferences"}
SPEECH = {  # what reads recordings, not text
    "model": {
        "cnn_classifier",
        "cnn_hybrid",
        "conformer_attention",
        "conformer_ctc",
        "conformer_hybrid",
        "conformer_transducer",
        "ecapa",
        "fast_conformer_ctc",
        "features_ctc",
        "features_hybrid",
        "matchboxnet",
        "quartznet_ctc",
        "quartznet_hybrid",
        "speech_detector",
    },
    "data": {"audio", "features", "spoken_digits"},
}
RECORDINGS = {  # experiments on them, and what they need beside themselves
    "an4_transducer": ["data.path=an4.jsonl", "data.arrays=an4.npz"],
    "commands": [],
    "digit_strings": [],
    "digits": [],
    "speakers": [],
    "spoken_digits": [],
    "voice_activity": [],
}
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
    "mistral_7b": 7_241_732_096,
    "qwen25_7b": 7_615_616_512,
    "qwen25_500m": 494_032_768,
    "qwen3_8b": 8_190_735_360,
    "qwen3_600m": 596_049_920,
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "phi3_mini": 3_821_079_552,
    "bert_base": 109_514_298,
    "bert_large": 335_174_458,
    "roberta_base": 124_697_433,
    "modernbert_base": 149_655_232,
    "modernbert_large": 395_881_664,
}


def train(*overrides):
    schema = schema_of("nemolet.cli.train", "Settings")
    return validated("train", overrides, schema, supplied=SUPPLIED)


def kind(group, option):
    """What an option is used with: recordings, or short texts."""
    if group == "experiment":  # is whole
        return RECORDINGS.get(option, [])
    if (group, option) == ("data", "masked"):  # has text inside
        return ["data.text.sequence_length=8"]
    speech = option in SPEECH.get(group, ())
    return ["model=conformer_ctc", "data=audio", "loss=ctc"] if speech else [SHORT]


def settings(*overrides):
    return construct(schema_of("nemolet.cli.train", "Settings"), train(*overrides))


@pytest.mark.parametrize("group, option", CHOICES)
def test_every_option_validates(group, option):
    shortened = {("data", name): PATH for name in EXAMPLES}.get((group, option), kind(group, option))
    config = train(*shortened, f"{group}={option}", *NEEDS.get((group, option), []))
    assert set(config) == set(train(SHORT))


@pytest.mark.parametrize("group", sorted(FINETUNE))
def test_every_way_to_fine_tune_validates(group):
    schema = schema_of("nemolet.cli.finetune", "Settings")
    for option in GROUPS[group]:
        overrides = [f"{group}={option}", "archive=base.nemolet", *PATH]
        config = validated("finetune", overrides, schema, supplied=SUPPLIED)
        block = config["adapter" if group == "adapter" else "model"]
        parts = {"encoder": "encoder", "backbone": "base", "base": "base"}
        used = [part for part, name in parts.items() if block.get(part) == {"_ref_": name}]
        assert block.get("rank") == 8 or used


@pytest.mark.parametrize("experiment", sorted(ON_ARCHIVES))
def test_every_experiment_on_an_archive_validates(experiment):
    schema = schema_of("nemolet.cli.finetune", "Settings")
    config = validated("finetune", [f"experiment={experiment}", "archive=base.nemolet"], schema, supplied=SUPPLIED)
    assert "model" not in config or config["model"]["encoder"] == {"_ref_": "encoder"}


@pytest.mark.parametrize("option", GROUPS["model"])
def test_every_model_builds(option):
    config = {**train(*kind("model", option), f"model={option}")["model"]}
    sizes = {"vocab_size": 257 if option.startswith("spelling") else 1024, "classes": 1024}  # spelling is of bytes
    sizes |= {name: ["O", "B-x", "I-x"] for name in ("labels", "intents", "slots")}
    blocks = (config, config.get("encoder") or {}, config.get("model") or {})
    known = {name for block in blocks for name, value in block.items() if value is None}
    with torch.device("meta"):
        model = build(with_sizes(config, {name: size for name, size in sizes.items() if name in known}))
    assert isinstance(model, nl.NeuralModule)
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
    (tmp_path / "words.dict").write_text("the DH AH0\nrains R EY1 N Z\n")
    path = tmp_path / ("words.dict" if option == "phone" else "tok")
    spec = settings(f"tokenizer={option}", f"tokenizer.path={path}").tokenizer
    if spec.kind == "sentencepiece":
        spec = type(spec)(spec.kind, vocab_size=300)  # the poem has few words
    tokenizer = spec.make(nl.data.TextFiles([str(poem)]))
    said, back = "the rain in spain", "the rain in spain"
    if option in ("word", "phone"):  # which know whole words only
        said, back = "the rains", "the rains" if option == "word" else "DH AH R EY N Z"
    assert tokenizer.decode(tokenizer.encode(said)) == back


SPELLED = ("banking77", "clinc150", "uner_ewt", "wnut17")


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_experiment_passes_check(experiment, capsys):
    assert main(["check", f"experiment={experiment}", *RECORDINGS.get(experiment, [])]) == 0
    out = capsys.readouterr().out
    assert "of optimizer state" in out
    looks_at_values = experiment in RECORDINGS or experiment in SPELLED  # at lengths of audio, at where words end
    assert looks_at_values or "GFLOP per token" in out


@pytest.mark.parametrize("verb", VERBS)
def test_the_file_of_a_verb_knows_only_its_settings(verb):
    config, problems = compose(verb)
    assert problems == []
    schema = schema_of(home(verb), "Settings")
    assert set(config) <= set(schema.parameters)


@pytest.mark.parametrize("verb", VERBS)
def test_no_value_has_the_name_of_a_group(verb):
    """Hydra takes ``task=...`` for a choice wherever there is a folder of that name."""
    assert OmegaConf.load(config_folder() / f"{verb}.yaml").keys().isdisjoint(GROUPS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_of_a_verb_is_described(verb):
    """Settings are documented where they are declared, and those of a family once."""
    source = __import__("importlib").import_module(home(verb)).Settings
    text = "".join(cls.__doc__ or "" for cls in source.__mro__)
    parameters = set(schema_of(home(verb), "Settings").parameters)
    if verb in ("train", "check", "graph", "plan", "overfit"):  # those of train are groups that describe themselves
        parameters -= set(schema_of("nemolet.cli.train", "Settings").parameters)
    for name in parameters:
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
