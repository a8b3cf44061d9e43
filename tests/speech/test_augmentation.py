"""Augmentation: lengths, padding, levels, repeatability; resampling against soxr."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import nemolet as nl
from nemolet.speech import FrontEnd, LogMel
from nemolet.speech.augmentation import (
    AddNoise,
    FilterAugment,
    FrequencyWarp,
    Gain,
    RoomImpulse,
    Shift,
    SpecAugment,
    SpeedPerturbation,
    TempoPerturbation,
    WhiteNoise,
)
from nemolet.speech.time_scale import resampled, stretched


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Folders of noises, of rooms, and of one echo."""
    soundfile = pytest.importorskip("soundfile")
    folder, random = tmp_path_factory.mktemp("bank"), np.random.default_rng(0)
    for kind in ("noise", "rooms", "echo"):
        (folder / kind).mkdir()
    for index, size in enumerate((700, 5000)):
        soundfile.write(folder / "noise" / f"{index}.wav", 0.1 * random.standard_normal(size), 8000)
    echo = np.zeros(400)
    echo[[40, 240]] = 0.9, 0.45
    soundfile.write(folder / "echo" / "echo.wav", echo, 8000)
    soundfile.write(folder / "rooms" / "echo.wav", echo, 8000)
    soundfile.write(folder / "rooms" / "hall.wav", np.exp(-np.arange(800) / 99) * random.standard_normal(800), 8000)
    return folder


def kinds(bank):
    return [
        SpeedPerturbation(),
        TempoPerturbation(window=256),
        Gain(),
        Shift(most=300),
        WhiteNoise(),
        AddNoise(path=str(bank / "noise"), sample_rate=8000),
        RoomImpulse(path=str(bank / "rooms"), sample_rate=8000),
    ]


def batch():
    audio = torch.sin(torch.arange(4000) * 0.3)[None] * torch.tensor([[0.1], [0.2], [0.05]])
    return audio.clone(), torch.tensor([4000, 3000, 1500])


@pytest.mark.parametrize("index", range(7))
def test_what_is_changed_keeps_its_form(bank, index):
    augment = kinds(bank)[index]
    audio, lengths = batch()
    audio[1, 3000:] = audio[2, 1500:] = 9.0  # padding that nobody cleaned
    torch.manual_seed(1)
    with nl.checked():
        first = augment(audio, lengths)
    torch.manual_seed(1)
    again = augment(audio, lengths)
    assert torch.equal(first.audio, again.audio) and torch.equal(first.audio_lengths, again.audio_lengths)
    torch.manual_seed(2)
    other = augment(audio, lengths)
    assert first.audio.shape != other.audio.shape or not torch.equal(first.audio, other.audio)
    assert first.audio.shape[1] == first.audio_lengths.max()
    for row, length in zip(first.audio, first.audio_lengths):
        assert not row[length:].any() and row[:length].any() and row.isfinite().all()
        assert row.abs().max() < 5.0  # nothing of the padding came in
    augment.eval()
    assert augment(audio, lengths).audio is audio
    assert type(nl.build(augment.config())) is type(augment)


def test_a_share_of_the_rows_is_changed():
    torch.manual_seed(0)
    audio = torch.ones(400, 10)
    out = Gain(low=6.0, high=6.0, probability=0.3)(audio, torch.full((400,), 10))
    changed = (out.audio[:, 0] > 1.5).float().mean()
    assert 0.2 < changed < 0.4
    assert not Gain(probability=0.0)(audio, torch.full((400,), 10)).audio.ne(audio).any()


@pytest.mark.parametrize("ratio", [Fraction(10, 11), Fraction(10, 9), Fraction(1, 2), Fraction(3, 2)])
def test_resampling_agrees_with_soxr(ratio):
    soxr = pytest.importorskip("soxr")
    time = np.arange(8000) / 8000
    audio = np.sin(2 * np.pi * 300 * time) + 0.3 * np.sin(2 * np.pi * 900 * time)
    expected = soxr.resample(audio, 1.0, float(ratio), quality="VHQ")
    out = resampled(torch.tensor(audio)[None], ratio)[0].numpy()
    size = min(len(out), len(expected))
    assert abs(len(out) - len(expected)) <= 1
    np.testing.assert_allclose(out[200 : size - 200], expected[200 : size - 200], atol=2e-3)


