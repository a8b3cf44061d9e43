"""``nemolet finetune`` on a recognizer: its ears stay, its vocabulary is new."""

from __future__ import annotations

import pytest
import torch

import nemolet as nl
from nemolet.cli import main
from nemolet.speech import ConvEncoder, CTCRecognizer, FrontEnd, LogMel, Normalize
from nemolet.tokenizers import CharTokenizer

RUN = [
    "finetune",
    "archive=base.nemolet",
    "data=spoken_digits",
    "data.batch_seconds=8",
    "data.voices=2",
    "data.valid_voices=1",
    "data.takes=1",
    "schedule.warmup_steps=1",
    "trainer.max_steps=3",
    "trainer.valid_every=3",
    "trainer.loggers=[]",
    "trainer.progress=false",
    "trainer.accelerator=cpu",
    "folder=run",
]


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    front_end = FrontEnd(features=LogMel(sample_rate=8000, bins=8), normalize=Normalize())
    encoder = ConvEncoder(bins=8, width=8, kernels=[3])
    model = CTCRecognizer(front_end=front_end, encoder=encoder, vocab_size=3)
    return nl.save("base.nemolet", model=model, tokenizer=CharTokenizer(list("abc")))


@pytest.mark.parametrize("frozen", [True, False])
def test_the_encoder_is_kept_and_the_head_is_new(base, capsys, frozen):
    freeze = ["freeze=[encoder.*]"] if frozen else ["optim.lr=1e-3"]
    assert main([*RUN, "task=recognize", "loss=ctc", "tokenizer=word", *freeze]) == 0, capsys.readouterr().err
    before, after = nl.load(base), nl.load("run/model.nemolet")
    assert after.tokenizer.kind == "word" and after.tokenizer.vocab_size == 10
    assert after.model.vocab_size == 10 and after.model.head.weight.shape == (11, 8)
    old, new = before.model.encoder.state_dict(), after.model.encoder.state_dict()
    moved = max(float((old[name] - new[name]).abs().max()) for name in old)
    assert moved == 0.0 if frozen else 0.0 < moved < 0.01  # three steps of at most 1e-3 from the weights it had


def test_a_new_vocabulary_without_a_head_is_refused(base, capsys):
    assert main([*RUN, "loss=ctc", "tokenizer=word"]) != 0
    assert "task=recognize" in capsys.readouterr().err
    assert main([*RUN, "loss=ctc"]) != 0  # the archive knows no such letters
    assert "vocabulary" in (said := capsys.readouterr().err) or "character" in said
