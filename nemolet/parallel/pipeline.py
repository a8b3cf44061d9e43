"""Running a pipeline: stages on several ranks, and what they send to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import DDP
from torch.distributed.fsdp import FSDPModule

from nemolet.errors import ParallelError
from nemolet.graph import Graph
from nemolet.parallel.apply import gradient_sync, parallelize
from nemolet.parallel.costs import balanced
from nemolet.parallel.gradients import local
from nemolet.parallel.links import Links, empty_as, group_of_each_column, header_of
from nemolet.parallel.mesh import Mesh
from nemolet.parallel.plan import Plan
from nemolet.parallel.planner import layer_costs
from nemolet.parallel.schedules import schedule_of
from nemolet.parallel.stages import Stage, cut_graph, plan_of_stage
from nemolet.types import Count, Loss, NeuralType

Batch = Mapping[str, Tensor]


def _backward(loss: Tensor) -> None:
    loss.backward()


class Pipeline:
    """A graph whose blocks lie on several ranks, one stage after the other (final).

    Every rank reads every batch. It sends hidden states to the stage after, and their gradients to the stage before;
    what tokens, segments and labels a stage needs it has itself.

    Args:
        graph: what is trained; afterwards to be dropped for :attr:`graph`, the part of it on this rank.
        plan: of this graph.
        mesh: the ranks.
        evaluation: another graph of the same modules that also measures; None for the same.
        schedule: ``"gpipe"``, ``"1f1b"``, or ``"interleaved"`` with several stages on each rank.
        layers: how many blocks each stage has; None for a balanced split, with two stages on each rank where they
            are interleaved.
        microbatches: least number of micro-batches of a step; the batches of a window are divided into so many.
            None for twice as many as stages.
        backward: what starts the backward pass of a loss, such as one that scales it.
        options: of :func:`nemolet.parallel.parallelize`.

    Raises:
        ParallelError: for a graph that cannot be cut, or numbers of layers that do not fit it.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        mesh: Mesh,
        *,
        evaluation: Graph | None = None,
        schedule: str = "1f1b",
        layers: Sequence[int] | None = None,
        microbatches: int | None = None,
        backward: Callable[[Tensor], None] = _backward,
        **options: Any,
    ) -> None:
        view = mesh.axis("pp")
        self.group, self.rank, self.ranks = view.get_group(), view.get_local_rank(), view.size()
        blocks, counts = _blocks(plan), list(layers or _layers(graph, plan, self.ranks, schedule))
        self.each = _stages_of_a_rank(counts, len(blocks), self.ranks)
        self.schedule, self.backward, self.mesh = schedule_of(schedule, self.each), backward, mesh
        self.microbatches = microbatches or 2 * len(counts)
        starts = [sum(counts[:number]) for number in range(len(counts) + 1)]
        self.stages: dict[int, Stage] = {}
        for index in range(self.rank, len(counts), self.ranks):
            own = range(starts[index], starts[index + 1])
            first, last = index == 0, index == len(counts) - 1
            self.stages[index] = Stage(graph, blocks, own, first=first, last=last, index=index)
        own_blocks = {n for i in self.stages for n in range(starts[i], starts[i + 1])}
        self.last = len(counts) - 1
        self.evaluation = evaluation or graph
        self.loss_port, self.count_port = _port(graph, Loss), _port(graph, Count)
        for stage in self.stages.values():
            parallelize(stage.view, plan_of_stage(plan, stage), mesh, **options)
            if isinstance(stage.view, DDP):
                gradient_sync(stage.view, False)  # its hooks know of one micro-batch at a time; see _add_copies
        # After the stages are spread, what they share with this graph is spread as well.
        self.graph = cut_graph(graph, blocks, own_blocks, first=self.rank == 0, last=self.last in self.stages)
        self.graph.label = graph.label  # type: ignore[assignment]
        self.tied = [(name, *each.tied) for name, each in plan.parameters.items() if each.tied]
        ends = slice(0, None, max(1, self.ranks - 1))
        self._ends = group_of_each_column(mesh, ends) if self.tied else None
        self._calls = {i: s.also(evaluation) if evaluation is not None else None for i, s in self.stages.items()}
        self.links = Links(mesh)
        self._gathered = False

    @property
    def tied_here(self) -> list[str]:
        """Names of this rank's parameters that another stage holds too."""
        held = {name for name, _ in self.graph.named_parameters()}
        return [name for names in self.tied for name in names if name in held]

    # ---------------------------------------------------------------- training

    def step(self, window: Sequence[Batch], nominal: float = 1.0) -> tuple[Tensor, Tensor]:
        """Forward and backward of a window; the sum of its losses, and of its counts, on every stage.

        Args:
            window: micro-batches of one optimizer step.
            nominal: what each loss is divided by before it goes backward.
        """
        micros = self.divide(window)
        sums = torch.zeros(2, dtype=torch.float64, device=next(iter(micros[0].values())).device)
        alive: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        done = dict.fromkeys(self.stages, 0)
        for action in self.schedule(self.rank, self.ranks, self.each, len(micros)):
            stage, key = self.stages[action.stage], (action.stage, action.micro)
            if action.forward:
                alive[key] = self._forward(stage, micros[action.micro], sums, nominal)
            else:
                done[action.stage] += 1
                self._backward(stage, *alive.pop(key), last=done[action.stage] == len(micros))
        self.links.finish()
        self._add_copies()
        self._add_tied()
        dist.all_reduce(sums, group=self.group)
        loss, count = sums.float().unbind()
        return loss, count

    def divide(self, window: Sequence[Batch]) -> list[Batch]:
        """Cut batches along their rows, so that there are enough micro-batches to keep all stages busy."""
        parts = -(-self.microbatches // len(window))
        micros: list[Batch] = []
        for batch in window:
            rows = next(iter(batch.values())).shape[0]
            pieces = max(d for d in range(1, min(parts, rows) + 1) if rows % d == 0)
            cut = {name: value.chunk(pieces) for name, value in batch.items()}
            micros += [{name: value[n] for name, value in cut.items()} for n in range(pieces)]
        return micros

    def _forward(self, stage: Stage, batch: Batch, sums: Tensor, nominal: float) -> tuple[Tensor | None, Tensor]:
        received = None if stage.first else self.links.receive(stage.index, batch).requires_grad_()
        result = stage(received, batch)
        if not stage.last:
            self.links.send(result.detach(), stage.index, batch)
            return received, result
        loss, count = _value(result, self.loss_port), _value(result, self.count_port)
        sums += torch.stack((loss.detach().double(), count.detach().double()))
        return received, loss / nominal

    def _backward(self, stage: Stage, received: Tensor | None, result: Tensor, *, last: bool) -> None:
        _exchange_gradients(stage.view, now=last)
        with torch.autocast(result.device.type, enabled=False):  # gradients have the types of what they belong to
            if stage.last:
                self.backward(result)
            else:
                torch.autograd.backward(result, self.links.receive_gradient(stage.index, result))
        if received is not None:
            assert received.grad is not None
            self.links.send_gradient(received.grad, stage.index)

    def _add_copies(self) -> None:
        """Sum gradients over the ranks that hold copies."""
        group = self.mesh.axis("dp_replicate").get_group()
        for stage in self.stages.values():
            if isinstance(stage.view, DDP):
                grads = [p.grad for p in stage.view.parameters() if p.grad is not None]
                for dtype in {g.dtype for g in grads}:
                    same = [g for g in grads if g.dtype == dtype]
                    flat = torch.cat([g.flatten() for g in same])
                    dist.all_reduce(flat, group=group)
                    for gradient, part in zip(same, flat.split([g.numel() for g in same])):
                        gradient.copy_(part.view_as(gradient))

    def _add_tied(self) -> None:
        """Sum the gradients of parameters that the first and the last stage share."""
        held = dict(self.graph.named_parameters())
        for names in self.tied:
            parameter = next((held[name] for name in names if name in held), None)
            if parameter is not None and parameter.grad is not None:
                dist.all_reduce(local(parameter.grad), group=self._ends)

    # ---------------------------------------------------------------- without gradients

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Forward of one batch; the outputs of the evaluation graph by name, on every stage.

        Raises:
            ParallelError: for an output that is not a single number.
        """
        names = list(self.evaluation.output_ports)
        result = self.forward(batch, self._calls)
        device = next(iter(batch.values())).device
        values = torch.zeros(len(names), dtype=torch.float64, device=device)
        if result is not None:
            for number, name in enumerate(names):
                value = _value(result, name)
                if value.ndim:
                    raise ParallelError(
                        "stages exchange numbers only", where=name, expected="a scalar", found=tuple(value.shape)
                    )
                values[number] = value
        dist.all_reduce(values, group=self.group)
        return dict(zip(names, values.unbind()))

    def forward(self, batch: Mapping[str, Any], calls: Mapping[int, Callable[..., Any] | None]) -> Any:
        """One batch through all stages; what the last one returns, or None on other ranks."""
        self._gather_once()
        result = None
        with torch.no_grad():
            for index, stage in self.stages.items():
                received = None if stage.first else self.links.receive(index, batch)
                left = stage(received, batch, calls[index])
                if stage.last:
                    result = left
                else:
                    self.links.send(left, index, batch)
        self.links.finish()
        return result

    def _gather_once(self) -> None:
        """Memory for whole parameters that is first used in inference mode could not be used again outside."""
        if self._gathered:
            return
        self._gathered = True
        with torch.inference_mode(False), torch.no_grad():
            for stage in self.stages.values():
                for module in stage.view.modules():
                    if isinstance(module, FSDPModule):
                        module.unshard()
                        module.reshard()

    def share(self, result: Tensor | None, device: torch.device) -> Tensor:
        """What the last stage has, on all stages."""
        source = dist.get_global_rank(self.group, self.last % self.ranks)
        header = torch.zeros(8, dtype=torch.int64, device=device) if result is None else header_of(result)
        dist.broadcast(header, source, group=self.group)
        shared = empty_as(header) if result is None else result.contiguous()
        dist.broadcast(shared, source, group=self.group)
        return shared


class Piped(nn.Module):
    """The model inside a pipeline, to be called and to generate with as if it lay on one rank (final).

    Every rank calls it with the same arguments and gets the same result.

    Args:
        pipeline: around a graph that has the model.
        name: of the model in the graph.
    """

    def __init__(self, pipeline: Pipeline, name: str = "model") -> None:
        super().__init__()
        self.pipeline, self.name = pipeline, name
        self.inner = pipeline.graph.get_submodule(name)
        self._calls = {i: s.view.get_submodule(name).forward for i, s in pipeline.stages.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run all stages."""
        inputs = {**dict(zip(self.inner.declared().order, args)), **kwargs}  # type: ignore[operator]
        device = next(v.device for v in inputs.values() if isinstance(v, Tensor))
        return self.pipeline.share(self.pipeline.forward(inputs, self._calls), device)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


# --------------------------------------------------------------------------------------------------
# Numbers of layers, ports, gradients
# --------------------------------------------------------------------------------------------------


def _blocks(plan: Plan) -> tuple[str, ...]:
    if len(plan.stacks) != 1:
        raise ParallelError(
            "a pipeline goes through one stack of blocks",
            where="parallel.pp",
            expected="one list of blocks through which hidden states flow",
            found=f"{len(plan.stacks)} of them",
            fix="set parallel.pp=1",
        )
    return plan.stacks[0]


def _layers(graph: nn.Module, plan: Plan, ranks: int, schedule: str) -> list[int]:
    blocks, stages = plan.stacks[0], 2 * ranks if schedule == "interleaved" else ranks
    costs = layer_costs(graph, plan)
    return balanced([float(costs[block]) for block in blocks], stages, last=costs["last"])


def _stages_of_a_rank(counts: Sequence[int], blocks: int, ranks: int) -> int:
    if sum(counts) != blocks or len(counts) % ranks or min(counts) < 1:
        raise ParallelError(
            "these numbers of layers do not fit",
            where="parallel.layers",
            expected=f"a multiple of {ranks} positive numbers that add up to {blocks}",
            found=list(counts),
            fix="leave parallel.layers out for a balanced split",
        )
    return len(counts) // ranks


def _port(graph: Graph, element: type) -> str:
    ports = graph.output_ports.items()
    return next(n for n, p in ports if isinstance(p.type, NeuralType) and isinstance(p.type.element, element))


def _value(result: Any, name: str) -> Tensor:
    value: Tensor = result[name] if isinstance(result, dict) else getattr(result, name)
    return value


def _exchange_gradients(view: nn.Module, *, now: bool) -> None:
    """Sum gradients over data-parallel ranks after the last micro-batch, and not before."""
    if isinstance(view, FSDPModule):
        gradient_sync(view, now)
        view.set_is_last_backward(now)
        view.set_reshard_after_backward(now)
