"""What attention looks at, seen from outside: the model is not changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from nemolet.errors import ConfigError
from nemolet.nn.attention import (
    Attention,
    AttentionCore,
    CrossAttention,
    PlainAttention,
    attention_scores,
    scaled_dot_product,
)
from nemolet.nn.mask import AttentionMask


@dataclass(frozen=True)
class _Recorder:
    """A core that also works out its weights."""

    core: AttentionCore
    name: str
    found: dict[str, Tensor]

    def __call__(
        self, query_BTHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor, mask: AttentionMask, dropout: float
    ) -> Tensor:
        cap = self.core.cap if isinstance(self.core, PlainAttention) else None
        scores_BGRTS = attention_scores(query_BTHK.detach(), key_BSGK.detach(), mask, cap=cap)
        weights_BHTS = scores_BGRTS.float().softmax(-1).flatten(1, 2)
        self.found[self.name] = weights_BHTS.nan_to_num(0.0)  # padding may look at nothing
        return self.core(query_BTHK, key_BSGK, value_BSGK, mask, dropout)


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside the block, each forward pass writes down what its attention layers look at.

    Yields:
        The weights of the last pass by the name of the layer, in the order of the model; ``[B, H, T, S]``, in float32.

    Raises:
        ConfigError: for a model without such layers, or one whose sequence lies on several devices.

    Example:
        >>> import nemolet as nl, torch
        >>> model = nl.nn.Decoder(layers=2, width=8, heads=2)
        >>> with recorded_attention(model) as found:
        ...     _ = model(torch.randn(1, 3, 8))
        >>> {name: tuple(weights.shape) for name, weights in found.items()}
        {'blocks.0.attention': (1, 2, 3, 3), 'blocks.1.attention': (1, 2, 3, 3)}
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Attention | CrossAttention)}
    known = {name for name, layer in layers.items() if layer.core is scaled_dot_product}
    known |= {name for name, layer in layers.items() if isinstance(layer.core, PlainAttention)}
    odd = [name for name in layers if name not in known]
    if odd or not layers:
        raise ConfigError(
            "attention cannot be seen here",
            where=odd[0] if odd else type(model).__name__,
            expected="layers of nemolet.nn.Attention on one device",
            found=type(layers[odd[0]].core).__name__ if odd else "none",
        )
    cores = {name: layer.core for name, layer in layers.items()}
    found: dict[str, Tensor] = {}
    try:
        for name, layer in layers.items():
            layer.core = _Recorder(cores[name], name, found)
        yield found
    finally:
        for name, layer in layers.items():
            layer.core = cores[name]
