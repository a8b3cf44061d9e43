"""Cutting a graph into the stages of a pipeline.

A stage is the same graph with parts missing: blocks of other stages let hidden states through, and what comes before
the first block or after the last one is there only where it runs. Names of modules and parameters stay as they are,
so plans, optimizers and checkpoints need not know of stages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nemolet.errors import ParallelError
from nemolet.graph import Graph
from nemolet.module import NeuralModule
from nemolet.nn.transformer import Stack
from nemolet.parallel.layout import Boundary, ModulePlan, sequence_ports
from nemolet.parallel.plan import Plan
from nemolet.steps import Step

_ENTRY, _EXIT = ("position", "input_norm", "input_proj"), ("norm",)  # of a Stack, around its blocks


class Through(nn.Module):
    """A block that lies on another stage."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Let it through."""
        return hidden


class Absent(nn.Module):
    """A module that lies on another stage, before or after the blocks.

    Args:
        step: how the graph calls it.
    """

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.outputs, self.single = tuple(step.results), step.single

    def forward(self, **inputs: Any) -> dict[str, None] | None:
        """Nothing at each output."""
        return None if self.single else dict.fromkeys(self.outputs)


class Stage:
    """One stage of a pipeline, that can be called (final).

    Args:
        graph: the whole graph.
        blocks: full names of its blocks, in order.
        own: which of them are on this stage.
        first: whether what comes before the blocks is here.
        last: whether what comes after them is here.
        index: number of the stage.

    Raises:
        ParallelError: for a graph that cannot be cut between its blocks.
    """

    def __init__(
        self, graph: nn.Module, blocks: Sequence[str], own: range, *, first: bool, last: bool, index: int = 0
    ) -> None:
        self.first, self.last, self.index = first, last, index
        self.blocks = [blocks[number] for number in own]
        self.view = cut_graph(graph, blocks, set(own), first=first, last=last)
        self._inner: Callable[..., Any] = self.view.forward
        self._received: Tensor | None = None
        self._left: Tensor | None = None
        owner = self.view.get_submodule(blocks[0].rpartition(".")[0].rpartition(".")[0])
        assert isinstance(owner, NeuralModule)
        self._port = sequence_ports(owner.input_ports)[0]
        self._place = owner.declared().order.index(self._port)
        owner.register_forward_pre_hook(self._enter, with_kwargs=True)
        owner.register_forward_hook(self._leave)
        self.view.forward = self._run

    def __call__(
        self, received: Tensor | None, batch: Mapping[str, Any], call: Callable[..., Any] | None = None
    ) -> Any:
        """What leaves this stage: hidden states, or on the last stage what the graph returns.

        Args:
            received: hidden states of the stage before; None on the first.
            batch: the inputs of the graph, on every stage.
            call: what runs instead of the graph, between the hooks of this stage; another graph of the same modules.
        """
        return self.view(received=received, call=call, inputs=dict(batch))

    def _run(self, received: Tensor | None, call: Callable[..., Any] | None, inputs: dict[str, Any]) -> Any:
        self._received = received
        result = (call or self._inner)(**inputs)
        left, self._received, self._left = self._left, None, None
        return result if self.last else left

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.first:
            return args, kwargs
        if self._place < len(args):
            return (*args[: self._place], self._received, *args[self._place + 1 :]), kwargs
        return args, {**kwargs, self._port: self._received}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.last:
            self._left = output

    def also(self, other: Graph) -> Callable[..., Any]:
        """Another graph of the same modules, such as one that also measures, cut like this one."""
        cut: Graph = shallow(other)
        for step in other.steps:
            if step.name in self.view._modules:
                cut._modules[step.name] = self.view._modules[step.name]
            elif not self.last:
                cut._modules[step.name] = Absent(step)
        return cut.forward


def cut_graph(graph: nn.Module, blocks: Sequence[str], own: set[int], *, first: bool, last: bool) -> nn.Module:
    """The same graph without what lies on other stages; modules that stay are shared with it.

    Raises:
        ParallelError: where more than hidden states would have to cross between stages.
    """
    owner, _, name = blocks[0].rpartition(".")[0].rpartition(".")
    return _cut(graph, owner.split(".") if owner else [], name, own, first, last, "")


