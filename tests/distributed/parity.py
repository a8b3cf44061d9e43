"""Models, batches and a training loop that every layout is compared with one rank on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import nemolet as nl
from nemolet.nn.block import ResidualOptions
from nemolet.parallel import MeshSizes, Rules, make_mesh, parallelize
from nemolet.parallel.apply import gradient_sync
from nemolet.parallel.context import own_context
from nemolet.parallel.exchange import Group
from nemolet.parallel.gradients import local
from nemolet.parallel.plan import plan
from nemolet.training.graphs import training_graph
from nemolet.types import Hidden, HiddenBTD, NeuralType

LENGTH, ROWS, STEPS, ACCUMULATE = 8, 8, 3, 2
TINY: dict[str, Any] = {"vocab_size": 33, "layers": 2, "width": 16, "heads": 4, "context": 16}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"norm": "layer", "gated": False, "bias": True, "position": "learned", "activation": "gelu"},
    "llama": {"kv_heads": 2, "tied": False, "qk_norm": True},
    "multi_query": {"kv_heads": 1, "tied": False},
    "padded": {"kv_heads": 2, "pad_vocab_to": 16, "softcap": 5.0},
}


class Trained(NamedTuple):
    """What a layout has to agree in: losses by step, gradients by step and name, weights at the end."""

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


class Mixer(nl.NeuralModule):
    """A block of a user: the residual inside, a norm, biases, and a scale of features that are cut."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(D=width)
        self.norm = nl.nn.LayerNorm("D", width)
        self.up = nl.nn.Linear("D", "F", width, inner, bias=True)
        self.scale = Scale(inner)
        self.down = nl.nn.Linear("F", "D", inner, width, bias=True)

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return hidden + 0.5 * self.down(self.scale(self.up(self.norm(hidden)).sigmoid()))


class Scale(nl.NeuralModule):
    """A factor for each feature."""

    def __init__(self, inner: int) -> None:
        super().__init__(F=inner)
        self.weight = nn.Parameter(torch.linspace(0.5, 2, inner))
        self.declare_axes(weight="F")

    def forward(
        self, wide: Annotated[Tensor, NeuralType("... F", Hidden())]
    ) -> Annotated[Tensor, NeuralType("... F", Hidden())]:
        return wide * self.weight


class Across(nl.NeuralModule):
    """A block that looks at all positions, so it has to stay whole."""

    def __init__(self, width: int) -> None:
        super().__init__(D=width)
        self.weight = nn.Parameter(torch.linspace(0.1, 0.2, width))
        self.declare_axes(weight="D")

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return hidden + hidden.cumsum(1) * self.weight


class Stack(nl.NeuralModule):
    """Blocks of a user, one after another."""

    def __init__(self, *blocks: nn.Module, width: int) -> None:
        super().__init__(D=width)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def build_users() -> nn.Module:
    """A graph of modules that nemolet does not know."""
    embed = nl.nn.Embedding("V", "D", TINY["vocab_size"], 16, init_std=0.5)
    stack = Stack(Mixer(16, 24), Across(16), Mixer(16, 8), width=16)
    head = nl.nn.Head("D", "V", 16, TINY["vocab_size"], init_std=0.2)
    parts = {"embed": embed, "stack": stack, "head": head, "loss": nl.language.CrossEntropy()}
    return nl.compose(parts, wires={"loss.logits": "head.output"})


def build_with_memory() -> nn.Module:
    """An encoder, and a decoder that attends to what it made; with much of what else there is."""
    size = {"layers": 1, "width": 16, "heads": 4, "kv_heads": 2, "ffn": 32, "bias": True}
    embed = nl.nn.Embedding("V", "D", TINY["vocab_size"], 16, init_std=0.5)
    encoder = nl.nn.Encoder(**size, norm="layer", residual=ResidualOptions(order="post"), position="relative")
    decoder = nl.nn.Decoder(**size, cross=True, residual=ResidualOptions(order="sandwich"))
    head, loss = nl.nn.Head("D", "V", tied=embed, bias=True), nl.language.CrossEntropy()
    tokens, labels = nl.Input(nl.TokenIdsBT, "tokens"), nl.Input(nl.LabelsBT, "labels")
    hidden = embed(tokens)
    scores = head(decoder(hidden, memory=encoder(hidden)))
    return nl.Graph(loss(logits=scores, labels=labels))


