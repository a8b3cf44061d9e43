"""Manifests, folders, shards and arrays; what is wrong is said with file and line."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest

from nemolet.data.audio import AudioFile, load_audio
from nemolet.data.manifest import Problem, Utterance, manifest_entry, read_audio, utterances_of_arrays
from nemolet.errors import DataError

soundfile = pytest.importorskip("soundfile")


def beep(path, seconds=0.2, pitch=300.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch * np.arange(int(8000 * seconds)) / 8000), 8000)
    return path


def manifest(folder, *entries):
    path = folder / "all.jsonl"
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return path


def test_an_entry_as_nemo_writes_it(tmp_path):
    beep(tmp_path / "audio" / "a.wav")
    entry = {
        "audio_filepath": "audio/a.wav",
        "duration": 0.1,
        "offset": 0.05,
        "text": "hi",
        "speaker": 7,
        "label": "beep",
        "segments": [{"start": 0.0, "end": 0.5, "speaker": "x"}],
        "more": [1],
    }
    [found] = read_audio(manifest(tmp_path, entry))
    assert found == Utterance(
        AudioFile(tmp_path / "audio" / "a.wav"),
        where=f"{tmp_path / 'all.jsonl'}:1",
        offset=0.05,
        duration=0.1,
        text="hi",
        label="beep",
        speaker="7",
        segments=((0.0, 0.5),),
    )
    written = manifest_entry(found, tmp_path / "new.jsonl", 0.1)
    assert written["audio_filepath"] == "audio/a.wav"
    [again] = read_audio(manifest(tmp_path, written))
    assert again == found


@pytest.mark.parametrize(
    "line, what",
    [
        ("{oops", "the line is no JSON"),
        ("[1]", "the line is no JSON object"),
        ('{"audio_file": "a.wav"}', r"audio_filepath is missing: did you mean 'audio_file'"),
        ('{"audio_filepath": "a.wav", "duration": "2"}', "the duration is no number of seconds: '2'"),
        ('{"audio_filepath": "a.wav", "duration": -1}', "the duration is no number of seconds"),
        ('{"audio_filepath": "a.wav", "offset": NaN}', "the offset is no number of seconds"),
        ('{"audio_filepath": "a.wav", "text": 5}', "the text is no text: 5"),
        ('{"audio_filepath": "a.wav", "segments": [1, 2]}', "the segments have no start and end"),
    ],
)
def test_a_bad_line_is_a_problem_with_its_place(tmp_path, line, what):
    good = {"audio_filepath": "a.wav"}
    found = read_audio(manifest(tmp_path, good, "", line, good))
    problems = [entry for entry in found if isinstance(entry, Problem)]
    assert len(found) == 3 and len(problems) == 1
    assert problems[0].where == f"{tmp_path / 'all.jsonl'}:3"
    assert what in str(problems[0])


def test_another_key_may_hold_the_text(tmp_path):
    path = manifest(tmp_path, {"audio_filepath": "a.wav", "text": "HI", "text_normalized": "hi"})
    assert read_audio(path, text_key="text_normalized")[0].text == "hi"


def test_a_folder_names_labels_and_texts(tmp_path):
    beep(tmp_path / "yes" / "1.wav")
    beep(tmp_path / "no" / "1.flac")
    beep(tmp_path / "top.wav")
    (tmp_path / "yes" / "1.txt").write_text("oh yes\n")
    (tmp_path / "no" / "readme.md").write_text("not audio")
    found = [(u.recording.path.name, u.label, u.text) for u in read_audio(tmp_path)]
    assert found == [("1.flac", "no", None), ("top.wav", None, None), ("1.wav", "yes", "oh yes")]


def shard(path, **members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_shards_are_read_in_place(tmp_path):
    audio = [beep(tmp_path / f"{i}.wav", pitch=200 + 50 * i).read_bytes() for i in range(3)]
    shard(tmp_path / "s-0.tar", a_wav=audio[0], a_json=b'{"text": "one", "speaker": "s"}', b_wav=audio[1], b_cls=b"no")
    shard(tmp_path / "s-1.tar", c_txt=b"three", c_wav=audio[2], d_wav=audio[2], d_json=b"{")
    found = read_audio(tmp_path / "s-*.tar")
    described = [(u.text, u.label, u.speaker) for u in found if isinstance(u, Utterance)]
    assert described == [("one", None, "s"), (None, "no", None), ("three", None, None)]
    assert [str(p) for p in found if isinstance(p, Problem)] == [
        f"{tmp_path / 's-1.tar'}:d.wav: the entry beside it is no JSON object: "
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    ]
    for utterance, index in zip(found, range(3)):
        assert utterance.recording.facts().frames == 1600
        np.testing.assert_array_equal(load_audio(utterance.recording)[0], load_audio(tmp_path / f"{index}.wav")[0])


def test_a_manifest_may_point_into_shards(tmp_path):
    shard(tmp_path / "audio_0.tar", a_wav=beep(tmp_path / "x" / "a.wav").read_bytes())
    path = manifest(tmp_path, {"audio_filepath": "a.wav", "text": "hi"}, {"audio_filepath": "b.wav"})
    found, missing = read_audio(path, shards=str(tmp_path / "audio_*.tar"))
    assert found.recording.facts().frames == 1600 and found.text == "hi"
    assert str(missing) == f"{path}:2: no shard holds this file: b.wav"
    with pytest.raises(DataError, match="no shard matches"):
        read_audio(path, shards=str(tmp_path / "nothing_*.tar"))


def test_a_compressed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w:gz") as tar:
        tar.add(beep(tmp_path / "a.wav"), "a.wav")
    with pytest.raises(DataError, match="an uncompressed tar"):
        read_audio(tmp_path / "s.tar")


def test_what_does_not_exist_is_named_with_its_neighbour(tmp_path):
    manifest(tmp_path, {"audio_filepath": "a.wav"})
    with pytest.raises(DataError, match=r"did you mean 'all.jsonl'"):
        read_audio(tmp_path / "al.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("empty", "empty.jsonl"):
        with pytest.raises(DataError, match="no audio is named here"):
            read_audio(tmp_path / name)


def test_arrays_cannot_be_written_to_a_manifest(tmp_path):
    [utterance] = utterances_of_arrays([np.zeros(8)], sample_rate=8000, texts=["hm"], speakers=["s"])
    assert (utterance.text, utterance.speaker, utterance.label) == ("hm", "s", None)
    with pytest.raises(DataError, match="array 0: only files"):
        manifest_entry(utterance, tmp_path / "a.jsonl", 1.0)
