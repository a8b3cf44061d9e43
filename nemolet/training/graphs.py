"""The graph that is trained: a model and its loss."""

from __future__ import annotations

from nemolet.graph import Graph, compose
from nemolet.module import NeuralModule


def training_graph(model: NeuralModule, loss: NeuralModule) -> Graph:
    """The model followed by its loss; inputs of the model and labels become inputs of the graph."""
    optional = {f"model.{name}": name for name, port in model.input_ports.items() if port.optional and name != "mask"}
    return compose({"model": model, "loss": loss}, wires=optional)
