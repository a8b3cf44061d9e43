"""What else a pipeline is used for: packed and ragged batches, validation, generation; and what it refuses."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

import nemolet as nl
from nemolet.errors import ParallelError
from nemolet.language.decoding import generate
from nemolet.metrics import Share
from nemolet.parallel import MeshSizes, make_mesh
from nemolet.parallel.pipeline import Piped, Pipeline
from nemolet.parallel.plan import plan
from nemolet.sampling import Sampling
from nemolet.tokenizers.simple import ByteTokenizer
from nemolet.training.graphs import training_graph
from nemolet.types import LabelsBT, LogitsBTV


class Accuracy(nl.NeuralModule):
    """How often the most probable token is the right one."""

    def forward(self, logits: LogitsBTV, labels: LabelsBT) -> Share:
        right = (logits.argmax(-1) == labels) & (labels >= 0)
        return Share(right.sum().float(), (labels >= 0).sum())


def build(**options):
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=257, layers=4, width=16, heads=2, context=24, **options)
    loss = nl.language.CrossEntropy()
    return training_graph(model, loss), training_graph(model, loss, {"accuracy": Accuracy()})


def batches():
    """Micro-batches of different lengths and rows; one is packed, one is not."""
    numbers = torch.Generator().manual_seed(3)

    def tokens(*shape):
        return torch.randint(257, shape, generator=numbers)

    packed = {"tokens": tokens(2, 12), "labels": tokens(2, 12)}
    packed["segments"] = torch.tensor([[1] * 5 + [2] * 7, [1] * 12])
    packed["positions"] = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    packed["labels"][0, 4] = -100
    return [
        packed,
        {"tokens": tokens(3, 7), "labels": tokens(3, 7)},
        {"tokens": tokens(1, 12), "labels": tokens(1, 12)},
    ]


def step_alone():
    graph, evaluation = build()
    total = torch.zeros(2)
    for batch in batches():
        loss, count = graph(**batch)
        loss.backward()
        total += torch.stack((loss.detach(), count.float()))
    values = {k: float(v) for k, v in evaluation(**batches()[0]).items()}
    return total, {n: p.grad for n, p in graph.named_parameters()}, values


def step_piped(sizes, schedule):

    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    graph, evaluation = build()
    layout = plan(evaluation, sizes=mesh.sizes)
    own = {name for name, _ in graph.named_modules()}
    layout = dataclasses.replace(layout, modules={n: m for n, m in layout.modules.items() if n in own})
    pipeline = Pipeline(graph, layout, mesh, evaluation=evaluation, schedule=schedule, microbatches=1)
    for _ in range(2):  # the second time every form is known
        pipeline.graph.zero_grad()
        total = torch.stack(pipeline.step(batches()))
    values = {k: float(v) for k, v in pipeline.evaluate(batches()[0]).items()}
    return total, {n: p.grad for n, p in pipeline.graph.named_parameters()}, values


@pytest.mark.parametrize(
    ("sizes", "schedule"), [({"pp": 2}, "1f1b"), ({"pp": 2}, "interleaved"), ({"pp": 4}, "gpipe")], ids=str
)
def test_packed_and_ragged_batches_and_validation(ranks, sizes, schedule):
    total, grads, values = step_alone()
    for found, theirs, measured in ranks(sizes["pp"], step_piped, sizes, schedule):
        torch.testing.assert_close(found, total)
        assert measured == pytest.approx(values)
        for name, grad in theirs.items():
            name = name.replace("head.weight", "embed.weight")
            torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-5 * grads[name].abs().max().item())


PROMPTS = ["the rain", "in spain stays"]


def generate_piped(sizes):
    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    graph, _ = build()
    pipeline = Pipeline(graph, plan(graph, sizes=mesh.sizes), mesh)
    sampling = Sampling(temperature=0.8)
    made = generate(Piped(pipeline), ByteTokenizer(), PROMPTS, max_new_tokens=6, sampling=sampling, seed=1)
    return [each.text for each in made]


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"pp": 2, "dp_shard": 2}], ids=str)
def test_generation_goes_through_the_stages(ranks, sizes):
    graph, _ = build()
    sampling = Sampling(temperature=0.8)
    made = generate(graph.model, ByteTokenizer(), PROMPTS, max_new_tokens=6, sampling=sampling, seed=1)
    for texts in ranks(2 * sizes.get("dp_shard", 1), generate_piped, sizes):
        assert texts == [each.text for each in made]


class Gate(nl.NeuralModule):
    """A block of a user's own."""

    def __init__(self, *, width: int) -> None:
        super().__init__(D=width)
        self.norm, self.proj = nl.nn.RMSNorm("D", width), nl.nn.Linear("D", "D", width, width)

    def forward(self, hidden: nl.HiddenBTD) -> nl.HiddenBTD:
        return hidden + self.proj(self.norm(hidden)).sigmoid()


