"""Keys and values of what was read, so that decoding reads each token once."""

from __future__ import annotations

import torch
from torch import Tensor

from nemolet.errors import ShapeError


class KVCache:
    """Keys and values of all layers, allocated once (final).

    Args:
        layers: number of layers.
        batch: number of sequences.
        kv_heads: key/value heads G.
        capacity: longest sequence.
        head_size: K.
        device: where it lies.
        dtype: of keys and values.

    Example:
        >>> cache = KVCache(layers=1, batch=1, kv_heads=1, capacity=4, head_size=2)
        >>> keys, _ = cache.update(0, torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2))
        >>> cache.advance(3, None); keys.shape, cache.length
        (torch.Size([1, 3, 1, 2]), 3)
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (layers, batch, capacity, kv_heads, head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity, self.length = capacity, 0
        self.valid_BS: Tensor | None = None  # False at padding; None while nothing is padded
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of what all tokens look at, by layer

    def update(self, layer: int, key_BTGK: Tensor, value_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens to one layer; returns all of that layer so far."""
        end = self.length + key_BTGK.shape[1]
        if end > self.capacity:
            raise ShapeError(
                "the cache is full",
                where="KVCache",
                expected=f"at most {self.capacity} tokens",
                found=end,
                fix="make it larger, or drop the oldest tokens and read the rest anew",
            )
        heads = key_BTGK.shape[2]  # fewer than there is room for, where heads lie on several devices
        self.keys[layer, :, self.length : end, :heads] = key_BTGK
        self.values[layer, :, self.length : end, :heads] = value_BTGK
        return self.keys[layer, :, :end, :heads], self.values[layer, :, :end, :heads]

    def valid_with(self, length: int, mask_BT: Tensor | None) -> Tensor | None:
        """Which positions count once ``length`` tokens with this mask are added."""
        if mask_BT is None and self.valid_BS is None:
            return None
        batch, device = self.keys.shape[1], self.keys.device
        before_BS, new_BT = self.valid_BS, mask_BT
        if before_BS is None:
            before_BS = torch.ones(batch, self.length, dtype=torch.bool, device=device)
        if new_BT is None:
            new_BT = torch.ones(batch, length, dtype=torch.bool, device=device)
        return torch.cat((before_BS, new_BT), dim=1)

    def advance(self, length: int, valid_BS: Tensor | None) -> None:
        """Count the tokens that all layers have added."""
        self.length += length
        self.valid_BS = valid_BS

    def reorder(self, rows: Tensor, *, same_memory: bool = False) -> None:
        """Keep these rows, in this order.

        Args:
            rows: their numbers; one may be taken several times.
            same_memory: whether each looks at the same memory as the row whose place it takes.
        """
        if len(rows) == self.keys.shape[1]:  # only what is filled is moved
            for stored in (self.keys, self.values):
                stored[:, :, : self.length] = stored[:, rows, : self.length]
        else:
            self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.valid_BS = None if self.valid_BS is None else self.valid_BS[rows]
        if not same_memory:
            self.memory = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.memory.items()}
