"""The command is killed at random moments and given again: in the end nothing tells it from one that was left alone.

The number of cuts is small here; ``NEMOLET_CUTS=20`` asks for more, and prints what each of them hit.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import nemolet as nl
from tests.equality import assert_equal

CUTS = int(os.environ.get("NEMOLET_CUTS", "3"))
STEPS = 25 * (CUTS + 1)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)
WATCHER = """
import json, os, time
from nemolet.data import loader

original = loader.collate

def collate(samples, numbers):
    if samples.order == "shuffled":
        with open(os.environ["BATCHES"], "a") as file:
            file.write(json.dumps([os.getpid(), *numbers]) + "\\n")
        time.sleep(0.005)  # steps are so short that most of them would be over before the signal arrives
    return original(samples, numbers)

loader.collate = collate
"""


def start(poem, folder: Path) -> subprocess.Popen:
    """The command as a user types it; a module of ours notes which batches it reads."""
    watchers = folder.parent / "watchers"
    watchers.mkdir(exist_ok=True)
    (watchers / "watcher_of_batches.py").write_text(WATCHER)
    model = {"layers": 1, "width": 16, "heads": 2, "context": 16, "dropout": 0.2}
    trainer = {"max_steps": STEPS, "accumulate": 2, "ema": 0.9, "valid_every": 7, "log_every": 3, "checkpoint_every": 4}
    trainer |= {"background_checkpoints": "true", "accelerator": "cpu", "loggers": "[]", "progress": "false"}
    data = {"path": poem, "sequence_length": 16, "batch_size": 4, "cache": folder.parent / "cache"}
    settings = {"model": model, "trainer": trainer, "data": data, "schedule": {"warmup_steps": 5}}
    overrides = [f"++{group}.{name}={value}" for group, each in settings.items() for name, value in each.items()]
    overrides += [f"folder={folder}", "imports=[watcher_of_batches]", "sample.max_new_tokens=0"]
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "nemolet"), "train", "model=gpt_tiny", "tokenizer=char", *overrides],
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(watchers), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "BATCHES": str(folder.with_suffix(".batches")),
        },
    )


def last(folder: Path) -> dict:
    """The checkpoint that ``last`` points to, which has to be whole."""
    return torch.load(folder / "checkpoints" / "last", weights_only=True)


def step_of(folder: Path) -> int:
    link = folder / "checkpoints" / "last"
    return int(link.resolve().stem[5:]) if link.exists() else 0


def parts(folder: Path) -> list[list[list[int]]]:
    """Batch ids by process, in order, without the first, which is only looked at to know the data."""
    found: dict[int, list[list[int]]] = {}
    for line in folder.with_suffix(".batches").read_text().splitlines():
        process, *numbers = json.loads(line)
        found.setdefault(process, []).append(numbers)
    return [batches[1:] for batches in found.values()]


def numbers_of(folder: Path) -> list[list[str]]:
    """What the log says of training, without clocks."""
    columns = ("step", "tokens", "train_loss", "valid_loss", "bits_per_byte", "learning_rate", "gradient_norm")
    with (folder / "metrics.csv").open(newline="") as file:
        return [[row[name] for name in columns] for row in csv.DictReader(file)]


def cut(poem, folder: Path, rng: random.Random, number: int) -> bool:
    """Start the command and end it at a random moment; whether it was still at work then."""
    before, process = step_of(folder), start(poem, folder)
    sent, early = SIGNALS[number % len(SIGNALS)], rng.random() < 0.2
    if early and sent == signal.SIGINT:
        sent = signal.SIGKILL  # an interrupt in the middle of an import may be lost there
    moment = time.monotonic() + rng.random() * 15  # wherever it is then, reading and starting included
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if time.monotonic() > moment if early else step_of(folder) > before:
            break
        time.sleep(0.01)
    time.sleep(0 if early else rng.random() * 0.4)
    at_work = process.poll() is None
    process.send_signal(sent)
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    after = step_of(folder)
    print(f"cut {number}: {sent.name} {'early' if early else ''} steps {before} -> {after}", flush=True)
    assert after >= before, output
    if after:
        state = last(folder)
        assert state["global_step"] == after
        assert all(weight.isfinite().all() for weight in state["state_dict"].values())
    return at_work


@pytest.mark.slow
def test_a_run_that_was_killed_again_and_again_is_the_run_that_was_left_alone(poem, tmp_path):
    rng = random.Random(3)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    hits = sum(cut(poem, killed, rng, number) for number in range(CUTS))
    for folder in (whole, killed):
        process = start(poem, folder)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    one, two = last(whole), last(killed)
    assert one["global_step"] == two["global_step"] == STEPS
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "nemolet"):
        assert_equal(one[key], two[key], key)
    for name, state in one["callbacks"].items():
        if not name.startswith("Recorder"):  # which counts seconds
            assert_equal(state, two["callbacks"][name], name)
    archives = [nl.load(folder / "model.nemolet").model.state_dict() for folder in (whole, killed)]
    assert_equal(*archives)
    assert numbers_of(killed) == numbers_of(whole)
    assert json.loads((killed / "done.json").read_text()) == json.loads((whole / "done.json").read_text())
    links = [(folder / "checkpoints" / "best").resolve().name for folder in (whole, killed)]
    assert links[0] == links[1]
    expected = parts(whole)[0]
    for batches in parts(killed):
        begin = expected.index(batches[0]) if batches else 0
        assert batches == expected[begin : begin + len(batches)]
    assert not [path.name for path in (killed / "checkpoints").iterdir() if "partial" in path.name]
    batches = sum(len(part) for part in parts(killed))
    print(f"{hits} of {CUTS} cuts at work; {STEPS} steps; {batches} batches read for {len(expected)}; all equal")
    assert hits