class Gates(nl.NeuralModule):
    """A stack of a user's own, without anything beside its blocks."""

    def __init__(self, *, width: int, layers: int) -> None:
        super().__init__(D=width)
        self.gates = torch.nn.ModuleList(Gate(width=width) for _ in range(layers))

    def forward(self, hidden: nl.HiddenBTD) -> nl.HiddenBTD:
        for gate in self.gates:
            hidden = gate(hidden)
        return hidden


def build_own():
    torch.manual_seed(0)
    embed, head = nl.nn.Embedding("V", "D", 257, 8), nl.nn.Head("D", "V", 8, 257)
    norm, gates = nl.nn.LayerNorm("D", 8), Gates(width=8, layers=3)
    model = nl.Graph(head(norm(gates(embed(nl.Input(nl.TokenIdsBT, "tokens"))))))
    return training_graph(model, nl.language.CrossEntropy())


def step_own(sizes):
    if sizes is None:
        graph = build_own()
        loss, count = graph(**batches()[1])
        loss.backward()
        return torch.stack((loss.detach(), count)), {n: p.grad for n, p in graph.named_parameters()}
    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    graph = build_own()
    pipeline = Pipeline(graph, plan(graph, sizes=mesh.sizes), mesh, microbatches=3, layers=[2, 1])
    total = torch.stack(pipeline.step(batches()[1:2]))
    return total, {n: p.grad for n, p in pipeline.graph.named_parameters()}


def test_a_model_of_ones_own_is_cut_between_its_blocks(ranks):
    total, grads = step_own(None)
    results = ranks(2, step_own, {"pp": 2})
    assert {name for _, theirs in results for name in theirs} == set(grads)
    assert not set(results[0][1]) & set(results[1][1])
    for found, theirs in results:
        torch.testing.assert_close(found, total)
        for name, grad in theirs.items():
            torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-6)


class Crossing(nl.NeuralModule):
    """A head that also wants what was embedded."""

    def __init__(self, *, width: int, vocab: int) -> None:
        super().__init__(D=width, V=vocab)
        self.head = nl.nn.Head("D", "V", width, vocab)

    def forward(self, hidden: nl.HiddenBTD, first: nl.HiddenBTD) -> LogitsBTV:
        return self.head(hidden + first)


class OneModule(nl.NeuralModule):
    """A model whose parts nobody wired."""

    def __init__(self) -> None:
        super().__init__(V=9)
        self.embed, self.head = nl.nn.Embedding("V", "D", 9, 8), nl.nn.Head("D", "V", 8, 9)
        self.decoder = nl.nn.Decoder(layers=2, width=8, heads=2)

    def forward(self, tokens: nl.TokenIdsBT) -> LogitsBTV:
        return self.head(self.decoder(self.embed(tokens)))


def refuse(kind, options):
    if kind == "crossing":
        embed, decoder = nl.nn.Embedding("V", "D", 9, 8), nl.nn.Decoder(layers=2, width=8, heads=2)
        hidden = embed(nl.Input(nl.TokenIdsBT, "tokens"))
        model = nl.Graph(Crossing(width=8, vocab=9)(hidden=decoder(hidden), first=hidden))
    elif kind == "one module":
        model = OneModule()
    else:
        model = nl.language.CausalLM(vocab_size=9, layers=2, width=8, heads=2, context=8)
    mesh = make_mesh(MeshSizes(pp=dist.get_world_size()), "cpu")
    graph = training_graph(model, nl.language.CrossEntropy())
    Pipeline(graph, plan(graph, sizes=mesh.sizes), mesh, **options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("crossing", {}, r"cannot be cut into the stages(.|\n)*embedding -> crossing"),
        ("one module", {}, r"model: this cannot be cut into the stages(.|\n)*embed, head beside decoder"),
        ("usual", {"layers": [1, 2]}, r"parallel.layers: these numbers of layers do not fit(.|\n)*add up to 2"),
        ("usual", {"schedule": "interleaved"}, r"parallel.pp: there are fewer layers than stages"),
        ("usual", {"schedule": "1f2b"}, r"parallel.schedule: there is no such schedule(.|\n)*did you mean '1f1b'"),
    ],
)
def test_what_cannot_be_a_pipeline_is_refused(ranks, kind, options, message):
    with pytest.raises(ParallelError, match=message):
        ranks(2, refuse, kind, options)
