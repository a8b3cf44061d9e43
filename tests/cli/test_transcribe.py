"""``nemolet transcribe`` on files that were written here."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import nemolet as nl
from nemolet.cli import main
from nemolet.speech.subtitles import cues, srt, vtt
from nemolet.speech.transcription import Piece, Transcript
from nemolet.tokenizers import CharTokenizer

soundfile = pytest.importorskip("soundfile")


def encoder(**settings):
    return {
        "_target_": "nemolet.speech.ConformerEncoder",
        "bins": 16,
        "layers": 1,
        "width": 16,
        "heads": 2,
        "kernel": 3,
        **settings,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an archive that can stream, and three recordings at two rates."""
    folder = tmp_path_factory.mktemp("transcribe")
    torch.manual_seed(0)
    features = {"_target_": "nemolet.speech.LogMel", "sample_rate": 8000, "bins": 16}
    model = nl.build(
        {
            "_target_": "nemolet.speech.CTCRecognizer",
            "front_end": {"_target_": "nemolet.speech.FrontEnd", "features": features},
            "encoder": encoder(chunk=2, left_chunks=1),
            "vocab_size": 5,
        }
    )
    for parameter in model.parameters():
        parameter.data *= 2
    nl.save(folder / "model.nemolet", model=model, tokenizer=CharTokenizer(list(" abcd")))
    for name, rate in (("one", 8000), ("two", 8000), ("other_rate", 16000)):
        pitch = np.random.default_rng(len(name)).uniform(100, 3000, 12).repeat(rate // 8)
        tone = 0.3 * np.sin(np.cumsum(pitch) * 2 * np.pi / rate)
        soundfile.write(folder / f"{name}.wav", tone, rate)
    return folder


def run(capsys, *command):
    status = main(["transcribe", *map(str, command)])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_folder_a_pattern_and_files_are_the_same(place, capsys):
    archive = f"archive={place / 'model.nemolet'}"
    status, folder, _ = run(capsys, archive, f"audio={place}")
    assert status == 0
    assert len(folder.splitlines()) == 3
    assert run(capsys, archive, f"audio={place}/*.wav")[1] == folder
    names = ",".join(f"{place}/{name}.wav" for name in ("one", "other_rate", "two"))
    assert run(capsys, archive, f"audio=[{names}]", "batch_size=1")[1] == folder


def test_json_has_times_and_the_text(place, capsys):
    status, out, _ = run(capsys, f"archive={place}/model.nemolet", f"audio={place}/one.wav", "format=json")
    entry = json.loads(out)
    assert status == 0
    assert entry["text"] == " ".join(word["text"] for word in entry["words"])
    assert entry["duration"] == 1.5
    assert all(0 <= w["start"] <= w["end"] <= 1.5 for w in entry["words"])
    assert entry["words"]


def test_audio_that_arrives_gives_the_same_text(place, capsys):
    command = [f"archive={place}/model.nemolet", f"audio={place}/one.wav"]
    whole = run(capsys, *command)[1]
    status, out, err = run(capsys, *command, "stream=0.1")
    assert status == 0
    assert out == whole
    assert "real-time factor" in err and "latency of a token" in err
    entry = json.loads(run(capsys, *command, "stream=0.1", "format=json")[1])
    assert f"{entry['audio_filepath']}\t{entry['text']}\n" == whole
    cost = entry["stream"]
    assert cost["piece"] == 0.1 and cost["real_time_factor"] > 0 and cost["slowest_piece"] > 0
    # A token is known when the piece that fills its chunk of two frames (0.08 s) is there, not before it was said.
    assert 0 < cost["mean_latency"] <= cost["worst_latency"] <= 0.08 + 0.1 + 0.02 + cost["slowest_piece"]


def test_a_language_model_and_phrases_change_what_is_written(place, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("dada dada\n" * 5)
    model = nl.language.CausalLM(vocab_size=5, layers=1, width=8, heads=2)
    nl.save(tmp_path / "language.nemolet", model=model, tokenizer=CharTokenizer(list(" abcd")))
    command = [f"archive={place}/model.nemolet", f"audio={place}/one.wav", "beam=4"]
    plain = run(capsys, *command)[1]
    by_text = run(capsys, *command, f"language_model={text}", "language_weight=3")[1]
    assert by_text != plain
    assert set(by_text.split("\t")[1].strip()) <= set("da ")
    assert run(capsys, *command, f"language_model={tmp_path}/language.nemolet")[0] == 0
    assert "cbc" in run(capsys, *command, "boost=[cbc]", "boost_weight=9")[1]
    status, _, err = run(capsys, *command[:2], "boost=[ab]")
    assert status == 2
    assert "beam above 1" in err


@pytest.mark.parametrize("kind", ["text", "json", "srt", "vtt"])
def test_files_are_written(place, capsys, tmp_path, kind):
    run(capsys, f"archive={place}/model.nemolet", f"audio={place}", f"format={kind}", f"out={tmp_path / 'out'}")
    suffix = "txt" if kind == "text" else kind
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"{name}.{suffix}" for name in ("one", "other_rate", "two")
    ]


def test_pictures_are_drawn(place, capsys, tmp_path):
    command = [f"archive={place}/model.nemolet", f"audio={place}", f"pictures={tmp_path / 'drawn'}"]
    for stream in ([], ["stream=0.2"]):
        status, out, _ = run(capsys, *command, *stream)
        assert status == 0
        drawn = {path.stem: path.read_text() for path in (tmp_path / "drawn").iterdir()}
        assert sorted(drawn) == ["one", "other_rate", "two"]
        assert out.splitlines()[0].partition("\t")[2] in drawn["one"]


def test_a_bad_file_is_named_and_the_others_go_on(place, capsys, tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF nothing")
    empty = tmp_path / "empty.flac"
    empty.touch()
    nan = tmp_path / "nan.wav"
    soundfile.write(nan, np.full(800, np.nan, np.float32), 8000, subtype="FLOAT")
    names = f"[{bad},{empty},{nan},{place}/one.wav]"
    status, out, err = run(capsys, f"archive={place}/model.nemolet", f"audio={names}")
    assert status == 1
    assert len(out.splitlines()) == 1
    assert "bad.wav" in err
    assert "empty.flac" in err
    assert "nan.wav" in err
    assert "Traceback" not in err


def test_short_silent_wide_and_long_recordings_are_read(place, capsys, tmp_path):
    sizes = {"short": 80, "silent": 8000, "stereo": 8000, "long": 60_000}
    for name, size in sizes.items():
        samples = np.zeros(size) if name == "silent" else 0.1 * np.random.default_rng(0).standard_normal(size)
        soundfile.write(tmp_path / f"{name}.wav", np.stack([samples] * (2 if name == "stereo" else 1), 1), 8000)
    command = [f"archive={place}/model.nemolet", f"audio={tmp_path}", "format=json", "window=2", "margin=0.5"]
    status, out, err = run(capsys, *command)
    assert status == 0 and not err
    found = {entry["audio_filepath"].rpartition("/")[2][:-4]: entry for entry in map(json.loads, out.splitlines())}
    assert {name: entry["duration"] for name, entry in found.items()} == {n: s / 8000 for n, s in sizes.items()}
    assert len(found["short"]["tokens"]) <= 1  # 0.01 s are one frame of features
    assert found["long"]["words"][-1]["end"] > 6.0


def test_what_is_not_there_is_said(place, capsys):
    status, _, err = run(capsys, f"archive={place}/model.nemolet", "audio=nowhere/*.wav")
    assert status == 1
    assert "no recording is named so" in err


def test_subtitles_of_several_recordings_need_a_folder(place, capsys):
    status, out, err = run(capsys, f"archive={place}/model.nemolet", f"audio={place}", "format=srt")
    assert (status, out) == (2, "")
    assert "several files" in err and "set out=" in err


def test_another_model_is_refused(tmp_path, capsys, place):
    model = nl.language.CausalLM(vocab_size=5, layers=1, width=8, heads=2)
    nl.save(tmp_path / "text.nemolet", model=model, tokenizer=CharTokenizer(list(" abcd")))
    status, _, err = run(capsys, f"archive={tmp_path}/text.nemolet", f"audio={place}/one.wav")
    assert status == 2
    assert "recognizer" in err


def test_subtitles_have_clocks_and_short_lines():
    words = tuple(Piece(f"word{n}", n * 0.5, n * 0.5 + 0.4, 1.0) for n in range(40))
    late = Piece("<late>", 3661.5, 3662.0, 1.0)
    made = Transcript("", (*words, late), (), 4000.0, 0.0)
    assert all(len(cue.text) <= 84 and cue.end - cue.start <= 7 for cue in cues(made))
    assert sum(len(cue.text.split()) for cue in cues(made)) == 41
    assert "01:01:01,500 --> 01:01:02,000\n<late>" in srt(made)
    assert srt(made).startswith("1\n00:00:00,000 --> ")
    assert "01:01:01.500 --> 01:01:02.000\n&lt;late&gt;" in vtt(made)
    assert vtt(made).startswith("WEBVTT\n\n00:00:00.000")
