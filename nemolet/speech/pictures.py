"""Pictures of recordings as SVG: the spectrogram with what was written where, and where a decoder looked."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemolet.speech.attention_recognizer import AttentionRecognizer
from nemolet.speech.charts import opening
from nemolet.speech.models import Recognizer
from nemolet.speech.transcription import Piece

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 960, 220, 60, 64, 36


def spectrogram_picture(
    model: Recognizer, audio_N: Tensor, path: str | Path, *, title: str, tokens: Sequence[Piece] = ()
) -> None:
    """Draw the features that a model hears, and above them what it wrote at which time.

    Args:
        model: in evaluation.
        audio_N: samples at its rate.
        path: the SVG file to write.
        title: of the picture.
        tokens: of a transcript; where each begins there is a line.
    """
    with torch.inference_mode():
        spectrogram, lengths = model.front_end(audio_N[None], torch.tensor([len(audio_N)]))
    values_CT = spectrogram[0, : int(lengths[0])].T.flip(0).cpu().numpy()
    heat_map(values_CT, path, title=title, seconds=len(audio_N) / model.sample_rate, tokens=tokens, up="features")


def attention_picture(
    model: AttentionRecognizer, audio_N: Tensor, labels: Sequence[int], path: str | Path, *, title: str
) -> None:
    """Draw where the decoder looked in a recording for each label, and for the end in the last row.

    Args:
        model: in evaluation.
        audio_N: samples at its rate.
        labels: what it wrote.
        path: the SVG file to write.
        title: of the picture.
    """
    weights_ST = attention_weights(model, audio_N, labels).cpu().numpy()
    heat_map(weights_ST, path, title=title, seconds=len(audio_N) / model.sample_rate, up="labels, first above")


@torch.inference_mode()
def attention_weights(model: AttentionRecognizer, audio_N: Tensor, labels: Sequence[int]) -> Tensor:
    """How much the decoder looks at each state of the encoder, the mean over layers and heads. Shape: [S, T]."""
    encoded = model.encode(audio_N[None], torch.tensor([len(audio_N)]))
    found: list[Tensor] = []

    def recorded(core: Any) -> Any:
        def mix(query_BTHK: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float) -> Tensor:
            key_BSHK = key.repeat_interleave(query_BTHK.shape[2] // key.shape[2], 2)
            score_BHTS = torch.einsum("bthk,bshk->bhts", query_BTHK, key_BSHK) * query_BTHK.shape[-1] ** -0.5
            found.append(score_BHTS.float().softmax(-1).mean(1)[0])
            return core(query_BTHK, key, value, mask, dropout)  # type: ignore[no-any-return]

        return mix

    attentions: list[Any] = [block.cross_attention for block in model.decoder.blocks]
    cores = [attention.core for attention in attentions]
    try:
        for attention, core in zip(attentions, cores):
            attention.core = recorded(core)
        model.next_logits(torch.tensor([[model.end, *labels]]), encoded)
    finally:
        for attention, core in zip(attentions, cores):
            attention.core = core
    return torch.stack(found).mean(0)


def heat_map(
    values_YX: NDArray[Any], path: str | Path, *, title: str, seconds: float, up: str, tokens: Sequence[Piece] = ()
) -> None:
    """Draw numbers over time, the darker the larger.

    Args:
        values_YX: rows from above, columns over time; at least one of each.
        path: the SVG file to write.
        title: of the picture.
        seconds: that the columns reach over.
        up: what the rows are.
        tokens: what is written where; each has a line where it begins.
    """
    if not values_YX.size:
        values_YX = np.zeros((1, 1))
    image = base64.b64encode(_png(values_YX)).decode()
    right, bottom = _WIDTH - 20, _TOP + _HEIGHT
    scale = (right - _LEFT) / max(seconds, 1e-9)
    parts = [
        opening(_WIDTH, bottom + _BOTTOM),
        f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
        f'<image x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{_HEIGHT}" preserveAspectRatio="none" '
        f'style="image-rendering: pixelated" href="data:image/png;base64,{image}"/>',
        f'<text x="14" y="{_TOP + _HEIGHT / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {_TOP + _HEIGHT / 2:.0f})">{escape(up)}</text>',
    ]
    for tick in range(6):
        x = _LEFT + (right - _LEFT) * tick / 5
        parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{seconds * tick / 5:.2f} s</text>')
    for token in tokens:
        x = _LEFT + scale * token.start
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{bottom}" stroke="#d62728"/>')
        parts.append(f'<text x="{x:.1f}" y="{_TOP - 12}" text-anchor="middle">{escape(token.text)}</text>')
    Path(path).write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def _png(values_YX: NDArray[Any]) -> bytes:
    """A grey picture of numbers between their least and their largest."""
    low, high = float(values_YX.min()), float(values_YX.max())
    grey_YX = np.round(255 * (1 - (values_YX - low) / max(high - low, 1e-12))).astype(np.uint8)
    height, width = grey_YX.shape
    rows = np.concatenate((np.zeros((height, 1), np.uint8), grey_YX), 1).tobytes()  # each begins with "no filter"

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