@pytest.mark.parametrize("tempo", [0.8, 1.25])
def test_another_tempo_has_the_same_pitch(tempo):
    audio = torch.sin(2 * np.pi * 500 * torch.arange(8000) / 8000)[None]
    out = stretched(audio, tempo, window=256)
    assert out.shape[1] == round(8000 / tempo)
    spectrum = torch.fft.rfft(out[0] * torch.hann_window(out.shape[1])).abs()
    assert spectrum.argmax() * 8000 / out.shape[1] == pytest.approx(500, abs=2)
    middle = out[0, 1000:-1000]
    assert middle.square().mean() == pytest.approx(0.5, rel=0.2)


def test_faster_audio_is_shorter_and_higher():
    audio = torch.sin(2 * np.pi * 500 * torch.arange(8000) / 8000)[None]
    out = SpeedPerturbation(factors=[1.25])(audio, torch.tensor([8000]))
    assert out.audio_lengths.tolist() == [6400]
    spectrum = torch.fft.rfft(out.audio[0] * torch.hann_window(6400)).abs()
    assert spectrum.argmax() * 8000 / 6400 == pytest.approx(625, abs=2)


def test_noise_comes_at_the_ratio_that_was_asked_for(bank):
    audio, lengths = batch()
    audio = torch.stack([row * (torch.arange(4000) < n) for row, n in zip(audio, lengths)])
    out = AddNoise(path=str(bank / "noise"), sample_rate=8000, low=10.0, high=10.0)(audio, lengths)
    for clean, noisy, length in zip(audio, out.audio, lengths):
        noise = (noisy - clean)[:length]
        ratio = 10 * torch.log10(clean[:length].square().sum() / noise.square().sum())
        assert ratio.item() == pytest.approx(10.0, abs=0.1)


def test_white_noise_has_its_level():
    out = WhiteNoise(low=-40.0, high=-40.0)(torch.zeros(1, 20000), torch.tensor([20000]))
    assert 20 * torch.log10(out.audio.std()) == pytest.approx(-40.0, abs=0.3)


def test_a_room_keeps_the_direct_sound_and_the_power(bank):
    click = torch.zeros(1, 1000)
    click[0, 100] = 1.0
    out = RoomImpulse(path=str(bank / "echo"), sample_rate=8000)(click, torch.tensor([1000])).audio[0]
    assert out.square().sum() == pytest.approx(1.0, rel=1e-3)
    assert out.abs().topk(2).indices.tolist() == [100, 300]
    assert out[300] / out[100] == pytest.approx(0.5, rel=1e-3)


def test_a_shift_moves_samples_and_fills_with_zeros():
    torch.manual_seed(0)
    audio = torch.arange(1.0, 11.0).repeat(50, 1)
    out = Shift(most=3)(audio, torch.full((50,), 10)).audio
    moves = set()
    for row in out:
        first = int(row.nonzero()[0])
        moved = first if first else 1 - int(row[0])
        expected = torch.zeros(10)
        source = torch.arange(10) - moved
        inside = (source >= 0) & (source < 10)
        expected[inside] = audio[0][source[inside]]
        assert torch.equal(row, expected)
        moves.add(moved)
    assert moves == set(range(-3, 4))


def test_spec_augment_hides_within_its_limits():
    torch.manual_seed(0)
    augment = SpecAugment(time_masks=1, time_share=0.1, feature_masks=1, feature_width=8)
    lengths = torch.tensor([100] * 100 + [30] * 100)
    out = augment(torch.ones(200, 100, 40), lengths)
    for row, length in zip(out, lengths):
        hidden_frames = (row == 0).all(1).nonzero()[:, 0]
        hidden_bins = (row == 0).all(0).nonzero()[:, 0]
        assert len(hidden_frames) <= length // 10 and len(hidden_bins) <= 8
        for hidden in (hidden_frames, hidden_bins):  # one stretch without a gap
            assert len(hidden) == 0 or hidden[-1] - hidden[0] + 1 == len(hidden)
        assert len(hidden_frames) == 0 or hidden_frames[-1] < length
    hidden = (out == 0).all(2).sum(1)
    assert hidden[:100].max() == 10 and hidden[100:].max() == 3  # the widest is reached
    augment.eval()
    assert augment(out, lengths) is out


