"""The verb that looks into recordings."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from nemolet.cli import main
from nemolet.data.audio_corpus import AudioCorpus

soundfile = pytest.importorskip("soundfile")


@pytest.fixture
def folder(tmp_path):
    """Two labels, one corrupt file, one short one."""
    for label, pitch in (("low", 0.1), ("high", 0.3)):
        (tmp_path / "audio" / label).mkdir(parents=True)
        for index in range(5):
            wave = 0.3 * np.sin(np.arange(4000 + 400 * index) * pitch)
            soundfile.write(tmp_path / "audio" / label / f"{index}.wav", wave, 8000)
    (tmp_path / "audio" / "low" / "bad.flac").write_bytes(b"fLaC")
    soundfile.write(tmp_path / "audio" / "high" / "short.wav", np.full(40, 0.2), 8000)
    return tmp_path


def test_it_lists_what_is_wrong_and_says_what_there_is(folder, capsys):
    assert main(["manifest", f"path={folder / 'audio'}", "min_seconds=0.1"]) == 1
    out = capsys.readouterr().out
    assert "bad.flac: the audio cannot be decoded" in out and "short.wav: too short" in out
    assert "usable      10 utterances, 6.0 s" in out
    assert "lengths     0.50 s to 0.70 s; median 0.60 s, mean 0.60 s" in out
    assert "rates       8000 Hz (10)" in out and "labels      high (5), low (5)" in out
    assert "wrong       1 x the audio cannot be decoded" in out and "left out    1 x too short" in out


def test_it_writes_a_manifest_that_training_reads(folder, capsys):
    out, picture = folder / "all.jsonl", folder / "lengths.svg"
    command = ["manifest", f"path={folder / 'audio'}", f"out={out}", f"picture={picture}", "min_seconds=0.1"]
    assert main(command) == 0
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(entries) == 10
    assert entries[0] == {"audio_filepath": "audio/high/0.wav", "duration": 0.5, "label": "high"}
    assert "Lengths of 10 utterances" in "".join(ElementTree.parse(picture).getroot().itertext())
    capsys.readouterr()
    assert main(["manifest", f"path={out}", "needs=[label]"]) == 0
    data = AudioCorpus(path=str(out), target="label", sample_rate=8000, valid_fraction=0.3).prepare()
    assert data.classes == ("high", "low")


def test_texts_are_looked_at_character_by_character(folder, capsys):
    out = folder / "text.jsonl"
    lines = [{"audio_filepath": "audio/low/0.wav", "text": "größe"}, {"audio_filepath": "audio/low/1.wav", "text": "a"}]
    out.write_text("\n".join(map(json.dumps, lines)))
    assert main(["manifest", f"path={out}"]) == 0
    text = capsys.readouterr().out
    assert "characters  6: aegrßö" in text and "'g' 1" in text
    assert main(["manifest", f"path={out}", "characters='abcdefgr '"]) == 1
    assert "text.jsonl:1: characters outside the alphabet: 'ß' 'ö'" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, status", [(["path=nothing_here"], 1), ([], 2), (["path=x", "channels=all"], 2)])
def test_mistakes_are_answered(arguments, status, capsys):
    assert main(["manifest", *arguments]) == status
    err = capsys.readouterr().err
    assert err and "Traceback" not in err


def test_real_recordings_pass_but_for_the_two_corrupt_ones(shared_data, capsys):
    assert main(["manifest", f"path={shared_data / 'kws6' / 'corrupt'}"]) == 1
    assert "wrong       2 x the audio cannot be decoded" in capsys.readouterr().out
