"""The synthesiser says what it should, as often and as differently as it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nemolet as nl
from nemolet.data.corpus import TokenizerSpec
from nemolet.errors import DataError
from nemolet.speech import LogMel
from nemolet.speech.synthesis import PRONUNCIATIONS, SOUNDS, SpokenDigits, Voice, say

RATE = 8000


def spectrum(samples):
    power = np.abs(np.fft.rfft(samples * np.hanning(len(samples)))) ** 2
    return np.fft.rfftfreq(len(samples), 1 / RATE), power


@pytest.mark.parametrize("word", PRONUNCIATIONS)
def test_a_word_is_audio_of_a_sensible_length_and_level(word):
    samples = say(word)
    assert samples.dtype == np.float32 and np.isfinite(samples).all()
    assert 0.25 < len(samples) / RATE < 0.8
    assert 0.2 < np.abs(samples).max() < 0.65


def test_every_sound_is_known():
    assert {phone for phones in PRONUNCIATIONS.values() for phone in phones} <= set(SOUNDS)


@pytest.mark.parametrize("pitch", [100.0, 200.0])
def test_a_voice_has_its_pitch(pitch):
    samples = say("nine", voice=Voice(pitch=pitch))
    middle = samples[len(samples) // 4 : -len(samples) // 4].astype(float)
    correlation = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    shortest = RATE // 320
    period = shortest + correlation[shortest : RATE // 60].argmax()
    assert RATE / period == pytest.approx(pitch, rel=0.15)


def test_a_shorter_tract_has_higher_formants():
    def centre(tract):
        frequencies, power = spectrum(say("three", voice=Voice(tract=tract))[-1600:])
        band = (frequencies > 1500) & (frequencies < 3800)  # the second and third formant
        return (frequencies * power)[band].sum() / power[band].sum()

    assert centre(1.2) > 1.08 * centre(0.95)


def test_hissing_is_high_and_vowels_are_low():
    samples = say("six")
    for part, low in ((samples[80:500], False), (samples[900:1500], True)):
        frequencies, power = spectrum(part)
        assert (power[frequencies < 1000].sum() > power[frequencies > 2000].sum()) == low


def test_takes_differ_and_repeat_with_their_seed():
    one, again, other = (say("two", random=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert len(one) != len(other) or not np.array_equal(one, other)


def test_what_is_no_digit_is_refused():
    with pytest.raises(DataError, match=r"cannot be said[\s\S]*did you mean 'seven'"):
        say("sevn")


def test_digits_are_data_for_training():
    data = SpokenDigits(voices=2, valid_voices=1, takes=2, join=(2, 3)).prepare(TokenizerSpec(kind="char"))
    assert (len(data.train), len(data.valid)) == (40, 20)
    assert {u.utterance.speaker for u in data.train} & {u.utterance.speaker for u in data.valid} == set()
    assert "synthesiser" in data.summary  # nobody takes it for recordings
    batch = next(iter(data.train_loader()))
    words = {w for row in batch["labels"] for w in data.tokenizer.decode(row[row >= 0].tolist()).split()}
    assert words <= set(PRONUNCIATIONS)
    again = SpokenDigits(voices=2, valid_voices=1, takes=2, join=(2, 3)).prepare(TokenizerSpec(kind="char"))
    assert torch.equal(next(iter(again.train_loader()))["audio"], batch["audio"])


def test_a_config_builds_it():
    data = nl.build({"_target_": "nemolet.speech.SpokenDigits", "target": "label", "voices": 3})
    assert data.voices == 3 and data.typical["N"] > 0
    with pytest.raises(nl.errors.ConfigError, match="at least 1"):
        nl.build({"_target_": "nemolet.speech.SpokenDigits", "voices": 0})


def test_other_voices_are_understood():
    """Mean spectra of some voices tell the digits of others apart, so a small model can learn them."""
    data = SpokenDigits(voices=6, valid_voices=2, takes=2, target="label").prepare()
    features = LogMel(sample_rate=RATE, bins=30).eval()

    def described(usable):
        rows = []
        for each in usable:
            audio = torch.from_numpy(each.utterance.recording.samples)[None]
            spectrogram = features(audio, torch.tensor([audio.shape[1]])).spectrogram
            short = torch.nn.functional.interpolate(spectrogram.transpose(1, 2), 10)
            rows.append((short - short.mean()).flatten())
        return torch.stack(rows), torch.tensor([data.classes.index(u.utterance.label) for u in usable])

    known, labels = described(data.train)
    heard, expected = described(data.valid)
    means = torch.stack([known[labels == index].mean(0) for index in range(10)])
    assert (torch.cdist(heard, means).argmin(1) == expected).float().mean() > 0.9
