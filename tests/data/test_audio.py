"""Recordings: formats, parts, channels, rates, and files that are not what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nemolet.data.audio import AudioArray, AudioFile, load_audio, resample
from nemolet.errors import DataError

soundfile = pytest.importorskip("soundfile")
RATE = 16000


def tone(seconds=0.5, rate=RATE, pitch=440.0):
    return (0.4 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def written(path, samples=None, rate=RATE, **options):
    soundfile.write(path, tone() if samples is None else samples, rate, **options)
    return path


@pytest.mark.parametrize("suffix, error", [(".wav", 1e-4), (".flac", 1e-4), (".ogg", 0.05), (".mp3", 0.05)])
def test_every_format_decodes_to_what_was_written(tmp_path, suffix, error):
    path = written(tmp_path / f"a{suffix}")
    facts = AudioFile(path).facts()
    assert (facts.sample_rate, facts.channels, facts.frames, facts.seconds) == (RATE, 1, 8000, 0.5)
    assert facts.peak == pytest.approx(0.4, abs=0.05)
    samples, rate = load_audio(path)
    assert rate == RATE and samples.dtype == np.float32
    np.testing.assert_allclose(samples[500:-500], tone()[500:-500], atol=error)


def test_a_part_is_that_part(tmp_path):
    path = written(tmp_path / "a.flac", np.arange(16000) / 32768)
    part, _ = load_audio(path, start=0.25, duration=0.5)
    np.testing.assert_allclose(part, np.arange(4000, 12000) / 32768)
    assert len(load_audio(path, start=0.75)[0]) == 4000
    assert len(load_audio(path, start=0.75, duration=5.0)[0]) == 4000


def test_channels_are_mixed_chosen_or_refused(tmp_path):
    path = written(tmp_path / "a.wav", np.stack([np.full(100, 0.5), np.zeros(100)], 1))
    np.testing.assert_allclose(load_audio(path)[0], 0.25, atol=1e-4)
    np.testing.assert_allclose(load_audio(path, channels="first")[0], 0.5, atol=1e-4)
    with pytest.raises(DataError, match=r"several channels[\s\S]*channels=mix"):
        load_audio(path, channels="refuse")


def test_resampling_keeps_the_tone_and_the_time(tmp_path):
    path = written(tmp_path / "a.wav", tone(rate=22050), 22050)
    samples, rate = load_audio(path, sample_rate=RATE)
    assert rate == RATE and len(samples) == 8000
    np.testing.assert_allclose(samples[200:-200], tone()[200:-200], atol=2e-3)
    assert resample(samples, RATE, RATE) is samples
    assert len(resample(np.zeros(0, np.float32), 8000, RATE)) == 0


def test_arrays_are_recordings_too():
    array = AudioArray(tone(), RATE, "beep")
    assert array.facts() == (RATE, 1, 8000, pytest.approx(0.4, abs=1e-4))
    np.testing.assert_array_equal(load_audio(array, start=0.1, duration=0.1)[0], tone()[1600:3200])
    with pytest.raises(DataError, match=r"beep: these samples are no audio[\s\S]*int16"):
        AudioArray(np.zeros(8, np.int16), RATE, "beep").facts()


def test_numbers_that_are_none_are_seen(tmp_path):
    samples = tone()
    samples[4000] = np.nan
    assert math.isnan(AudioFile(written(tmp_path / "a.wav", samples, subtype="FLOAT")).facts().peak)
    assert math.isnan(AudioArray(samples, RATE).facts().peak)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3"])
def test_a_cut_file_is_refused(tmp_path, suffix):
    path = written(tmp_path / f"a{suffix}", tone(2.0))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"a{suffix}: the audio cannot be decoded"):
        AudioFile(path).facts()


@pytest.mark.parametrize(
    "content, message", [(None, "no such audio file"), (b"", "is empty"), (b"RIFF, or so", "cannot be decoded")]
)
def test_what_is_no_audio_is_refused(tmp_path, content, message):
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    for read in (AudioFile(path).facts, AudioFile(path).read):
        with pytest.raises(DataError, match=message) as caught:
            read()
        assert str(path) in str(caught.value)


def test_really_corrupt_recordings_are_refused(shared_data):
    files = sorted((shared_data / "kws6" / "corrupt").glob("*.flac"))
    assert len(files) == 2
    for path in files:
        with pytest.raises(DataError, match="cannot be decoded"):
            AudioFile(path).facts()
        assert AudioFile(path).facts(decode=False).frames > 0  # its header looks well
