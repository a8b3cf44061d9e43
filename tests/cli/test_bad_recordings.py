"""Every kind of bad input goes through the commands: an error with file and line, or a policy that is told.

The order is: files, rates and channels, entries of manifests, texts, batches.
"""

from __future__ import annotations

import contextlib
import io
import json
from typing import NamedTuple

import numpy as np
import pytest
import torch

import nemolet as nl
from nemolet.cli import main
from nemolet.speech import ConvEncoder, CTCRecognizer, FrontEnd, LogMel
from nemolet.tokenizers import CharTokenizer

soundfile = pytest.importorskip("soundfile")
RATE = 8000
GOOD = 6  # entries before the bad ones


class Bad(NamedTuple):
    """An entry, what is said of it, and what ``nemolet transcribe`` says of its file; None where it reads it."""

    entry: dict[str, object]
    said: str
    heard: str | None = None


def entry(name, **fields):
    return {"audio_filepath": name, "text": "ab", **fields}


BAD = {
    "missing file": Bad(entry("missing.wav"), "there is no such audio file", "no recording is named so"),
    "empty file": Bad(entry("empty.wav"), "the audio file is empty", "the audio file is empty"),
    "corrupt file": Bad(entry("corrupt.flac"), "the audio cannot be decoded", "the audio cannot be decoded"),
    "no audio": Bad(entry("junk.flac"), "the audio cannot be decoded", "the audio cannot be decoded"),
    "truncated file": Bad(entry("cut.wav"), "the audio cannot be decoded", "shorter than its header says"),
    "no sample": Bad(entry("nothing.wav"), "no sample at all"),
    "silent": Bad(entry("silent.wav"), "nothing but silence"),
    "0.01 s": Bad(entry("short.wav"), "too short (below 0.1 s): 0.010 s"),
    "2 h": Bad(entry("hours.flac"), "too long (above 30 s): 7200.000 s"),
    "wrong sample rate": Bad(entry("rate.wav"), "another sample rate: 16000 instead of 8000"),
    "stereo": Bad(entry("stereo.wav"), "several channels: 2"),
    "NaN": Bad(entry("nan.wav"), "samples that are no numbers", "samples are no numbers"),
    "no path": Bad({"audio_file": "0.wav", "text": "ab"}, "the field audio_filepath is missing: did you mean"),
    "no text": Bad({"audio_filepath": "0.wav", "offset": 0.1}, "the field text is missing"),
    "wrong duration": Bad(entry("1.wav", duration=7.0), "the duration is wrong: up to 7.000 s, but there are 0.800 s"),
    "wrong offset": Bad(entry("1.wav", offset=0.6, duration=0.9), "the part lies beyond the end of the audio"),
    "duration in words": Bad(entry("1.wav", duration="7"), "the duration is no number of seconds: '7'"),
    "unknown path": Bad(entry("nowhere/0.wav"), "there is no such audio file"),
    "duplicate": Bad(entry("0.wav"), "a duplicate: also at "),
    "unknown characters": Bad(entry("2.wav", offset=0.1, text="grün"), "characters outside the alphabet: 'ü'"),
    "empty transcript": Bad(entry("3.wav", offset=0.1, text=" "), "the text is empty"),
}
ACCEPTED = {"wrong sample rate", "stereo", "unknown characters"}  # resampled, mixed and learned unless refused
STRICT = ["data.resample=false", "data.channels=refuse"]
WORKING = [
    "data=audio",
    "data.sample_rate=8000",
    "data.batch_size=2",
]
TRAIN = [
    "model=quartznet_ctc",
    "model.encoder.width=16",
    "model.encoder.kernels=[3]",
    "model.encoder.repeats=1",
    "model.encoder.last_kernel=3",
    "tokenizer=char",
    "loss=ctc",
    "schedule.warmup_steps=1",
    "trainer.max_steps=3",
    "trainer.valid_every=3",
    "trainer.loggers=[]",
    "trainer.accelerator=cpu",
    *WORKING,
]


