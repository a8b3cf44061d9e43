"""Who may attend to whom, computed once per forward for all layers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nemolet.errors import ShapeError


class AttentionMask(NamedTuple):
    """What scaled dot-product attention needs to know.

    ``allowed`` is boolean, [B or 1, 1, T, S], True where a query may look; None where ``causal`` says all.
    """

    allowed: Tensor | None
    causal: bool


class MakeMask(Protocol):
    """What makes the mask of a forward pass; replaced where a sequence lies on several devices."""

    def __call__(
        self,
        length: int,
        *,
        offset: int = 0,
        segments_BT: Tensor | None = None,
        valid_BS: Tensor | None = None,
        window: int | None = None,
        device: torch.device | None = None,
    ) -> AttentionMask: ...


def attention_mask(
    length: int,
    *,
    offset: int = 0,
    segments_BT: Tensor | None = None,
    valid_BS: Tensor | None = None,
    window: int | None = None,
    device: torch.device | None = None,
) -> AttentionMask:
    """Combine causality, documents, padding and a window; a purely causal mask costs no tensor.

    Args:
        length: T, number of queries; keys are the ``offset`` before them and their own positions.
        offset: how many keys a cache already holds.
        segments_BT: document of each position; attention stays within a document.
        valid_BS: False at padding.
        window: how many positions back, itself included, a query sees.
        device: where the mask is made.

    Raises:
        ShapeError: for packed documents after cached keys, whose documents nobody knows any more.

    Example:
        >>> attention_mask(3)
        AttentionMask(allowed=None, causal=True)
        >>> attention_mask(3, window=2).allowed.int().tolist()
        [[[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]]
    """
    keys = offset + length
    windowed = window is not None and window < keys
    if segments_BT is None and valid_BS is None and not windowed and (offset == 0 or length == 1):
        return AttentionMask(None, causal=length > 1)
    if segments_BT is not None and offset:
        raise ShapeError(
            "packed documents cannot be continued from a cache",
            where="segments",
            expected="an empty cache",
            found=f"{offset} cached tokens",
            fix="read one document per row, without segments",
        )
    query_T1 = torch.arange(offset, keys, device=device)[:, None]
    key_S = torch.arange(keys, device=device)
    allowed = (key_S <= query_T1)[None]
    if windowed and window is not None:
        allowed = allowed & (key_S > query_T1 - window)
    if segments_BT is not None:
        allowed = allowed & (segments_BT[:, :, None] == segments_BT[:, None, :])
    if valid_BS is not None:
        # A padded query sees itself, since a row without any key has no softmax.
        allowed = (allowed & valid_BS[:, None, :]) | (key_S == query_T1)
    return AttentionMask(allowed[:, None], causal=False)
