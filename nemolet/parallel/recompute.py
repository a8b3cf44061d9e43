"""Activation checkpointing of blocks: what is forgotten in the forward pass is computed again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nemolet.errors import ParallelError

_DEAR = (  # products, attention and what crosses the network: dear to compute, so kept
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
)


def recompute(blocks: Sequence[nn.Module], policy: str) -> None:
    """Let blocks recompute their activations; names of parameters stay as they are.

    Args:
        blocks: in order.
        policy: ``"none"``, ``"full"``, ``"every_n"`` for every n-th block, or ``"selective"``, which keeps the
            results of products, attention and sums over ranks.

    Raises:
        ParallelError: for another policy.
    """
    every = {"none": 0, "full": 1, "selective": 1}.get(policy, -1)
    if policy.startswith("every_") and policy[6:].isdigit():
        every = int(policy[6:])
    if every < 0 or (every == 0 and policy != "none"):
        raise ParallelError(
            "unknown activation checkpointing",
            where="parallel.checkpointing",
            expected="none, full, every_n or selective",
            found=policy,
            fix="for example every_2",
        )
    for block in blocks[:: every or len(blocks) + 1] if every else ():
        block.forward = _checkpointed(block, policy == "selective")


def _checkpointed(block: nn.Module, selective: bool) -> Callable[..., Any]:
    inner = block.forward
    options: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _keep)} if selective else {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, use_reentrant=False, **options, **kwargs)

    return forward


def _keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE
