"""Losses of language models, as sums with their counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemolet.module import NeuralModule
from nemolet.types import IGNORED, CountScalar, LabelsBT, LogitsBTV, LossScalar


class TokenLoss(NamedTuple):
    """A loss summed over tokens, and the number of tokens: dividing is left to whoever knows them all."""

    loss: LossScalar
    count: CountScalar  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


class CrossEntropy(NeuralModule):
    """Cross-entropy of the next token, summed over all labels that count (final).

    The sum is not divided here: over micro-batches and ranks only the sum of sums by the sum of counts is
    the mean over tokens.

    Args:
        label_smoothing: share of probability spread over the whole vocabulary.
        z_loss: weight of the squared log-partition, which keeps logits from drifting (PaLM, 2022, section 5).

    Shape: logits_BTV, labels_BT -> scalar, scalar.

    Example:
        >>> loss, count = CrossEntropy()(torch.zeros(1, 2, 4), torch.tensor([[1, -100]]))
        >>> round(loss.item(), 4), count.item()
        (1.3863, 1)
    """

    CONFIG_RULES = (
        ("label_smoothing >= 0 and label_smoothing < 1", "label_smoothing is a share, at least 0 and below 1"),
        ("z_loss >= 0", "z_loss is at least 0"),
    )

    def __init__(self, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def forward(self, logits: LogitsBTV, labels: LabelsBT) -> TokenLoss:
        flat_logits, flat_labels = logits.flatten(0, -2), labels.flatten()
        if type(logits) is Tensor and not torch.compiler.is_compiling():
            loss = _ChunkedLoss.apply(flat_logits, flat_labels, self.label_smoothing, self.z_loss)
        else:  # a compiler fuses the plain formula by itself; a sharded tensor has its own rules
            loss = self._plain(flat_logits, flat_labels)
        return TokenLoss(loss, flat_labels.ne(IGNORED).sum())

    def _plain(self, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        wide_NV = logits_NV.to(_wide(logits_NV))
        loss = F.cross_entropy(
            wide_NV, labels_N, ignore_index=IGNORED, reduction="sum", label_smoothing=self.label_smoothing
        )
        if self.z_loss:
            loss = loss + self.z_loss * wide_NV.logsumexp(-1)[labels_N != IGNORED].square().sum()
        return loss


class _ChunkedLoss(torch.autograd.Function):
    """The same loss, a few rows at a time.

    Log-probabilities of a whole batch are as large as its logits, and in float32 even where those are not.
    Only the log-partition of each row is kept; the gradient comes from it and the logits, and is the one
    large tensor.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, smoothing: float, z_loss: float) -> Tensor:
        wide, rows = _wide(logits_NV), _rows(logits_NV)
        counted_N = labels_N.ne(IGNORED)
        target_N1 = labels_N.masked_fill(~counted_N, 0)[:, None]
        partition_N = torch.cat([chunk.to(wide).logsumexp(-1) for chunk in logits_NV.split(rows)])
        loss_N = partition_N - (1 - smoothing) * logits_NV.gather(1, target_N1)[:, 0].to(wide)
        if smoothing:
            loss_N = loss_N - smoothing * logits_NV.mean(-1, dtype=wide)
        if z_loss:
            loss_N = loss_N + z_loss * partition_N.square()
        ctx.save_for_backward(logits_NV, partition_N, target_N1, counted_N)
        ctx.smoothing, ctx.z_loss = smoothing, z_loss
        return loss_N.where(counted_N, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, partition_N, target_N1, counted_N = ctx.saved_tensors
        smoothing, rows = ctx.smoothing, _rows(logits_NV)
        grad_N1 = (grad * counted_N)[:, None]
        slope_N1 = grad_N1 * (1 + 2 * ctx.z_loss * partition_N[:, None]) if ctx.z_loss else grad_N1
        grad_NV = torch.empty_like(logits_NV)
        tensors = (logits_NV, grad_NV, partition_N[:, None], slope_N1, grad_N1, target_N1)
        pieces = zip(*(tensor.split(rows) for tensor in tensors))
        for chunk, into, partition, slope, each, target in pieces:
            out = into if into.dtype == partition.dtype else None
            probs = torch.sub(chunk, partition, out=out).exp_().mul_(slope)
            if smoothing:
                probs.sub_(each * (smoothing / chunk.shape[1]))
            probs.scatter_add_(1, target, each * (smoothing - 1))
            if probs is not into:
                into.copy_(probs)
        return grad_NV, None, None, None


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _rows(logits_NV: Tensor) -> int:
    """How many rows a chunk has: few enough for a CPU's cache, many enough to keep an accelerator busy."""
    return max(1, 2 ** (18 if logits_NV.device.type == "cpu" else 26) // logits_NV.shape[1])
