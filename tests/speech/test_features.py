"""Features against Kaldi's own code and librosa's conventions written out in numpy; padding; chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nemolet as nl
from nemolet.speech import MFCC, FeatureStream, FrontEnd, KaldiFbank, LogMel, Normalize
from nemolet.speech.front_end import statistics


def speechlike(seconds, rate, seed=0):
    """Harmonics that glide, and a little noise, with a pause."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    pitch = 2 * np.pi * np.cumsum(120 + 40 * np.sin(3 * t)) / rate
    voice = sum(np.sin(k * pitch) / k for k in range(1, 20)) * (np.sin(5 * t) > -0.5)
    return torch.tensor(0.1 * voice + 0.003 * rng.standard_normal(len(t)), dtype=torch.float32)


def librosa_log_mel(audio, rate, bins, window, hop, fft_size, pre_emphasis, guard):
    """librosa's stft (centred, zeros at the edges) and Slaney mel filters, then NeMo's logarithm; in float64."""
    x = np.asarray(audio, np.float64)
    x = np.concatenate((x[:1], x[1:] - pre_emphasis * x[:-1]))
    frame = np.zeros(fft_size)
    start = (fft_size - window) // 2
    frame[start : start + window] = np.hanning(window)
    padded = np.pad(x, fft_size // 2)
    count = len(x) // hop
    power = np.stack([np.abs(np.fft.rfft(padded[i * hop : i * hop + fft_size] * frame)) ** 2 for i in range(count)])

    def hertz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * np.exp((mel - 15) * np.log(6.4) / 27)

    top = 15 + np.log(rate / 2 / 1000) * 27 / np.log(6.4)
    edges = np.array([hertz(m) for m in np.linspace(0, top, bins + 2)])
    freqs = np.arange(fft_size // 2 + 1) * rate / fft_size
    filters = np.zeros((bins, len(freqs)))
    for i in range(bins):
        low, middle, high = edges[i : i + 3]
        rise, fall = (freqs - low) / (middle - low), (high - freqs) / (high - middle)
        filters[i] = np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low)
    return np.log(power @ filters.T + guard)


@pytest.mark.parametrize("rate, bins", [(16000, 80), (8000, 64), (22050, 80)])
def test_log_mel_follows_librosa_and_nemo(rate, bins):
    audio = speechlike(1.3, rate)
    features = LogMel(sample_rate=rate, bins=bins).eval()
    framing = features.framing
    expected = librosa_log_mel(audio, rate, bins, framing.window, framing.hop, features.fft_size, 0.97, 2**-24)
    out = features(audio[None], torch.tensor([len(audio)]))
    assert out.spectrogram.shape == (1, *expected.shape)
    np.testing.assert_allclose(out.spectrogram[0].numpy(), expected, atol=1e-3)


def kaldi(audio, rate, kind, **mel):
    knf = pytest.importorskip("kaldi_native_fbank", reason="the oracle of Kaldi's features is not installed")
    options = knf.MfccOptions() if kind == "mfcc" else knf.FbankOptions()
    options.frame_opts.dither, options.frame_opts.samp_freq = 0.0, rate
    for name, value in mel.items():
        setattr(options.mel_opts, name, value)
    if kind == "mfcc":
        options.use_energy = False
    online = (knf.OnlineMfcc if kind == "mfcc" else knf.OnlineFbank)(options)
    online.accept_waveform(rate, (audio * 32768).tolist())
    online.input_finished()
    return np.stack([online.get_frame(i) for i in range(online.num_frames_ready)])


@pytest.mark.parametrize("rate, bins, high", [(16000, 80, None), (8000, 40, 3600.0)])
def test_fbank_follows_kaldi(rate, bins, high):
    audio = speechlike(1.0, rate)
    expected = kaldi(audio, rate, "fbank", num_bins=bins, **({"high_freq": high} if high else {}))
    features = KaldiFbank(sample_rate=rate, bins=bins, high=high).eval()
    out = features(audio[None], torch.tensor([len(audio)]))
    assert out.lengths.item() == len(expected)
    np.testing.assert_allclose(out.spectrogram[0].numpy(), expected, atol=1e-3)


def test_mfcc_follows_kaldi():
    audio = speechlike(1.0, 16000)
    out = MFCC(sample_rate=16000).eval()(audio[None], torch.tensor([len(audio)]))
    np.testing.assert_allclose(out.spectrogram[0].numpy(), kaldi(audio, 16000, "mfcc"), atol=2e-3)


KINDS = [
    LogMel(sample_rate=16000, bins=40),
    KaldiFbank(sample_rate=16000, bins=40),
    MFCC(sample_rate=16000),
    FrontEnd(features=LogMel(sample_rate=16000, bins=40), normalize=Normalize()),
    FrontEnd(features=LogMel(sample_rate=16000, bins=40), normalize=Normalize(over="utterance")),
    FrontEnd(features=KaldiFbank(sample_rate=16000, bins=40), normalize=Normalize(over="fixed", mean=8.0, std=4.0)),
]

# Cepstra of up to a hundred: the lifter multiplies the rounding of logarithms by twelve.
ROUNDING = {"mfcc": 1e-4, "MFCC": 1e-4}


@pytest.mark.parametrize("features", KINDS, ids=lambda f: f.label)
def test_padding_changes_nothing(features):
    """An utterance alone gives what it gives beside longer ones, whatever stands in its padding."""
    features.eval()
    lengths = [16000, 9000, 4001, 400]
    batch = torch.full((4, 16000), 0.7)
    rows = [speechlike(1.0, 16000, seed)[:n] for seed, n in enumerate(lengths)]
    for row, audio in zip(batch, rows):
        row[: len(audio)] = audio
    with nl.checked():
        together = features(batch, torch.tensor(lengths))
    for index, audio in enumerate(rows):
        alone = features(audio[None], torch.tensor([len(audio)]))
        frames = alone.lengths.item()
        assert together.lengths[index] == frames > 0
        rounding = ROUNDING.get(features.label, 1e-5)
        torch.testing.assert_close(together.spectrogram[index, :frames], alone.spectrogram[0], atol=rounding, rtol=0)
        assert not together.spectrogram[index, frames:].any()


@pytest.mark.parametrize("kind", [LogMel, KaldiFbank, MFCC])
@pytest.mark.parametrize("chunk", [37, 160, 1000, 7777])
def test_chunks_equal_the_whole(kind, chunk):
    features = kind(sample_rate=16000).eval()
    audio = torch.stack([speechlike(0.5, 16000, seed)[:7931] for seed in range(2)])
    stream = FeatureStream(features, batch=2)
    parts = [stream.push(part) for part in audio.split(chunk, 1)]
    ends = np.cumsum([part.shape[1] for part in parts])
    # No frame waits longer than its own samples take to arrive.
    arrived = np.minimum(np.arange(1, len(parts) + 1) * chunk, 7931)
    latest = np.maximum((arrived + features.framing.lead - features.framing.window) // features.framing.hop + 1, 0)
    assert (ends == np.minimum(latest, features.framing.count(arrived.max()))).all()
    parts.append(stream.flush())
    whole = features(audio, torch.tensor([7931, 7931]))
    rounding = ROUNDING.get(kind.__name__, 1e-5)
    torch.testing.assert_close(torch.cat(parts, 1), whole.spectrogram, atol=rounding, rtol=0)


def test_a_stream_of_nothing_is_nothing():
    stream = FeatureStream(LogMel(sample_rate=16000).eval())
    assert stream.push(torch.zeros(1, 0)).shape == stream.flush().shape == (1, 0, 80)


def test_a_stream_refuses_features_that_add_noise():
    with pytest.raises(nl.errors.ShapeError, match="eval"):
        FeatureStream(LogMel(sample_rate=16000))


@pytest.mark.parametrize("kind", [LogMel, KaldiFbank, MFCC])
def test_features_carry_gradients_to_the_audio(kind):
    audio = torch.stack([speechlike(0.1, 16000, seed) for seed in range(2)]).requires_grad_()
    front_end = FrontEnd(features=kind(sample_rate=16000), normalize=Normalize())
    front_end(audio, torch.tensor([1600, 400])).spectrogram.square().sum().backward()
    assert audio.grad.isfinite().all() and audio.grad[0].any()
    assert not audio.grad[1, 800:].any()


def test_normalisation_per_feature_is_that_of_numpy():
    spectrogram = torch.randn(2, 30, 5) * 4 + 1
    out = Normalize()(spectrogram, torch.tensor([30, 11]))
    row = spectrogram[1, :11].double().numpy()
    np.testing.assert_allclose(out[1, :11], (row - row.mean(0)) / (row.std(0, ddof=1) + 1e-5), atol=1e-5)


def test_fixed_statistics_whiten_what_they_come_from():
    spectrogram, lengths = torch.randn(3, 20, 4) * 3 + 2, torch.tensor([20, 5, 1])
    mean, std = statistics(spectrogram, lengths)
    out = Normalize(over="fixed", mean=mean, std=std)(spectrogram, lengths)
    again = statistics(out, lengths)
    np.testing.assert_allclose(again[0], 0, atol=1e-5)
    np.testing.assert_allclose(again[1], 1, atol=1e-4)


def test_dither_comes_in_training_only_and_follows_the_seed():
    features, audio = LogMel(sample_rate=16000, dither=1e-2), torch.zeros(1, 1600)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(features(audio, torch.tensor([1600])).spectrogram)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    features.eval()
    assert torch.equal(*(features(audio, torch.tensor([1600])).spectrogram for _ in range(2)))


def test_autocast_does_not_touch_the_features():
    audio, features = speechlike(0.2, 16000)[None], LogMel(sample_rate=16000).eval()
    plain = features(audio, torch.tensor([3200])).spectrogram
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(audio, torch.tensor([3200])).spectrogram, plain)


def test_the_sample_rate_and_the_bins_are_part_of_the_type():
    features = LogMel(sample_rate=16000, bins=64)
    assert str(features.input_ports["audio"]) == "audio: B N Audio(sample_rate=16000)"
    assert str(features.output_ports["spectrogram"].type) == "B T C=64 Spectrogram(bins=64, hop=0.01)"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LogMel(sample_rate=8000, high=8000.0), "beyond the audio"),
        (lambda: LogMel(sample_rate=100, hop=0.001), "hold nothing"),
        (lambda: MFCC(sample_rate=8000, coefficients=30), "more coefficients than filters"),
        (lambda: Normalize(over="fixed"), "statistics are missing"),
        (lambda: Normalize(mean=0.0, std=1.0), "would not be used"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(nl.errors.ShapeError, match=message):
        make()


def test_a_front_end_is_rebuilt_from_its_config():
    front_end = FrontEnd(
        features=LogMel(sample_rate=8000, bins=20), normalize=Normalize(over="fixed", mean=1.0, std=2.0)
    )
    again = nl.build(front_end.config())
    audio = speechlike(0.3, 8000)[None], torch.tensor([2400])
    assert torch.equal(front_end.eval()(*audio).spectrogram, again.eval()(*audio).spectrogram)
