"""Features of audio side by side: nemolet's, kaldi-native-fbank, and the steps of NeMo's featurizer.

Seconds of audio per CPU-second of one thread, medians of several rounds in which the contenders take turns. NeMo is
not imported: its steps (pre-emphasis, torch.stft, magnitude, power, mel, logarithm, normalisation per feature) are
written out here with the calls that its AudioToMelSpectrogramPreprocessor makes. Largest differences come first.

    python benchmarks/features.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import kaldi_native_fbank
import numpy as np
import torch
from torch import Tensor

from nemolet.speech import FrontEnd, KaldiFbank, LogMel, Normalize
from nemolet.speech.filterbank import slaney_mel_filters

RATE = 16000
WINDOW = torch.hann_window(400, periodic=False)
FILTERS = slaney_mel_filters(sample_rate=RATE, fft_size=512, bins=80).T.contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each utterance")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    audio = (
        torch.randn(arguments.batch, int(arguments.seconds * RATE), generator=torch.Generator().manual_seed(0)) * 0.1
    )
    lengths = torch.full((arguments.batch,), audio.shape[1])
    fbank, log_mel = KaldiFbank(sample_rate=RATE).eval(), LogMel(sample_rate=RATE).eval()
    front_end = FrontEnd(features=log_mel, normalize=Normalize()).eval()
    contenders: dict[str, Callable[[], object]] = {
        "kaldi-native-fbank": lambda: [kaldi(row) for row in audio],
        "nemolet KaldiFbank": lambda: fbank(audio, lengths),
        "NeMo's steps": lambda: nemo(audio, lengths),
        "nemolet LogMel, normalised": lambda: front_end(audio, lengths),
        "nemolet LogMel": lambda: log_mel(audio, lengths),
    }
    with torch.inference_mode():
        expected = torch.from_numpy(kaldi(audio[0]))
        print(f"KaldiFbank, largest difference: {(fbank(audio, lengths).spectrogram[0] - expected).abs().max():.1e}")
        steps = nemo(audio, lengths).transpose(1, 2)
        print(f"LogMel, largest difference: {(front_end(audio, lengths).spectrogram - steps).abs().max():.1e}")
        speeds = race(contenders, arguments.rounds, audio.numel() / RATE)
    print(f"{arguments.batch} x {arguments.seconds:g} s at {RATE} Hz, one thread, medians of {arguments.rounds} rounds")
    for name, speed in speeds.items():
        print(f"  {name:<27} {speed:7,.0f} x real time")
    ours, normalised = speeds["nemolet KaldiFbank"], speeds["nemolet LogMel, normalised"]
    nemo_speed = speeds["NeMo's steps"]
    print(f"  KaldiFbank / kaldi-native-fbank {ours / speeds['kaldi-native-fbank']:.2f} (wanted: 5)")
    print(f"  LogMel, normalised / NeMo's steps {normalised / nemo_speed:.2f} (wanted: 2.5)")


def race(contenders: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, float]:
    """Seconds of audio per CPU-second."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            if index:  # the first round warms up
                times[name].append(time.process_time() - start)
    return {name: seconds / statistics.median(each) for name, each in times.items()}


def kaldi(audio: Tensor) -> np.ndarray:
    """Filterbank energies by Kaldi's code."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither, options.mel_opts.num_bins = 0.0, 80
    online = kaldi_native_fbank.OnlineFbank(options)
    online.accept_waveform(RATE, (audio * 32768).numpy())
    online.input_finished()
    return np.stack([online.get_frame(index) for index in range(online.num_frames_ready)])


def nemo(audio: Tensor, lengths: Tensor) -> Tensor:
    """The steps of NeMo's FilterbankFeatures in evaluation, in their order."""
    frames = lengths // 160
    valid = torch.arange(audio.shape[1]) < lengths[:, None]
    signal = torch.cat((audio[:, :1], audio[:, 1:] - 0.97 * audio[:, :-1]), 1).masked_fill(~valid, 0.0)
    spectrum = torch.stft(signal, 512, 160, 400, window=WINDOW, center=True, pad_mode="constant", return_complex=True)
    magnitude = torch.sqrt(torch.view_as_real(spectrum).pow(2).sum(-1))
    mel = torch.log(torch.matmul(FILTERS, magnitude.pow(2.0)) + 2**-24)
    inside = torch.arange(mel.shape[2]) < frames[:, None]
    count = inside.sum(1)[:, None]
    mean = torch.where(inside[:, None], mel, 0.0).sum(2) / count
    centred = torch.where(inside[:, None], mel - mean[:, :, None], 0.0)
    std = torch.sqrt(centred.pow(2).sum(2) / (count - 1)) + 1e-5
    normalised = (mel - mean[:, :, None]) / std[:, :, None]
    return normalised.masked_fill(~inside[:, None], 0.0)[:, :, : int(frames.max())]


if __name__ == "__main__":
    main()