def build(name: str, **changes: Any) -> nn.Module:
    """The training graph of a model, the same wherever it is built."""
    torch.manual_seed(1)
    if name in ("users", "memory"):
        return build_users() if name == "users" else build_with_memory()
    model = nl.language.CausalLM(**{**TINY, **MODELS[name], **changes})
    return training_graph(model, nl.language.CrossEntropy(label_smoothing=0.1, z_loss=1e-3))


def windows() -> Iterator[list[dict[str, Tensor]]]:
    """For each step some micro-batches, in which rows count differently many tokens."""
    numbers = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        window = []
        for _ in range(ACCUMULATE):
            tokens = torch.randint(0, TINY["vocab_size"], (ROWS, LENGTH), generator=numbers)
            labels = tokens.roll(-1, 1)
            keep = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=numbers)
            labels = labels.masked_fill(torch.arange(LENGTH) >= keep, -100)
            window.append({"tokens": tokens, "labels": labels})
        yield window


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, wherever its parts lie."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(graph: nn.Module, data_rank: int = 0, data_ranks: int = 1, context: Group | None = None) -> Trained:
    """A few steps of AdamW, each over several micro-batches, divided by all tokens that count.

    The ranks of ``context`` share each sequence.
    """
    cut = dist.get_rank(context) if context is not None else 0
    parameters = {name: p for name, p in graph.named_parameters() if p.requires_grad}
    # Each number is updated by itself, so every rank updates its parts; eps is large, so that rounding stays small.
    parts = {name: local(p).detach() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(list(parts.values()), lr=1e-2, eps=1e-3, foreach=True)
    losses, gradients = [], []
    for window in windows():
        total = torch.zeros(2)
        for index, micro in enumerate(window):
            gradient_sync(graph, index == len(window) - 1)
            share = {name: value.chunk(data_ranks)[data_rank] for name, value in micro.items()}
            if context is not None:
                share = own_context(share, graph.input_ports, context)
            loss, count = graph(**share)
            loss.backward()
            total += torch.stack((loss.detach(), count.detach().float()))
        if data_ranks > 1 or context is not None:
            total = _over_data(total, (data_rank, cut))
        losses.append((total[0] / total[1]).item())
        gradients.append({})
        for name, parameter in parameters.items():
            parts[name].grad = local(parameter.grad).div_(total[1].item())
            gradients[-1][name] = whole(parameter.grad)
            parameter.grad = None
        optimizer.step()
    return Trained(losses, gradients, {name: whole(p) for name, p in parameters.items()})


def _over_data(total: Tensor, part: tuple[int, int]) -> Tensor:
    """The sum over shares of the data, of which several ranks may read the same."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (part, total))
    return torch.stack(list(dict(parts).values())).sum(0)


def on_mesh(name: str, sizes: dict[str, int], changes: dict[str, Any] | None = None, **options: Any) -> Trained:
    """Train a model in a layout; runs on every rank."""
    rules = Rules.of(options.pop("rules", None))
    planning = {key: options.pop(key) for key in ("overrides", "kv_heads") if key in options}
    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    graph = build(name, **(changes or {}))
    parallelize(graph, plan(graph, rules, mesh.sizes, **planning), mesh, **options)
    context = mesh.axis("cp").get_group() if mesh.sizes.cp > 1 else None
    return train(graph, mesh.data_rank, mesh.data_ranks, context)


MEASURED: dict[str, tuple[float, float]] = {}  # by test: the largest relative error of a loss, and of a gradient


def assert_same(found: Trained, expected: Trained, tolerance: float = 1e-5) -> None:
    """Losses and every gradient agree; norms of gradients one by one, which shows double counting."""
    assert found.weights.keys() == expected.weights.keys()
    off = max(abs(ours / theirs - 1) for ours, theirs in zip(found.losses, expected.losses))
    worst = 0.0
    for step, (ours, theirs) in enumerate(zip(found.gradients, expected.gradients)):
        for name, gradient in theirs.items():
            ratio = ours[name].norm() / gradient.norm()
            assert abs(ratio.item() - 1) < 1e-4, f"step {step}: the gradient of {name} is {ratio:.5f} times too large"
            error = ((ours[name] - gradient).abs().max() / gradient.abs().max()).item()
            assert error < tolerance, f"step {step}: {name} differs by {error:.1e}"
            worst = max(worst, error)
    assert off < tolerance, f"the loss differs by {off:.1e}"
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0].rpartition("/")[2]
    before = MEASURED.get(test, (0.0, 0.0))
    MEASURED[test] = (max(off, before[0]), max(worst, before[1]))
