"""From a layout to a graph that lies on a mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nemolet.data.prepared import Batch
from nemolet.graph import Graph
from nemolet.parallel.apply import parallelize
from nemolet.parallel.deferred import Deferred
from nemolet.parallel.mesh import Mesh
from nemolet.parallel.pipeline import Pipeline
from nemolet.parallel.plan import Plan, plan
from nemolet.parallel.settings import Parallel
from nemolet.training.lightning_model import LightningModel


class Runner(Protocol):
    """Another way through the graph than calling it; see :class:`nemolet.parallel.pipeline.Pipeline`."""

    def step(self, window: Sequence[Batch], nominal: float) -> tuple[Tensor, Tensor]:
        """Forward and backward of a window; the sum of its losses, and of its counts, on every stage.

        Args:
            window: micro-batches of one optimizer step.
            nominal: what each loss is divided by before it goes backward.
        """
        ...

    def evaluate(self, batch: Batch) -> Mapping[str, Tensor]:
        """Forward of one batch; the outputs of the evaluation graph by name, on every stage."""
        ...


@dataclass
class Spread:
    """What is left to know of a graph that was spread over a mesh.

    Args:
        runner: what runs it; None where it is simply called.
        units: modules that gather their parameters while they run.
        twice: parameters of this rank that another stage holds too.
    """

    runner: Runner | None = None
    units: list[FSDPModule] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)


def spread(
    lightning: LightningModel,
    parallel: Parallel,
    mesh: Mesh,
    device: torch.device,
    deferred: Deferred | None = None,
) -> Spread:
    """Plan the graph that is trained, and spread it in place.

    Args:
        lightning: whose graph it is.
        parallel: the layout.
        mesh: the ranks.
        device: of this rank.
        deferred: what knows the values of a graph on ``meta``; the random state stays as it is.

    Raises:
        ParallelError: for a layer that fits no pattern, sizes that do not divide, or a graph that cannot be cut.
    """
    layout = plan(
        lightning.evaluation,  # which knows all that look at an activation
        parallel.make_rules(),
        mesh.sizes,
        overrides=parallel.overrides or {},
        kv_heads=parallel.kv_heads,
    )
    own = {name for name, _ in lightning.graph.named_modules()}
    layout = replace(layout, modules={name: each for name, each in layout.modules.items() if name in own})
    lightning.aliases = {
        f"graph.{alias}": f"graph.{name}" for name, each in layout.parameters.items() for alias in each.tied
    }
    options: dict[str, Any] = {
        "param_dtype": _dtype(parallel.param_dtype),
        "reduce_dtype": _dtype(parallel.reduce_dtype),
        "reshard": parallel.reshard,
        "cpu_offload": parallel.cpu_offload,
        "checkpointing": parallel.checkpointing,
        "compile": parallel.compile,
        "cp_attention": parallel.cp_attention,
        "device": device,
        "deferred": deferred,
    }
    with torch.random.fork_rng(devices=[]):  # values are drawn again where they were deferred
        if mesh.sizes.pp == 1:
            return Spread(units=_units([parallelize(lightning.graph, layout, mesh, **options)]))
        pipeline = _pipeline(lightning, layout, mesh, parallel, options)
    return Spread(pipeline, _units([stage.view for stage in pipeline.stages.values()]), pipeline.tied_here)


def _pipeline(
    lightning: LightningModel, layout: Plan, mesh: Mesh, parallel: Parallel, options: dict[str, Any]
) -> Pipeline:
    """Cut the graph into stages, and keep those of this rank."""
    graph, evaluation = lightning.graph, lightning.evaluation
    assert isinstance(graph, Graph) and isinstance(evaluation, Graph)
    pipeline = Pipeline(
        graph,
        layout,
        mesh,
        evaluation=None if evaluation is graph else evaluation,
        schedule=parallel.schedule,
        layers=parallel.layers,
        microbatches=parallel.microbatches,
        backward=lightning.manual_backward,
        **options,
    )
    lightning.graph = pipeline.graph  # type: ignore[assignment]  # a module without ports: it is not called
    return pipeline


def _units(modules: Sequence[nn.Module]) -> list[FSDPModule]:
    return [each for module in modules for each in module.modules() if isinstance(each, FSDPModule)]


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
