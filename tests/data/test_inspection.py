"""Every kind of bad input is found before training, and counted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nemolet.data.audio import AudioArray
from nemolet.data.inspection import AudioRules, examine, spoken_time
from nemolet.data.manifest import Problem, read_audio, utterances_of_arrays
from nemolet.errors import DataError

soundfile = pytest.importorskip("soundfile")
RATE = 8000


def beep(path, seconds=1.0, channels=1, rate=RATE, gain=0.3, **options):
    samples = gain * np.sin(2 * np.pi * 300 * np.arange(int(rate * seconds)) / rate)
    soundfile.write(path, np.stack([samples] * channels, 1), rate, **options)
    return path


@pytest.fixture
def bad(tmp_path):
    """A manifest in which every line but the first and last is bad in its own way."""
    beep(tmp_path / "good.wav")
    beep(tmp_path / "short.wav", 0.01)
    beep(tmp_path / "long.wav", 40)
    beep(tmp_path / "silent.wav", gain=0.0)
    beep(tmp_path / "stereo.wav", channels=2)
    beep(tmp_path / "rate.wav", rate=16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan] * 4000), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), RATE)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "junk.flac").write_bytes(b"fLaC and then nothing")
    cut = beep(tmp_path / "cut.wav")
    cut.write_bytes(cut.read_bytes()[:9000])
    lines = [
        {"audio_filepath": "good.wav", "text": "good"},
        {"audio_filepath": "short.wav", "text": "a"},
        {"audio_filepath": "long.wav", "text": "a"},
        {"audio_filepath": "silent.wav", "text": "a"},
        {"audio_filepath": "stereo.wav", "text": "a"},
        {"audio_filepath": "rate.wav", "text": "a"},
        {"audio_filepath": "nan.wav", "text": "a"},
        {"audio_filepath": "nothing.wav", "text": "a"},
        {"audio_filepath": "empty.wav", "text": "a"},
        {"audio_filepath": "junk.flac", "text": "a"},
        {"audio_filepath": "cut.wav", "text": "a"},
        {"audio_filepath": "missing.wav", "text": "a"},
        {"audio_filepath": "good.wav"},
        {"audio_filepath": "good.wav", "text": "  ", "offset": 0.1},
        {"audio_filepath": "good.wav", "text": "grün", "offset": 0.2},
        {"audio_filepath": "good.wav", "text": "a", "duration": 7.0},
        {"audio_filepath": "good.wav", "text": "a", "duration": 0.5},
        {"audio_filepath": "good.wav", "text": "a", "offset": 0.8, "duration": 0.9},
        {"audio_filepath": "good.wav", "text": "good"},
        {"audio_filepath": "good.wav", "text": "part", "offset": 0.25, "duration": 0.5},
    ]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


RULES = AudioRules(
    needs=("text",),
    min_seconds=0.1,
    max_seconds=30.0,
    sample_rate=RATE,
    channels="refuse",
    characters="abcdefghijklmnopqrstuvwxyz ",
)


def test_each_bad_entry_is_named_with_its_line(bad):
    found = examine(read_audio(bad), RULES)
    assert [u.utterance.where for u in found.usable] == [f"{bad}:1", f"{bad}:20"]
    told = {int(p.where.rpartition(":")[2]): p for p in (*found.problems, *found.outside)}
    expected = {
        2: "too short (below 0.1 s): 0.010 s",
        3: "too long (above 30 s): 40.000 s",
        4: "nothing but silence",
        5: "several channels: 2",
        6: "another sample rate: 16000 instead of 8000",
        7: "samples that are no numbers",
        8: "no sample at all",
        9: "the audio file is empty",
        10: "the audio cannot be decoded",
        11: "shorter than its header",
        12: "there is no such audio file",
        13: "the field text is missing",
        14: "the text is empty",
        15: "characters outside the alphabet: 'ü'",
        16: "the duration is wrong: up to 7.000 s, but there are 1.000 s",
        17: "the duration is wrong: 0.500 s, but there are 1.000 s",
        18: "the part lies beyond the end of the audio",
        19: f"a duplicate: also at {bad}:1",
    }
    assert set(told) == set(expected)
    for line, text in expected.items():
        assert text in str(told[line])
    assert {p.where for p in found.outside} == {f"{bad}:2", f"{bad}:3"}  # a matter of taste, not a mistake
    assert "2 utterances, 1.5 s; left out: " in str(found)


@pytest.mark.parametrize("decode", [True, False])
def test_two_hours_are_left_out_or_taken(tmp_path, decode):
    path = beep(tmp_path / "hours.flac", seconds=7200, rate=1000)
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio_filepath": path.name, "text": "a"}))
    rules = {"needs": ("text",), "min_seconds": 0.1, "sample_rate": None, "channels": "mix"}
    found = examine(read_audio(tmp_path / "m.jsonl"), AudioRules(max_seconds=30.0, **rules), decode=decode)
    assert not found.usable and "too long (above 30 s): 7200.000 s" in str(found.outside[0])
    found = examine(read_audio(tmp_path / "m.jsonl"), AudioRules(max_seconds=8000.0, **rules), decode=decode)
    assert [each.seconds for each in found.usable] == [7200.0]


def test_all_problems_are_raised_at_once(bad):
    found = examine(read_audio(bad), RULES)
    with pytest.raises(DataError, match=r"16 of the entries cannot be used[\s\S]*bad.jsonl:4[\s\S]*and 6 more"):
        found.refuse_problems("data.path")
    examine(read_audio(bad)[:1], RULES).refuse_problems("data.path")  # nothing to refuse


def test_a_part_lies_where_it_was_said_to(bad):
    part = examine(read_audio(bad), RULES).usable[1]
    assert (part.start, part.stop, part.seconds) == (2000, 6000, 0.5)


def test_a_rounded_duration_loses_no_sample(tmp_path):
    beep(tmp_path / "a.wav", 0.74485)
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 0.7448}')
    [usable] = examine(read_audio(tmp_path / "m.jsonl"), AudioRules()).usable
    assert usable.stop == usable.facts.frames == 5958


def test_what_was_found_is_remembered_as_long_as_the_file_stays(tmp_path):
    path, looked = beep(tmp_path / "a.wav"), []
    for _ in range(2):
        examine(read_audio(tmp_path), AudioRules(), cache=tmp_path / "cache", progress=looked.append)
    assert looked == [1]
    beep(path, 2.0)
    [usable] = examine(read_audio(tmp_path), AudioRules(), cache=tmp_path / "cache", progress=looked.append).usable
    assert looked == [1, 1] and usable.seconds == 2.0
    path.unlink()
    entries = utterances_of_arrays([np.zeros(8000) + 0.1], sample_rate=RATE)
    assert len(examine(entries, AudioRules(), cache=tmp_path / "cache").usable) == 1  # arrays have nothing to go by


def test_problems_of_reading_stay_problems():
    problem = Problem("here", "bad")
    found = examine([problem], AudioRules())
    assert found.problems == (problem,) and not found.usable


def test_headers_alone_are_enough_where_asked_for(bad):
    found = examine(read_audio(bad), RULES, decode=False)
    lines = {p.where.rpartition(":")[2] for p in found.problems}
    assert not {"4", "7"} & lines and "11" in lines


def test_arrays_are_examined():
    entries = utterances_of_arrays([np.ones(800) * 0.5, np.full(800, np.inf), np.zeros(800)], sample_rate=RATE)
    found = examine(entries, AudioRules())
    assert [p.what for p in found.problems] == ["samples that are no numbers", "nothing but silence"]
    assert isinstance(found.usable[0].utterance.recording, AudioArray)


def test_times_are_for_people():
    assert [spoken_time(s) for s in (1, 119.94, 600, 7200)] == ["1.0 s", "119.9 s", "10.0 min", "2.00 h"]