def tone(seconds=0.8, rate=RATE, pitch=0.2):
    return 0.3 * np.sin(np.arange(round(seconds * rate)) * pitch)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Good and bad recordings, one manifest of all, and an archive."""
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(GOOD):
        soundfile.write(folder / f"{number}.wav", tone(pitch=0.2 + 0.1 * number), RATE)
    (folder / "empty.wav").touch()
    (folder / "junk.flac").write_bytes(b"fLaC and then nothing")
    soundfile.write(folder / "corrupt.flac", tone(4.0), RATE)
    whole = bytearray((folder / "corrupt.flac").read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 400] = bytes(400)
    (folder / "corrupt.flac").write_bytes(whole)
    soundfile.write(folder / "cut.wav", tone(), RATE)
    (folder / "cut.wav").write_bytes((folder / "cut.wav").read_bytes()[:9000])
    soundfile.write(folder / "nothing.wav", np.zeros(0), RATE)
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(folder / "short.wav", tone(0.01), RATE)
    soundfile.write(folder / "hours.flac", tone(7200, rate=1000), 1000)
    soundfile.write(folder / "rate.wav", tone(rate=16000), 16000)
    soundfile.write(folder / "stereo.wav", np.stack([tone()] * 2, 1), RATE)
    soundfile.write(folder / "nan.wav", np.array([0.1, np.nan] * 4000), RATE, subtype="FLOAT")
    good = [entry(f"{number}.wav", text="ab" if number % 2 else "ba") for number in range(GOOD)]
    for name, lines in {"all": [*good, *(bad.entry for bad in BAD.values())], "good": good}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    front_end = FrontEnd(features=LogMel(sample_rate=RATE, bins=8))
    model = CTCRecognizer(front_end=front_end, encoder=ConvEncoder(bins=8, width=8, kernels=[3]), vocab_size=3)
    nl.save(folder / "model.nemolet", model=model, tokenizer=CharTokenizer(list(" ab")))
    return folder


def line_of(name):
    return GOOD + 1 + list(BAD).index(name)


def heard(capsys, *command):
    status = main([str(word) for word in command])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return status, out, err


@pytest.fixture(scope="module")
def listed(place):
    """What ``nemolet manifest`` prints, and what it leaves in a cleaned manifest."""
    out = io.StringIO()
    command = ["manifest", f"path={place}/all.jsonl", "needs=[text]", "min_seconds=0.1", "max_seconds=30"]
    strict = ["sample_rate=8000", "channels=refuse", "characters='abgrn '", f"out={place}/cleaned.jsonl"]
    with contextlib.redirect_stdout(out):
        assert main(command) == 1
        assert main([*command, *strict]) == 0
    return out.getvalue()


@pytest.mark.parametrize("name", BAD)
def test_a_manifest_is_told_what_is_wrong_with_each_line(name, place, listed):
    said = [line for line in listed.splitlines() if line.startswith(f"{place}/all.jsonl:{line_of(name)}: ")]
    assert said
    assert any(BAD[name].said in line for line in said)


def test_what_is_left_of_a_manifest_is_the_good_part(place, listed):
    assert "wrong       3 x the audio cannot be decoded" in listed
    assert f"cleaned.jsonl: {GOOD} entries" in listed
    kept = [json.loads(line)["audio_filepath"] for line in (place / "cleaned.jsonl").read_text().splitlines()]
    assert kept == [f"{number}.wav" for number in range(GOOD)]


def test_training_refuses_bad_entries_before_it_begins(place, tmp_path, capsys):
    status, _, err = heard(capsys, "train", *TRAIN, *STRICT, f"data.path={place}/all.jsonl", f"folder={tmp_path}/run")
    wrong = [name for name in BAD if name not in ("0.01 s", "unknown characters")]  # two hours have another rate
    assert status == 1
    assert f"{len(wrong)} of the entries cannot be used" in err
    assert all(f"all.jsonl:{line_of(name)}: " in err for name in wrong[:10])
    assert f"and {len(wrong) - 10} more" in err
    assert "data.on_bad=skip" in err
    assert not (tmp_path / "run").exists()


def test_training_leaves_bad_entries_out_with_a_count_and_a_list(place, tmp_path, capsys, caplog):
    command = [f"data.path={place}/all.jsonl", "data.on_bad=skip", f"folder={tmp_path}/run"]
    with caplog.at_level("WARNING", "nemolet"):
        status, out, _ = heard(capsys, "train", *TRAIN, *command)
    left_out = [name for name in BAD if name not in ACCEPTED]
    assert status == 0
    assert f"left out: {len(left_out)} of all entries" in caplog.text
    for name in left_out:
        assert f"left out: {place}/all.jsonl:{line_of(name)}: {BAD[name].said}" in caplog.text
    assert f"{len(left_out)} left out" in out
    tokenizer = nl.load(tmp_path / "run" / "model.nemolet").tokenizer
    assert tokenizer.decode(tokenizer.encode("grün")) == "grün"  # of the file that was accepted


def test_a_file_that_fails_in_training_is_named_and_a_neighbour_takes_its_place(place, tmp_path, capsys, caplog):
    lines = [entry(f"{place}/{name}", text="ab") for name in ("0.wav", "1.wav", "corrupt.flac", "nan.wav", "2.wav")]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [f"data.path={tmp_path}/some.jsonl", "data.decode=false", f"data.valid_path={place}/good.jsonl"]
    with caplog.at_level("WARNING", "nemolet"):
        status, _, _ = heard(capsys, "train", *TRAIN, *command, f"folder={tmp_path}/run")
    assert status == 0
    assert f"{tmp_path}/some.jsonl:3: the audio cannot be decoded; a neighbour takes its place" in caplog.text
    assert f"{tmp_path}/some.jsonl:4: samples that are no numbers; a neighbour takes its place" in caplog.text


def test_evaluation_refuses_the_same_and_texts_that_the_model_cannot_write(place, tmp_path, capsys):
    strange = [entry(f"{place}/{n}.wav", text=text) for n, text in enumerate(["ab", "äb", "a"])]
    (tmp_path / "strange.jsonl").write_text("".join(json.dumps(line) + "\n" for line in strange))
    command = ["evaluate", f"archive={place}/model.nemolet", *WORKING, f"data.path={place}/good.jsonl"]
    status, _, err = heard(capsys, *command, f"data.valid_path={tmp_path}/strange.jsonl")
    assert status == 1
    assert f"{tmp_path}/strange.jsonl:2: a text outside the vocabulary: 'ä'" in err
    status, _, err = heard(capsys, *command, f"data.valid_path={place}/all.jsonl")
    assert status == 1
    assert f"all.jsonl:{line_of('corrupt file')}: the audio cannot be decoded" in err
    status, out, _ = heard(
        capsys, *command, f"data.valid_path={tmp_path}/strange.jsonl", "data.on_bad=skip", f"out={tmp_path}/heard.jsonl"
    )
    assert status == 0
    assert "word error rate" in out
    assert len((tmp_path / "heard.jsonl").read_text().splitlines()) == 2


FILES = [name for name, bad in BAD.items() if "audio_filepath" in bad.entry]


@pytest.mark.parametrize("name", FILES)
def test_transcription_reads_a_file_or_names_it(name, place, capsys):
    path = place / str(BAD[name].entry["audio_filepath"])
    status, out, err = heard(capsys, "transcribe", f"archive={place}/model.nemolet", f"audio=[{path},{place}/0.wav]")
    expected = "no recording is named so" if not path.exists() else BAD[name].heard
    assert f"{place}/0.wav" in out or not path.exists()
    assert status == (0 if expected is None else 1)
    assert expected is None or (expected in err and str(path) in err)
    assert expected is not None or f"{path}\t" in out


def test_a_batch_of_one_is_trained_on(place, tmp_path, capsys):
    command = [f"data.path={place}/good.jsonl", "data.batch_size=1", f"folder={tmp_path}/run"]
    assert heard(capsys, "train", *TRAIN, *command)[0] == 0
    weights = nl.load(tmp_path / "run" / "model.nemolet").model.state_dict().values()
    assert all(torch.isfinite(value).all() for value in weights)


def test_a_model_of_another_rate_is_refused_by_its_type(place, tmp_path, capsys):
    data = ["data.sample_rate=16000", f"data.path={place}/good.jsonl"]
    run = ["train", *TRAIN, *data, f"folder={tmp_path}/run"]
    for command in (
        [*run, "model.front_end.features.sample_rate=8000"],
        ["evaluate", f"archive={place}/model.nemolet", "data=audio", *data],
        ["finetune", f"archive={place}/model.nemolet", "loss=ctc", "data=audio", *data, f"folder={tmp_path}/tuned"],
    ):
        status, _, err = heard(capsys, *command)
        assert status != 0
        assert "the model takes other data" in err
        assert "Audio(sample_rate=8000)" in err and "Audio(sample_rate=16000)" in err
        assert "data.sample_rate" in err


def test_really_corrupt_recordings_are_named_by_every_command(shared_data, place, tmp_path, capsys):
    files = sorted((shared_data / "kws6" / "corrupt").glob("*.flac"))
    lines = [entry(f"{place}/0.wav"), *(entry(str(path)) for path in files), entry(f"{place}/1.wav", text="b")]
    (tmp_path / "kws.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = f"data.path={tmp_path}/kws.jsonl"
    archive = f"archive={place}/model.nemolet"
    for command in (
        ["manifest", f"path={tmp_path}/kws.jsonl"],
        ["train", *TRAIN, path, f"folder={tmp_path}/run"],
        ["evaluate", archive, *WORKING, path],
    ):
        status, out, err = heard(capsys, *command)
        assert status == 1
        assert all(f"kws.jsonl:{line}: the audio cannot be decoded" in out + err for line in (2, 3))
    status, _, err = heard(capsys, "transcribe", archive, f"audio={files[0].parent}")
    assert status == 1
    assert all(str(file) in err for file in files)
