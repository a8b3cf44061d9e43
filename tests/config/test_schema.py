"""What a config may hold is read from source text, and says the same as the real signatures."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest

import nemolet.nn
from nemolet.config import schema_of
from nemolet.config.schema import (
    REQUIRED,
    Anything,
    Block,
    Choice,
    Either,
    Many,
    Plain,
    Table,
    Target,
    buildable,
    definitions,
    schema_of_object,
)

SETTINGS = [
    f"nemolet.cli.{verb}.Settings"
    for verb in ("train", "evaluate", "generate", "chat", "tokenize", "check", "graph", "listing")
]
CLASSES = [
    *(f"{home}.{name}" for name, home in nemolet.nn._EXPORTS.items() if name not in ("AttentionMask", "KVCache")),
    "nemolet.language.models.CausalLM",
    "nemolet.language.losses.CrossEntropy",
    "nemolet.data.corpus.Corpus",
    "nemolet.data.corpus.TokenizerSpec",
    "nemolet.training.optim.Optim",
    "nemolet.training.schedule.Schedule",
    "nemolet.training.settings.Training",
    "nemolet.nn.cache.KVCache",
    *SETTINGS,
]


def real(path):
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", CLASSES)
def test_the_schema_equals_the_signature(path):
    schema = schema_of(*path.rsplit(".", 1))
    parameters = inspect.signature(real(path)).parameters
    assert list(schema.parameters) == list(parameters)
    for name, parameter in parameters.items():
        default = schema.parameters[name][1]
        assert default == (REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default), name


@pytest.mark.parametrize("path", [p for p in CLASSES if dataclasses.is_dataclass(real(p))])
def test_rules_of_a_dataclass_are_those_of_its_class(path):
    assert schema_of(*path.rsplit(".", 1)).rules == getattr(real(path), "CONFIG_RULES", ())


def test_a_name_that_a_package_hands_on_is_followed_home():
    schema = schema_of("nemolet.language", "CausalLM")
    assert (schema.home, schema.name) == ("nemolet.language.models", "CausalLM")
    assert schema_of("nemolet", "NeuralModule").home == "nemolet.module"


def test_settings_extend_those_of_another_module():
    train, graph = schema_of("nemolet.cli.train", "Settings"), schema_of("nemolet.cli.graph", "Settings")
    assert graph.parameters == {
        **train.parameters,
        "out": graph.parameters["out"],
        "inside": graph.parameters["inside"],
    }
    assert graph.home == "nemolet.cli.graph"
    assert schema_of("nemolet.cli.check", "Settings") == train


@pytest.mark.parametrize(
    "module, name",
    [
        ("nemolet.nope", "Thing"),
        ("nemolet.nn", "Nope"),
        ("torch", "load"),
        ("os", "system"),
        ("nemolet.module", "torch"),
        ("nemolet.module.torch", "load"),
        ("nemolet..nn", "Linear"),
        ("nemolet./etc", "passwd"),
        ("", ""),
        ("nemolet.nn.transformer", "checkpoint"),
    ],
)
def test_what_nemolet_does_not_define_has_no_schema(module, name):
    assert schema_of(module, name) is None


def test_reading_a_schema_imports_nothing():
    code = (
        "import sys; from nemolet.config import schema_of, check_tree\n"
        "assert schema_of('nemolet.language', 'CausalLM').parameters\n"
        "assert check_tree({'_target_': 'nemolet.module.torch.load', 'f': 'x'}, 'model')\n"
        "assert check_tree({'_target_': 'nemolet.tokenizers.base.json.loads', 's': 'x'}, 'model')\n"
        "names = {'torch', 'numpy', 'sentencepiece', 'nemolet.module', 'nemolet.language', 'nemolet.tokenizers'}\n"
        "print(sorted(names & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- annotations as types


@dataclasses.dataclass
class Everything:
    """One field of each kind of annotation."""

    whole: int
    number: float
    text: str
    flag: bool
    maybe: int | None
    word: "str"  # noqa: UP037 - an annotation may be quoted
    free: object
    names: list[str]
    pair: tuple[float, float]
    row: tuple[int, ...]
    table: dict[str, float]
    either: str | list[str]
    unknown: inspect.Signature
    count: int = 1 << 4
    limit: float = 2 * 0.5


KINDS = {
    "whole": Plain("int"),
    "number": Plain("float"),
    "text": Plain("str"),
    "flag": Plain("bool"),
    "maybe": Either((Plain("int"), Plain("None"))),
    "word": Plain("str"),
    "free": Anything(),
    "names": Many((Plain("str"),)),
    "pair": Many((Plain("float"), Plain("float")), fixed=True),
    "row": Many((Plain("int"),)),
    "table": Table(Plain("float")),
    "either": Either((Plain("str"), Many((Plain("str"),)))),
    "unknown": Anything(),
}


@pytest.mark.parametrize("field", KINDS)
def test_each_annotation_becomes_its_kind(field):
    assert schema_of_object(Everything).parameters[field] == (KINDS[field], REQUIRED)


def test_arithmetic_in_a_default_is_read():
    parameters = schema_of_object(Everything).parameters
    assert (parameters["count"][1], parameters["limit"][1]) == (16, 1.0)


def test_names_in_annotations_of_nemolet_are_followed():
    corpus = schema_of("nemolet.data", "Corpus").parameters
    assert corpus["invalid_utf8"][0] == Choice(("error", "replace", "ignore"))  # an alias of another file
    train = schema_of("nemolet.cli.train", "Settings").parameters
    assert train["optim"][0] == Block("nemolet.training.optim", "Optim")
    assert train["model"][0] == Target("typed module")
    assert schema_of("nemolet.nn", "Head").parameters["tied"][0] == Either((Target("Embedding"), Plain("None")))
    assert schema_of("nemolet.graph", "compose").parameters["modules"][0] == Table(Target("NeuralModule"))


def test_a_class_without_its_own_constructor_takes_what_it_inherits():
    class Base:
        def __init__(self, *, size: int, rate: float = 0.5) -> None: ...

    class Derived(Base):
        note: str

    schema = schema_of_object(Derived)
    assert list(schema.parameters) == ["size", "rate"]
    assert schema.parameters["size"][1] is REQUIRED


def test_a_class_without_source_is_known_by_its_names():
    space = {}
    exec("class Made:\n    def __init__(self, a, b=2, **more): ...", space)
    schema = schema_of_object(space["Made"])
    assert list(schema.parameters) == ["a", "b"]
    assert schema.open


@pytest.mark.parametrize(
    "target, may",
    [
        ("nemolet.language.CausalLM", True),
        ("nemolet.nn.Linear", True),
        ("nemolet.nn.embedding.Head", True),
        ("nemolet.graph.compose", True),
        ("nemolet.language.CrossEntropy", True),
        ("nemolet.nn.RotaryEmbedding", False),
        ("nemolet.data.IndexedWriter", False),
        ("nemolet.archive.save", False),
        ("nemolet.training.optim.Optim", False),
        ("nemolet.nope.Nope", False),
    ],
)
def test_what_may_be_built_is_marked_in_the_source(target, may):
    module, name = target.rsplit(".", 1)
    assert buildable(module, name) is may
    if schema_of(module, name) is not None:
        assert getattr(real(target), "__buildable__", False) is may


def test_definitions_are_for_suggestions():
    assert {"Linear", "Decoder"} <= set(definitions("nemolet.nn"))
    assert "CausalLM" in definitions("nemolet.language.models")
    assert definitions("nemolet.nope") == []
