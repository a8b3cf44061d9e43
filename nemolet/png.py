"""Numbers as a picture in the PNG format."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def grey_png(values_YX: NDArray[Any], *, low: float | None = None, high: float | None = None) -> bytes:
    """A grey picture, the darker the larger the number.

    Args:
        values_YX: rows from above; at least one number.
        low: what is white; None for the least number.
        high: what is black; None for the largest.

    Example:
        >>> grey_png(np.zeros((2, 3)))[:8]
        b'\\x89PNG\\r\\n\\x1a\\n'
    """
    white = float(values_YX.min()) if low is None else low
    black = float(values_YX.max()) if high is None else high
    share_YX = ((values_YX - white) / max(black - white, 1e-12)).clip(0, 1)
    grey_YX = np.round(255 * (1 - share_YX)).astype(np.uint8)
    return _png(grey_YX[..., None], kind=0)


def colour_png(colours_YX3: NDArray[np.uint8]) -> bytes:
    """A picture of red, green and blue from 0 to 255.

    Args:
        colours_YX3: rows from above; at least one.

    Example:
        >>> colour_png(np.zeros((2, 3, 3), np.uint8))[:8]
        b'\\x89PNG\\r\\n\\x1a\\n'
    """
    return _png(colours_YX3, kind=2)


def _png(pixels_YXC: NDArray[np.uint8], *, kind: int) -> bytes:
    height, width, _ = pixels_YXC.shape
    flat = pixels_YXC.reshape(height, -1)
    rows = np.concatenate((np.zeros((height, 1), np.uint8), flat), 1).tobytes()  # each begins with "no filter"

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
