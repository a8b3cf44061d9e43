"""Who may attend to whom, computed once per forward for all layers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nemolet.errors import ShapeError


class AttentionMask(NamedTuple):
    """What scaled dot-product attention needs to know.

    ``allowed`` is boolean, [B or 1, 1, T or 1, S], True where a query may look; or, with relative positions, numbers
    [B or 1, H, T, S] that are added to the scores, minus infinity where a query may not look. It is None where
    ``causal`` says all.
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
        causal: bool = True,
        device: torch.device | None = None,
    ) -> AttentionMask: ...


def attention_mask(
    length: int,
    *,
    offset: int = 0,
    segments_BT: Tensor | None = None,
    valid_BS: Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    device: torch.device | None = None,
) -> AttentionMask:
    """Combine causality, documents, padding and a window; a mask that is causal only, or none, costs no tensor.

    Args:
        length: T, number of queries; keys are the ``offset`` before them and their own positions.
        offset: how many keys a cache already holds.
        segments_BT: document of each position; attention stays within a document.
        valid_BS: False at padding.
        window: how many positions back (and ahead, where not causal), itself included, a query sees.
        causal: whether later positions are hidden.
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
    if segments_BT is None and valid_BS is None and not windowed and (offset == 0 or length == 1 or not causal):
        return AttentionMask(None, causal=causal and length > 1)
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
    allowed = (key_S <= query_T1 if causal else key_S < query_T1 + keys)[None]  # [1, T, S]
    if windowed and window is not None:
        allowed = allowed & (key_S > query_T1 - window) & (key_S < query_T1 + window)
    if segments_BT is not None:
        allowed = allowed & (segments_BT[:, :, None] == segments_BT[:, None, :])
    if valid_BS is not None:
        # A padded query sees itself, since a row without any key has no softmax.
        allowed = (allowed & valid_BS[:, None, :]) | (key_S == query_T1)
    return AttentionMask(allowed[:, None], causal=False)


def memory_mask(valid_BS: Tensor | None) -> AttentionMask:
    """Every query may look at all of a memory but its padding.

    Example:
        >>> memory_mask(torch.tensor([[True, False]])).allowed.tolist()
        [[[[True, False]]]]
    """
    return AttentionMask(None if valid_BS is None else valid_BS[:, None, None, :], causal=False)
