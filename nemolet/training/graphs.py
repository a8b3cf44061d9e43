"""The graphs of a run: a model and its loss, and beside them what is measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from nemolet.comparison import Outcome, compare
from nemolet.errors import WiringError
from nemolet.graph import Graph, compose
from nemolet.module import NeuralModule
from nemolet.types import Index, Mask, NeuralType


def training_graph(
    model: NeuralModule,
    loss: NeuralModule,
    metrics: Mapping[str, NeuralModule] | None = None,
    fields: Collection[str] = (),
) -> Graph:
    """The model followed by its loss; inputs of the model and labels become inputs of the graph.

    Args:
        model: what is trained.
        loss: ends in a sum and a count.
        metrics: modules that see what the loss sees and end in a part and a whole, by name.
        fields: entries of the batches, where they are known; a mask is an input where it is among them.

    Returns:
        A graph with the outputs ``loss`` and ``count``, and for each metric ``<name>_part`` and ``<name>_whole``.

    Raises:
        WiringError: for parts that do not fit.
    """
    optional = [name for name, port in model.input_ports.items() if port.optional]
    wires = {f"model.{name}": name for name in optional if name != "mask" or name in fields}
    outputs: dict[str, str] = {}
    for name, metric in (metrics or {}).items():
        wires |= _metric_wires(model, name, metric, fields)
        outputs |= {f"{name}_{port}": f"{name}.{port}" for port in metric.output_ports}
    parts = {"model": model, "loss": loss, **(metrics or {})}
    graph = compose(parts, wires=wires, outputs={**{p: f"loss.{p}" for p in loss.output_ports}, **outputs})
    if "model" not in dict(graph.named_children()):
        raise WiringError(
            "nothing of the model flows into the loss",
            where="loss",
            expected=", ".join(f"{name}: {port.type}" for name, port in loss.input_ports.items()),
            found=", ".join(f"{name}: {port.type}" for name, port in model.output_ports.items()),
            fix="choose another loss=..., one for such a model",
        )
    return graph


def refuse_other_types(graph: NeuralModule, data: Any) -> None:
    """Refuse data that says of its tensors that they are not what a graph takes, such as audio of another rate.

    Args:
        graph: whose inputs have the names of the data's ``ports``.
        data: settings, or data that is prepared; without ``ports`` it says nothing.

    Raises:
        WiringError: naming the input with both types.
    """
    for name, given in getattr(data, "ports", {}).items():
        port = graph.input_ports.get(name)
        if port is None or compare(port.type, given) in (Outcome.SAME, Outcome.GREATER):
            continue
        raise WiringError(
            "the model takes other data",
            where=f"data, {name}",
            expected=str(port.type),
            found=str(given),
            fix="set data.sample_rate to the model's" if name == "audio" else None,
        )


def example_batch(graph: NeuralModule, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """A batch of shapes alone, made from the types of the required inputs.

    Args:
        graph: whose inputs are looked at.
        sizes: of axes that the types leave open, by letter; what is not given is 1.

    Example:
        >>> import nemolet as nl
        >>> batch = example_batch(nl.nn.Embedding("V", "D", 10, 4), {"B": 2, "T": 3})
        >>> batch["tokens"].shape, batch["tokens"].dtype
        (torch.Size([2, 3]), torch.int64)
    """
    batch = {}
    for name, port in graph.input_ports.items():
        if port.optional or not isinstance(port.type, NeuralType):
            continue
        element = port.type.element
        dtype = torch.long if isinstance(element, Index) else torch.bool if isinstance(element, Mask) else torch.float
        shape = [axis.size or sizes.get(axis.letter, 1) for axis in port.type.axes]
        batch[name] = torch.empty(shape, dtype=dtype, device="meta")
    return batch


def _metric_wires(model: NeuralModule, name: str, metric: NeuralModule, fields: Collection[str]) -> dict[str, str]:
    """A metric's ports take the outputs of the model that fit them, and otherwise inputs of the graph."""
    if [*metric.output_ports] != ["part", "whole"]:
        raise WiringError(
            "a metric ends in a part and a whole",
            where=f"metrics.{name}",
            expected="a module that returns nemolet.metrics.Share",
            found=", ".join(metric.output_ports),
        )
    wires = {}
    for port in metric.input_ports.values():
        fitting = [o for o, output in model.output_ports.items() if compare(port.type, output.type).flows]
        same = [o for o in fitting if o == port.name]
        if len(same or fitting) > 1:
            raise WiringError(
                "several outputs of the model fit this port",
                where=f"metrics.{name}.{port.name}",
                expected=f"one output of type {port.type}",
                found=", ".join(fitting),
                fix="name the port after one of them",
            )
        if not fitting and fields and port.name not in fields and not port.optional:
            given = [f"{output}: {model.output_ports[output].type}" for output in model.output_ports]
            raise WiringError(
                "nothing gives what this metric reads",
                where=f"metrics.{name}.{port.name}",
                expected=str(port.type),
                found=", ".join([*given, *fields]),
                fix=f"leave metrics.{name} out",
            )
        wires[f"{name}.{port.name}"] = f"model.{(same or fitting)[0]}" if fitting else port.name
    return wires
