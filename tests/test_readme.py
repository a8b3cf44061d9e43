"""What the README shows is true: its Python runs, its commands work, its error is the one that is printed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

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
_STEPS = [
    "schedule.warmup_steps=1",
    "trainer.max_steps=2",
    "trainer.valid_every=2",
    "trainer.valid_batches=1",
    "trainer.loggers=[]",
    "trainer.accelerator=cpu",
]
_SHORT = [
    *_STEPS,
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.kv_heads=2",
    "model.ffn_width=32",
    "tokenizer=char",
    "data.sequence_length=16",
    "data.batch_size=2",
    "data.valid_fraction=0.01",
    "sample.max_new_tokens=4",
    "sample.prompt=the",
]
QUICKER = {
    "train": [*_SHORT, "data.path=my.txt"],
    "finetune": [*_STEPS, "data.batch_size=2"],
    "evaluate": ["max_batches=2"],
    "generate": ["max_new_tokens=4"],
    "experiment=spoken_digits": [*_STEPS, "data.batch_size=2"],
    "--dry-run": [],
}


def blocks(kind):
    return [text for found, text in BLOCKS if found == kind]


def test_the_readme_has_what_is_tested_here():
    assert len(blocks("python")) == 1
    assert len(blocks("text")) == 1
    verbs = {"train", "finetune", "evaluate", "generate", "transcribe", "convert", "check", "plan", "graph", "list"}
    assert {line.split()[1] for line in VERBS} >= verbs
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
    chats = [{"prompt": "ab"[i % 2], "response": "xy"[i % 2]} for i in range(24)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    soundfile.write(folder / "call.wav", np.random.default_rng(0).standard_normal(8000) / 10, 8000)
    tokenizer = nl.tokenizers.ByteTokenizer()
    model = nl.language.CausalLM(vocab_size=tokenizer.vocab_size, layers=1, width=8, heads=2, context=32, tied=False)
    for name in ("runs/demo/model.nemolet", "llama.nemolet"):
        nl.save(folder / name, model=model, tokenizer=tokenizer)
    nl.convert.write(folder / "llama_folder", model=model, architecture="llama")
    front_end = nl.speech.FrontEnd(features=nl.speech.LogMel(sample_rate=8000, bins=8))
    encoder = nl.speech.ConvEncoder(bins=8, width=8, kernels=[3], repeats=1, strides=[2], last_kernel=3)
    recognizer = nl.speech.CTCRecognizer(front_end=front_end, encoder=encoder, vocab_size=4)
    torch.nn.init.zeros_(recognizer.head.weight)  # of equals, the first is said: noise has a transcript
    nl.save(folder / "digits.nemolet", model=recognizer, tokenizer=nl.tokenizers.CharTokenizer(list("abc ")))
    return folder


@pytest.mark.parametrize("line", VERBS)
def test_a_command_works(line, workplace, tmp_path, monkeypatch, capsys):
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    _, verb, *arguments = shlex.split(line)
    kind = next((word for word in arguments if word in QUICKER), verb)
    quicker = [q for q in QUICKER.get(kind, []) if q.split("=")[0] not in [a.split("=")[0] for a in arguments]]
    trains = verb == "train" and "--dry-run" not in arguments
    folder = ["folder=trained"] if trains else []
    assert main([verb, *arguments, *quicker, *folder]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.strip()
    if trains:
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
