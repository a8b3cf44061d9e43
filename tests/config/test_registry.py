"""Building from plain data: nemolet's own modules and registered classes, nothing else."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import nemolet as nl
from nemolet.config import build, register, resolve, schema_of, schema_of_target
from nemolet.config.registry import construct
from nemolet.errors import ConfigError, ShapeError
from nemolet.types import HiddenBTD

LINEAR = {"_target_": "nemolet.nn.Linear", "in_axis": "D", "out_axis": "F", "in_size": 2, "out_size": 3}


@register
class Scale(nl.NeuralModule):
    """A module of a user."""

    def __init__(self, *, width: int, inner: nl.nn.Linear | None = None, factor: float = 1.0) -> None:
        super().__init__(D=width)
        self.inner, self.factor = inner, factor

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return hidden * self.factor


@register
def broken(*, size: int) -> list[int]:
    """What a user wrote in haste."""
    return [1][size]


SCALE = f"{Scale.__module__}.Scale"


def test_a_block_becomes_its_module():
    linear = build(LINEAR)
    assert type(linear) is nl.nn.Linear
    assert linear.weight.shape == (3, 2)


def test_what_has_no_target_stays_data():
    assert build({"a": [1, {"b": None}], "c": "text"}) == {"a": [1, {"b": None}], "c": "text"}
    assert build([1, LINEAR["in_axis"]]) == [1, "D"]


def test_parts_refer_to_earlier_parts():
    config = {
        "embed": {"_target_": "nemolet.nn.Embedding", "token_axis": "V", "width_axis": "D", "vocab": 5, "width": 2},
        "head": {"_target_": "nemolet.nn.Head", "in_axis": "D", "out_axis": "V", "tied": {"_ref_": "embed"}},
    }
    made = build(config)
    assert made["head"].weight is made["embed"].weight


def test_parts_of_the_caller_may_be_referred_to():
    embed = nl.nn.Embedding("V", "D", 5, 2)
    head = build(
        {"_target_": "nemolet.nn.Head", "in_axis": "D", "out_axis": "V", "tied": {"_ref_": "embed"}},
        parts={"embed": embed},
    )
    assert head.weight is embed.weight


@pytest.mark.parametrize("name", ["embedd", None, ["embed"], {"a": 1}, 3])
def test_a_reference_to_nothing_is_refused(name):
    with pytest.raises(ConfigError, match="nothing was built under this name yet") as error:
        build({"tied": {"_ref_": name}}, parts={"embed": 1})
    if name == "embedd":
        assert error.value.fix == "did you mean 'embed'?"


def test_what_lies_inside_one_part_is_not_seen_from_another():
    with pytest.raises(ConfigError, match="nothing was built"):
        build({"a": {"inner": 1}, "b": {"_ref_": "inner"}})


@pytest.mark.parametrize(
    "target",
    [
        "torch.load",
        "os.system",
        "builtins.eval",
        "builtins.open",
        "subprocess.run",
        "nemolet.module.torch.load",
        "nemolet.data.IndexedWriter",
        "nemolet.data.indexed.IndexedWriter",
        "nemolet.archive.save",
        "nemolet.archive.load",
        "nemolet.config.registry.importlib.import_module",
        "nemolet.config.registry.resolve",
        "nemolet.data.corpus.PreparedCorpus",
        "nemolet.archive.os.remove",
        "nemolet.nn.transformer.checkpoint",
        "nemolet.nn._EXPORTS",
        "nemolet.graph._match",
        "nemolet.nn.Linear.__init__",
        "nemolet.nn.Linear.forward",
        "nemolet.__builtins__.eval",
        "nemolet",
        "nemolet.Graph",
        "",
        ".",
        "nemolet..",
        "nemolet.nn.",
        "nemolet.nn.Linear ",
        "nemolet.nn.Lin\u00adear",
        "nemolet/nn.Linear",
        None,
        3,
        2.5,
        True,
        ["nemolet.nn.Linear"],
        {"a": "nemolet.nn.Linear"},
        b"nemolet.nn.Linear",
    ],
)
def test_the_allowlist_refuses_everything_else(target, tmp_path):
    for refused in (resolve, schema_of_target):
        with pytest.raises(ConfigError) as error:
            refused(target, "model._target_")
        assert error.value.where == "model._target_"
    canary = tmp_path / "canary"
    with pytest.raises(ConfigError):
        build({"_target_": target, "path": str(canary), "command": f"touch {canary}", "source": "1", "f": str(canary)})
    assert not canary.exists()


def test_a_refused_target_is_not_imported(tmp_path):
    code = """
        import sys
        from nemolet.config import resolve
        from nemolet.errors import ConfigError
        for target in ("os.system", "torch.load", "json.tool.main", "this.Zen", "antigravity.x.y",
                       "nemolet.archive.save", "nemolet.data.IndexedWriter", "nemolet.module.torch.load"):
            try:
                resolve(target)
            except ConfigError:
                continue
            raise SystemExit(f"{target} was allowed")
        names = {"torch", "this", "antigravity", "nemolet.archive", "nemolet.module"}
        print(sorted(names & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize(
    "target, fix",
    [
        ("nemolet.language.CausalML", "did you mean nemolet.language.CausalLM?"),
        ("nemolet.nn.transformer.Decodr", "did you mean nemolet.nn.transformer.Decoder?"),
        (f"{SCALE}s", f"did you mean {SCALE}?"),
    ],
)
def test_a_near_name_is_suggested(target, fix):
    with pytest.raises(ConfigError) as error:
        resolve(target)
    assert error.value.fix == fix


def test_a_registered_class_is_built_and_checked():
    made = build({"_target_": SCALE, "width": 2, "factor": 3, "inner": LINEAR})
    assert isinstance(made, Scale)
    assert isinstance(made.inner, nl.nn.Linear)
    assert made(torch.ones(1, 1, 2)).tolist() == [[[3.0, 3.0]]]
    with pytest.raises(ConfigError, match="2 problems") as error:
        build({"_target_": SCALE, "widht": 2}, where="model")
    assert "did you mean model.width?" in str(error.value)
    with pytest.raises(ConfigError, match="wrong type"):
        build({"_target_": SCALE, "width": "2"})


def test_a_class_that_is_not_registered_is_refused_with_advice():
    class Mine(nl.NeuralModule):
        def forward(self, hidden: HiddenBTD) -> HiddenBTD:
            return hidden

    with pytest.raises(ConfigError, match="nemolet.register"):
        build({"_target_": f"{Mine.__module__}.Mine"})


def test_a_constructor_that_fails_says_where():
    with pytest.raises(ConfigError, match="IndexError: list index out of range") as error:
        build({"layer": {"_target_": f"{broken.__module__}.broken", "size": 2}}, where="model")
    assert error.value.where == "model.layer"
    with pytest.raises(ShapeError, match="heads do not divide"):  # errors of ours stay what they are
        build({"_target_": "nemolet.nn.Attention", "width": 8, "heads": 3})


def test_all_mistakes_of_a_tree_are_found_before_anything_is_built():
    with pytest.raises(ConfigError, match="3 problems"):
        build({"a": {**LINEAR, "in_size": "2"}, "b": {**LINEAR, "bais": True}, "c": {"_target_": "os.system"}})


def test_what_config_writes_build_reads():
    model = nl.language.CausalLM(vocab_size=7, layers=1, width=8, heads=2, context=8)
    config = model.config()
    again = build(config)
    assert again.config() == config
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


def test_settings_become_dataclasses_all_the_way_down():
    schema = schema_of("nemolet.training.optim", "Optim")
    optim = construct(schema, {"name": "adamw", "betas": [0.8, 0.9]})
    assert optim == nl.training.Optim("adamw", betas=(0.8, 0.9))