def _cut(
    module: nn.Module, path: Sequence[str], name: str, own: set[int], first: bool, last: bool, where: str
) -> nn.Module:
    cut: nn.Module = shallow(module)
    if not path:
        return _cut_stack(cut, name, own, first, last, where)
    if isinstance(module, Graph):
        for absent in _absent(module, path[0], first, last, innermost=len(path) == 1):
            cut._modules[absent.name] = Absent(absent)
    else:
        others = [
            key for key, child in module.named_children() if key != path[0] and any(True for _ in child.parameters())
        ]
        others += [key for key, _ in module.named_parameters(recurse=False)]
        if others:
            _refuse(
                where or type(module).__name__,
                "a graph, or a module around one",
                f"{', '.join(others)} beside {path[0]}",
                "wire them with symbols, so that it is known what comes before the blocks and what after",
            )
    inner = f"{where}.{path[0]}" if where else path[0]
    cut._modules[path[0]] = _cut(module.get_submodule(path[0]), path[1:], name, own, first, last, inner)
    return cut


def _cut_stack(cut: nn.Module, name: str, own: set[int], first: bool, last: bool, where: str) -> nn.Module:
    blocks = cut.get_submodule(name)
    shortened = shallow(blocks)
    for number, key in enumerate(blocks._modules):
        if number not in own:
            shortened._modules[key] = Through()
    cut._modules[name] = shortened
    others = {key for key, child in cut.named_children() if key != name and any(True for _ in child.parameters())}
    others |= {key for key, _ in cut.named_parameters(recurse=False)}
    if isinstance(cut, Stack):
        others -= {*_ENTRY, *_EXIT}
        for key in (() if first else _ENTRY) + (() if last else _EXIT):
            if key in cut._modules:
                cut._modules[key] = None
        cut.dropout = cut.dropout if first else 0.0
    if others:
        _refuse(
            where,
            "nothing beside the blocks that has parameters",
            ", ".join(sorted(others)),
            "put what comes before or after the blocks into modules of their own, and wire them in a graph",
        )
    return cut


def _absent(graph: Graph, child: str, first: bool, last: bool, *, innermost: bool) -> list[Step]:
    """The steps of a graph that a stage does not run."""
    at = [number for number, step in enumerate(graph.steps) if step.name == child]
    before: set[int] = set()
    waiting = list(at)
    while waiting:
        needed = {int(slot.partition(".")[0]) for slot in graph.steps[waiting.pop()].reads if "." in slot}
        waiting += needed - before
        before |= needed
    after = [number for number in range(len(graph.steps)) if number not in before and number not in at]
    crossing = [
        f"{graph.steps[int(slot.partition('.')[0])].name} -> {graph.steps[number].name}"
        for number in after
        for slot in graph.steps[number].reads
        if "." in slot and int(slot.partition(".")[0]) in before
    ]
    twice = {graph.steps[n].name for n in before} & {graph.steps[n].name for n in after}
    into = [slot for n in at for port, slot in graph.steps[n].arguments.items() if "." in str(slot)]
    if len(at) > 1 or crossing or twice or (not innermost and into) or len(into) > 1:
        _refuse(
            graph.label,
            "one path of hidden states through the blocks",
            "; ".join([*crossing, *twice, *into]) or f"{child} is called {len(at)} times",
            "set parallel.pp=1",
        )
    missing = (set() if first else before) | (set() if last else set(after))
    return [graph.steps[number] for number in sorted(missing)]


def _refuse(where: str, expected: str, found: str, fix: str) -> None:
    raise ParallelError(
        "this cannot be cut into the stages of a pipeline", where=where, expected=expected, found=found, fix=fix
    )


def shallow(module: nn.Module) -> Any:
    """A module of its own that shares everything inside with another one."""
    twin = copy.copy(module)
    for name, value in list(twin.__dict__.items()):
        if isinstance(value, dict) and name.startswith("_") and name != "_init_arguments":
            twin.__dict__[name] = value.copy()
    return twin


def plan_of_stage(plan: Plan, stage: Stage) -> Plan:
    """The part of a plan that is about one stage.

    A tied parameter goes by the name it has there. Hidden states cross between stages whole along T, so the blocks of a
    stage split and join them like a stack of their own.
    """
    view = stage.view
    names = {name for name, module in view.named_modules() if not isinstance(module, (Through, Absent))}
    held = dict(view.named_parameters())
    parameters = {
        alias: replace(each, name=alias)
        for name, each in plan.parameters.items()
        for alias in [next((n for n in (name, *each.tied) if n in held), None)]
        if alias is not None
    }
    modules = {name: each for name, each in plan.modules.items() if name in names}
    (blocks,) = plan.stacks
    if blocks[0] in plan.modules and plan.modules[blocks[0]].enter is Boundary.SPLIT:
        start, end = stage.blocks[0], stage.blocks[-1]
        modules[start] = replace(modules.get(start, ModulePlan()), enter=Boundary.SPLIT)
        modules[end] = replace(modules.get(end, ModulePlan()), leave=Boundary.JOIN)
    units = tuple(unit for unit in plan.units if unit in names)
    return replace(plan, parameters=parameters, modules=modules, units=units, stacks=(tuple(stage.blocks),))
