"""Activation checkpointing of blocks: what is forgotten in the forward pass is computed again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
    every = interval(policy)
    for block in blocks[::every] if every else ():
        block.forward = _checkpointed(block, policy == "selective")


def interval(policy: str) -> int:
    """Every how many blocks one is recomputed; 0 for none.

    Raises:
        ParallelError: for another policy.

    Example:
        >>> interval("every_3"), interval("selective")
        (3, 1)
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
    return every


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


class DearResults(TorchDispatchMode):
    """Sees every result that selective checkpointing would keep (final).

    Args:
        found: is told of each of them.

    Example:
        >>> with DearResults(lambda tensor: print(tuple(tensor.shape))):
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4) + 1
        (2, 4)
    """

    def __init__(self, found: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.found = found
        self.made: set[int] = set()  # their memory

    def add(self, *tensors: Tensor) -> None:
        """Results of an operation that is dear, though it is none of torch's."""
        for tensor in tensors:
            self.made.add(tensor.untyped_storage()._cdata)
            self.found(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _DEAR:
            self.add(*(each for each in tree_leaves(result) if isinstance(each, Tensor) and each.numel()))
        return result
