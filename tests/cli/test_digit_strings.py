"""The recipes of strings of digits, from recordings to what was heard."""

from __future__ import annotations

import contextlib
import importlib
import io
import json

import numpy as np
import pytest
import torch

import nemolet as nl
from nemolet.cli import main

soundfile = pytest.importorskip("soundfile")

SHORT = ["trainer.max_steps=2", "trainer.valid_every=2", "trainer.loggers=[]", "trainer.progress=false"]
SHORT += ["trainer.accelerator=cpu", "schedule.warmup_steps=1", "data.batch_seconds=8"]
SMALL = ["model.encoder.channels=[4,4,4,4]", "model.encoder.width=8"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A manifest of tones with the names of digits, of two speakers."""
    folder = tmp_path_factory.mktemp("spoken")
    entries = []
    for speaker in ("ann", "bo"):
        for number, word in enumerate(["one", "two", "three", "four"] * 2):
            pitch = 300 + 200 * (number % 4) + 50 * (speaker == "bo")
            tone = 0.3 * np.sin(2 * np.pi * pitch * np.arange(3200) / 8000)
            path = folder / f"{speaker}_{number}.wav"
            soundfile.write(path, tone, 8000)
            entries.append({"audio_filepath": str(path), "text": word, "speaker": speaker, "duration": 0.4})
    manifest = folder / "spoken.jsonl"
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return [f"data.path={manifest}", "data.valid_speakers=[bo]"]


def trained(spoken, folder, *command):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*command, *spoken, *SHORT, f"folder={folder}"]) == 0
    return f"archive={folder / 'model.nemolet'}"


@pytest.fixture(scope="module")
def hybrid(spoken, tmp_path_factory):
    return trained(spoken, tmp_path_factory.mktemp("hybrid"), "train", "experiment=digit_strings", *SMALL)


def heard(archive, spoken, out, *options):
    """What was said and what was heard, from the file that is written."""
    strings = ["data=audio", "data.sample_rate=8000", "data.join=[3,7]"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["evaluate", archive, *spoken, *strings, f"out={out}", *options]) == 0
    assert "word error rate" in printed.getvalue()
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_transducer_is_put_on_the_encoder_and_hears_longer_strings(hybrid, spoken, tmp_path):
    archive = trained(spoken, tmp_path, "finetune", "experiment=digit_strings_transducer", hybrid)
    before, after = nl.load(hybrid.removeprefix("archive=")), nl.load(archive.removeprefix("archive="))
    assert after.model.durations == (0, 1, 2, 4, 6, 8)
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    old, new = before.model.encoder.state_dict(), after.model.encoder.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)
    for options in [], ["beam=2"]:
        found = heard(archive, spoken, tmp_path / "heard.jsonl", *options)
        assert sum(len(entry["text"].split()) for entry in found) == 8  # each recording of the other speaker once


def test_a_hybrid_is_heard_by_ctc_or_by_its_transducer_greedily_or_by_a_beam(hybrid, spoken, tmp_path, monkeypatch):
    used = []

    def watched(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **more: used.append(name) or real(*args, **more))

    for name in ("greedy_ctc", "greedy_transducer"):
        watched(importlib.import_module("nemolet.speech.models"), name)
    for name in ("ctc_beam", "transducer_beam"):
        watched(importlib.import_module("nemolet.speech.beam"), name)
    ways = {
        (): "greedy_ctc",  # as the recipe says
        ("by_ctc=false",): "greedy_transducer",
        ("beam=2",): "ctc_beam",
        ("beam=2", "by_ctc=false"): "transducer_beam",
    }
    for options, way in ways.items():
        used.clear()
        heard(hybrid, spoken, tmp_path / "heard.jsonl", *options)
        assert set(used) == {way}


@pytest.mark.parametrize(
    "option, problem",
    [("beam=4", "beam: this model does not search"), ("by_ctc=true", "by_ctc: this model has no such setting")],
)
def test_what_another_model_does_not_have_is_refused(option, problem, tiny_run, poem, capsys):
    assert main(["evaluate", f"archive={tiny_run.archive}", f"data.path={poem}", option]) == 2
    assert problem in capsys.readouterr().err
