"""Pictures of recordings as SVG: the spectrogram with what was written where, and where a decoder looked."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemolet.nn.observation import recorded_attention
from nemolet.png import grey_png
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
    with recorded_attention(model.decoder) as found:
        model.next_logits(torch.tensor([[model.end, *labels]]), encoded)
    cross = [weights_BHTS for name, weights_BHTS in found.items() if name.endswith("cross_attention")]
    return torch.stack(cross).mean((0, 2))[0]


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
    image = base64.b64encode(grey_png(values_YX)).decode()
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
