"""What the README shows is true: its Python runs, its commands work, its error is the one that is printed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import nemolet as nl
from nemolet.cli import main
from nemolet.errors import NemoletError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
VERBS = [line for line in COMMANDS if line.startswith("nemolet ")]
MAKE = [line for line in COMMANDS if line.startswith("make ")]

# A run of the README takes minutes; these make the same run one of seconds.
_SHORT = [
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.kv_heads=2",
    "model.ffn_width=32",
    "tokenizer=char",
    "data.sequence_length=16",
    "data.batch_size=2",
    "data.valid_fraction=0.01",
    "schedule.warmup_steps=1",
    "trainer.max_steps=2",
    "trainer.valid_every=2",
    "trainer.valid_batches=1",
    "trainer.loggers=[]",
    "trainer.accelerator=cpu",
    "sample.max_new_tokens=4",
    "sample.prompt=the",
]
QUICKER = {"train": [*_SHORT, "data.path=my.txt"], "evaluate": ["max_batches=2"], "generate": ["max_new_tokens=4"]}


def blocks(kind):
    return [text for found, text in BLOCKS if found == kind]


def test_the_readme_has_what_is_tested_here():
    assert len(blocks("python")) == 1
    assert len(blocks("text")) == 1
    assert {line.split()[1] for line in VERBS} >= {"train", "evaluate", "generate", "check", "graph", "list"}
    assert MAKE == ["make demo", "make test"]


@pytest.mark.parametrize("block", blocks("python"))
def test_the_python_runs(block, capsys):
    space = {}
    exec(compile(block, "README.md", "exec"), space)
    out = capsys.readouterr().out
    assert "decoder" in out
    assert set(space["graph"].input_ports) == {"tokens", "labels"}


def test_the_error_is_the_one_that_is_printed():
    block = blocks("python")[0].replace("width=384, heads=6", "width=512, heads=8")
    with pytest.raises(NemoletError) as error:
        exec(compile(block, "README.md", "exec"), {})
    assert str(error.value).strip() == blocks("text")[0].strip()


@pytest.fixture(scope="module")
def workplace(poem, tmp_path_factory):
    """A folder with the files that the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(poem, folder / "my.txt")
    tokenizer = nl.tokenizers.ByteTokenizer()
    model = nl.language.CausalLM(vocab_size=tokenizer.vocab_size, layers=1, width=8, heads=2, context=32)
    nl.save(folder / "runs/demo/model.nemolet", model=model, tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize("line", VERBS)
def test_a_command_works(line, workplace, tmp_path, monkeypatch, capsys):
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    _, verb, *arguments = shlex.split(line)
    quicker = [q for q in QUICKER.get(verb, []) if q.split("=")[0] not in [a.split("=")[0] for a in arguments]]
    folder = ["folder=trained"] if verb == "train" else []
    assert main([verb, *arguments, *quicker, *folder]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.strip()
    if verb == "train":
        assert nl.load("trained/model.nemolet").tokenizer is not None
    for name in re.findall(r"out=(\S+)", line):
        assert (tmp_path / name).is_file()


@pytest.mark.parametrize("line", MAKE)
def test_make_knows_the_target(line):
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    done = subprocess.run([*line.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("nemolet train experiment=demo" if "demo" in line else "pytest") in done.stdout


def test_files_that_are_named_exist():
    """Pages under docs come and go with their topic; the rest of the README's links have to hold."""
    for name in ("CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt", "setup.cfg"):
        assert (ROOT / name).is_file()
