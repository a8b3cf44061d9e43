"""What each layer of a model costs, and how a pipeline splits layers evenly by it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from nemolet.errors import ParallelError
from nemolet.module import NeuralModule
from nemolet.nn.moe import MixtureOfExperts
from nemolet.parallel.plan import Plan
from nemolet.types import Index, NeuralType


def layer_costs(graph: nn.Module, plan: Plan) -> dict[str, int]:
    """Multiplications per token of each block, and of what comes before and after them as ``"first"`` and ``"last"``.

    Every matrix is multiplied with each token once; of experts only those that a token uses. A table in which rows
    are looked up costs nothing, but a head does.

    Example:
        >>> import nemolet as nl
        >>> from nemolet.parallel.plan import plan
        >>> model = nl.language.CausalLM(vocab_size=10, layers=1, width=4, heads=2, ffn_width=8)
        >>> layer_costs(model, plan(model))
        {'graph.decoder.blocks.0': 160, 'first': 0, 'last': 40}
    """
    blocks = [name for stack in plan.stacks for name in stack]
    costs = {**dict.fromkeys(blocks, 0), "first": 0, "last": 0}
    inside = {f"{block}.{name}": block for block in blocks for name, _ in graph.get_submodule(block).named_modules()}
    for name, module in graph.named_modules():
        matrices = [p.numel() for p in module.parameters(recurse=False) if p.ndim >= 2]
        if matrices and not _looks_up(module):
            costs[inside.get(name, "last")] += int(sum(matrices) * _share_used(graph, name))
    return costs


def _looks_up(module: nn.Module) -> bool:
    """Whether ids or positions enter, by which rows of a table are read."""
    if not isinstance(module, NeuralModule):
        return isinstance(module, nn.Embedding)
    types = [port.type for port in module.input_ports.values()]
    return any(isinstance(t, NeuralType) and isinstance(t.element, Index) and "E" not in str(t.axes) for t in types)


def _share_used(graph: nn.Module, name: str) -> float:
    """Which share of a layer's weights each token meets."""
    owner = graph.get_submodule(name.rpartition(".")[0]) if "." in name else graph
    if isinstance(owner, MixtureOfExperts) and name.endswith(".experts"):
        return owner.router.mixture.per_token / owner.router.mixture.number
    return 1.0


def balanced(costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> list[int]:
    """How many layers each stage has, so that the dearest stage is as cheap as can be.

    Args:
        costs: of the layers, in order.
        stages: how many there are.
        first: what the first stage has to do beside its layers.
        last: what the last stage has to do beside its layers.

    Raises:
        ParallelError: for fewer layers than stages.

    Example:
        >>> balanced([1.0] * 8, 4, last=1.0), balanced([1.0] * 7, 4, last=1.0)
        ([2, 2, 2, 2], [2, 2, 2, 1])
    """
    if len(costs) < stages:
        raise ParallelError(
            "there are fewer layers than stages",
            where="parallel.pp",
            expected=f"at most {len(costs)} stages",
            found=stages,
            fix=f"set parallel.pp to at most {len(costs)}, or model.layers to at least {stages}",
        )
    sums = list(itertools.accumulate(costs, initial=0.0))
    # After each stage, by how many layers are done: the dearest, the sum of squares, and where the last one begins.
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for stage in range(stages):
        extra = (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
        row: dict[int, tuple[float, float, int]] = {}
        for end in range(stage + 1, len(costs) - (stages - 1 - stage) + 1):
            ways = []
            for begin, (dearest, squares, _) in best[stage].items():
                if begin < end:
                    cost = sums[end] - sums[begin] + extra
                    ways.append((max(dearest, cost), squares + cost**2, begin))
            row[end] = min(ways)
        best.append(row)
    counts, end = [], len(costs)
    for stage in range(stages, 0, -1):
        begin = best[stage][end][2]
        counts.append(end - begin)
        end = begin
    return counts[::-1]