def test_a_front_end_augments_in_training_only():
    front_end = FrontEnd(
        features=LogMel(sample_rate=8000, bins=20, dither=0.0),
        audio_augment=[SpeedPerturbation(factors=[0.8])],
        augment=[SpecAugment()],
    )
    audio, lengths = batch()
    torch.manual_seed(0)
    trained = front_end(audio, lengths)
    assert trained.lengths.tolist() == (lengths * 5 // 4 // 80).tolist()
    front_end.eval()
    assert front_end(audio, lengths).lengths.tolist() == (lengths // 80).tolist()
    assert torch.equal(front_end(audio, lengths).spectrogram, front_end.features(audio, lengths).spectrogram)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Gain(probability=1.5), "no probability"),
        (lambda: SpeedPerturbation(factors=[]), "no factors of speed"),
        (lambda: TempoPerturbation(factors=[0.01]), "no factors of speed"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(nl.errors.ShapeError, match=message):
        make()


def test_a_missing_folder_of_noises_is_named():
    augment = AddNoise(path="no_such_folder", sample_rate=8000)
    with pytest.raises(nl.errors.DataError, match="no_such_folder"):
        augment(*batch())


def test_features_move_along_the_frequencies():
    """Against numpy's interpolation, with the factor read off a ramp."""
    torch.manual_seed(0)
    warp = FrequencyWarp(most=0.2)
    ramp = torch.arange(10.0).expand(40, 3, 10)
    torch.manual_seed(1)
    factors = warp(ramp, torch.full((40,), 3))[:, 0, 5] / 5
    assert 0.8 <= factors.min() < 0.85 and 1.15 < factors.max() <= 1.2
    spectrogram = torch.randn(40, 3, 10)
    torch.manual_seed(1)
    warped = warp(spectrogram, torch.full((40,), 3))
    for row, factor, before in zip(warped, factors.tolist(), spectrogram):
        places = np.clip(np.arange(10) * factor, 0, 9)
        expected = [np.interp(places, np.arange(10), frame) for frame in before.numpy()]
        assert np.allclose(row, expected, atol=1e-4)
    assert warp.eval()(spectrogram, torch.full((40,), 3)) is spectrogram


def test_a_filter_is_smooth_and_one_for_each_row():
    torch.manual_seed(0)
    change = FilterAugment(most=0.5, corners=3)(torch.zeros(30, 4, 9), torch.tensor([4] * 29 + [2]))
    assert not change[-1, 2:].any()  # padding stays padding
    curves = change[:, 0]
    assert torch.equal(change[:, 1], curves) and (curves[0] - curves[1]).abs().max() > 0.01
    assert 0.4 < curves.abs().max() <= 0.5
    bends = curves.diff(n=2, dim=1).abs()  # linear between the corners 0, 4 and 8
    assert bends[:, [0, 1, 2, 4, 5, 6]].max() < 1e-6 < bends[:, 3].max()


@pytest.mark.parametrize("bad", [lambda: FrequencyWarp(most=0.5), lambda: FilterAugment(corners=1)])
def test_impossible_changes_are_refused(bad):
    with pytest.raises(nl.errors.ShapeError):
        bad()


def test_quiet_and_loud_speakers_sound_alike():
    front_end = FrontEnd(features=LogMel(sample_rate=8000, bins=8), level=-20.0).eval()
    audio, lengths = torch.randn(2, 4000) * 0.1, torch.tensor([4000, 3000])
    audio[1, 3000:] = 7.0  # padding that nobody cleaned
    loud = front_end(audio, lengths).spectrogram
    quiet = front_end(audio * torch.tensor([[0.01], [3.0]]), lengths).spectrogram
    assert torch.allclose(loud, quiet, atol=1e-4)
    alone = front_end(audio[1:, :3000], lengths[1:]).spectrogram
    assert torch.allclose(loud[1:, : alone.shape[1]], alone, atol=1e-4)
    assert front_end(torch.zeros(1, 800), torch.tensor([800])).spectrogram.isfinite().all()
    assert front_end.needs_whole and not FrontEnd(features=LogMel(sample_rate=8000, bins=8)).needs_whole
