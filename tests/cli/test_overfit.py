"""``nemolet overfit`` on text and on recordings."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nemolet.cli import main

TEXT = [
    "tokenizer=char",
    "model=gpt_tiny",
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.context=16",
    "optim.lr=1e-2",
    "rows=1",
]


def test_a_few_words_are_learned_by_heart(poem, capsys):
    assert main(["overfit", *TEXT, f"data.path={poem}", "steps=200", "share=0.2"]) == 0
    assert "1 samples can be learned" in capsys.readouterr().out


def test_what_is_not_learned_is_said_by_the_status(poem, capsys):
    assert main(["overfit", *TEXT, f"data.path={poem}", "steps=1"]) == 1
    assert "cannot be learned in so few steps" in capsys.readouterr().out


def test_a_recognizer_shows_what_it_hears(tmp_path, capsys):
    soundfile = pytest.importorskip("soundfile")
    lines = []
    for number, text in enumerate(["ab", "ba", "a", "b"]):
        tone = 0.3 * np.sin(np.arange(6400) * (0.2 + 0.3 * number))
        soundfile.write(tmp_path / f"{number}.wav", tone, 8000)
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "text": text, "duration": 0.8}) + "\n")
    (tmp_path / "manifest.jsonl").write_text("".join(lines))
    command = [
        "overfit",
        "model=quartznet_ctc",
        "model.encoder.width=32",
        "model.encoder.kernels=[5]",
        "model.encoder.repeats=1",
        "model.encoder.last_kernel=5",
        "model.front_end.normalize=null",
        "data=audio",
        "data.sample_rate=8000",
        "data.valid_fraction=0.25",
        f"data.path={tmp_path}/manifest.jsonl",
        "tokenizer=char",
        "loss=ctc",
        "optim.lr=1e-2",
        "steps=200",
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    pairs = dict(zip(out.split("said  ")[1:], out.split("heard ")[1:]))
    assert len(pairs) == 3
    assert all(said.split("\n")[0] == heard.split("\n")[0] for said, heard in pairs.items())
