"""Composing a verb's config: groups, overrides, and what a user's own module adds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nemolet.config import compose, config_folder, hydra_overrides, import_user_modules, schema_of, validated
from nemolet.errors import ConfigError


def settings(verb="train"):
    return schema_of(f"nemolet.cli.{verb}", "Settings")


def train(*overrides):
    return validated("train", overrides, settings(), supplied=("model.vocab_size",))


def test_defaults_validate():
    config = train()
    assert config["model"]["_target_"] == "nemolet.language.CausalLM"
    assert config["optim"]["name"] == "adamw"


def test_groups_and_values_override():
    config = train("model=gpt_tiny", "data.sequence_length=32", "optim=muon", "optim.lr=2e-3", "trainer.ema=0.99")
    assert (config["model"]["position"], config["optim"]["name"], config["optim"]["lr"]) == ("learned", "muon", 2e-3)
    assert config["trainer"]["ema"] == 0.99  # a setting that no file mentions


@pytest.mark.parametrize("override", ["optim.eps=1e-6", "+optim.eps=1e-6", "++optim.eps=1e-6"])
def test_the_plus_signs_of_hydra_are_allowed_and_not_needed(override):
    assert train(override)["optim"]["eps"] == 1e-6


def test_an_experiment_is_an_overlay():
    config = train("experiment=demo", "trainer.max_steps=50")
    assert (config["name"], config["optim"]["name"], config["trainer"]["max_steps"]) == ("demo", "muon", 50)


def test_values_may_refer_to_each_other():
    assert train("model.context=64", "data.sequence_length=${model.context}")["data"]["sequence_length"] == 64


def test_lists_mappings_null_and_quotes():
    config = train(
        "data.path={a.txt: 1, b.txt: 0.5}",
        "optim.betas=[0.8, 0.9]",
        "trainer.max_minutes=null",
        "sample.prompt='a b, c'",
    )
    assert config["data"]["path"] == {"a.txt": 1, "b.txt": 0.5}
    assert (config["optim"]["betas"], config["sample"]["prompt"]) == ([0.8, 0.9], "a b, c")


def test_problems_of_the_command_line_and_of_the_values_come_together():
    with pytest.raises(ConfigError) as error:
        train("model=gpt_tinny", "optim.lrr=1", "nonsense", "seed=x")
    text = str(error.value)
    assert "4 problems" in text
    for words in ("did you mean model=gpt_tiny?", "did you mean optim.lr?", "this is no override", "seed: wrong type"):
        assert words in text


def test_composing_keeps_unknown_keys_for_validation():
    config, problems = compose("train", ["nope.deep=1"])
    assert (config["nope"], problems) == ({"deep": 1}, [])


def test_overrides_in_the_form_of_hydra():
    usable, problems = hydra_overrides(["model=gpt_tiny", "seed=1", "~sample", "hydra.verbose=true", "seed=1,2"])
    assert usable == ["model=gpt_tiny", "++seed=1", "~sample", "hydra.verbose=true"]
    assert [(p.path, p.what) for p in problems] == [("seed", "several values need a sweep")]
    usable, problems = hydra_overrides(["model=gpt_tiny,llama_tiny", "seed=range(3)"], sweep=True)
    assert (usable, problems) == (["model=gpt_tiny,llama_tiny", "++seed=range(3)"], [])


def test_another_folder_of_configs(tmp_path):
    (tmp_path / "list.yaml").write_text("group: data\n")
    assert validated("list", [], settings("listing"), folder=tmp_path) == {"group": "data"}
    assert (config_folder() / "train.yaml").is_file()


@pytest.mark.parametrize("names", [None, [], "text", 3, [1], {"a": 1}])
def test_imports_of_another_type_are_left_to_validation(names):
    import_user_modules(names)


@pytest.mark.parametrize("content, words", [(None, "No module named"), ("1 / 0", "division"), ("def", "syntax")])
def test_a_module_that_cannot_be_imported(content, words, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    if content:
        (tmp_path / "broken_module.py").write_text(content)
    with pytest.raises(ConfigError, match=words) as error:
        import_user_modules(["broken_module"])
    assert error.value.where == "imports"


MODULE = '''
import nemolet as nl
from nemolet.types import LogitsBTV, TokenIdsBT

@nl.register
class Bigram(nl.NeuralModule):
    """The next token from the last one."""

    def __init__(self, *, vocab_size: int, scale: float = 1.0) -> None:
        super().__init__(V=vocab_size)
        self.table, self.vocab_size = nl.nn.Embedding("V", "V", vocab_size, vocab_size), vocab_size

    def forward(self, tokens: TokenIdsBT) -> LogitsBTV:
        return self.table(tokens)
'''


def test_a_users_module_file_adds_a_model(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    code = """if True:
        import sys
        from nemolet.cli import main
        command = ["check", "imports=[mine]", "~model", "++model._target_=mine.Bigram"]
        assert main([*command, "+model.scael=2"]) == 2
        assert "nemolet.training" not in sys.modules
        sys.exit(main([*command, "++model.vocab_size=300", "+model.scale=2", "tokenizer.vocab_size=300"]))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "did you mean model.scale?" in done.stderr
    assert "Bigram" in done.stdout
    assert "90,000 parameters" in done.stdout
