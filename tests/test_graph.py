"""Graphs: running, nesting, composing from plain data, writing that data again, compiling."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Annotated, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import nemolet as nl
from nemolet.errors import WiringError
from nemolet.graph import Graph, compose
from nemolet.module import NeuralModule
from nemolet.symbols import Input
from nemolet.types import (
    HiddenBTD,
    HiddenRestD,
    Index,
    LabelsBT,
    LogitsBTV,
    MaskBT,
    NeuralType,
    TokenIdsBT,
)

IndexBT = Annotated[Tensor, NeuralType("B T", Index())]


class Embed(NeuralModule):
    def __init__(self, vocab: int = 5, width: int = 4) -> None:
        super().__init__(V=vocab, D=width)
        self.weight = nn.Parameter(torch.arange(float(vocab * width)).view(vocab, width))
        self.declare_axes(weight="V D")

    def forward(self, tokens: TokenIdsBT) -> HiddenBTD:
        return self.weight[tokens]


class Scale(NeuralModule):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, hidden: HiddenRestD, mask: MaskBT | None = None, power: int = 1) -> HiddenRestD:
        hidden = hidden * self.by**power
        return hidden if mask is None else hidden * mask[..., None]


class Twins(NamedTuple):
    hidden: HiddenBTD
    minus: HiddenBTD


class Split(NeuralModule):
    def forward(self, hidden: HiddenBTD) -> Twins:
        return Twins(hidden, -hidden)


class Add(NeuralModule):
    def forward(self, parts: list[HiddenBTD]) -> HiddenBTD:
        return torch.stack(parts).sum(0)


class Weigh(NeuralModule):
    def forward(self, streams: dict[str, HiddenBTD]) -> HiddenBTD:
        return streams["a"] + 10 * streams["b"]


class Head(NeuralModule):
    def __init__(self, vocab: int = 5) -> None:
        super().__init__(V=vocab)

    def forward(self, hidden: HiddenBTD) -> LogitsBTV:
        return hidden.sum(-1, keepdim=True).expand(*hidden.shape[:-1], 5)


class Sums(NamedTuple):
    loss: nl.LossScalar
    count: nl.CountScalar


class Loss(NeuralModule):
    def forward(self, logits: LogitsBTV, labels: LabelsBT) -> Sums:
        return Sums(logits.gather(-1, labels[..., None]).sum(), torch.tensor(labels.numel()))


class Count(NeuralModule):
    def forward(self, tokens: IndexBT) -> IndexBT:
        return tokens + 1


TOKENS = torch.tensor([[0, 3, 1], [4, 4, 2]])
LABELS = torch.tensor([[1, 0, 2], [3, 4, 4]])


def tokens():
    return Input(TokenIdsBT, "tokens")


def same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------


def test_a_graph_computes_what_its_modules_compute():
    embed, scale = Embed(), Scale(3.0)
    graph = Graph(scale(embed(tokens())))
    same(graph(TOKENS), scale(embed(TOKENS)))
    same(graph(tokens=TOKENS), graph(TOKENS))


def test_one_output_is_a_tensor_several_a_dictionary_and_a_whole_record_itself():
    split, x = Split(), Input(HiddenBTD, "x")
    hidden = torch.ones(1, 2, 3)
    assert isinstance(Graph(split(x).minus)(hidden), Tensor)
    assert isinstance(Graph(split(x))(hidden), Twins)
    twins = split(x)
    both = Graph(plus=twins.hidden, minus=twins.minus)
    assert set(both(hidden)) == {"plus", "minus"}
    same(both(hidden)["minus"], -hidden)


def test_outputs_with_one_name_are_told_apart_by_module():
    first, second, x = Scale(2.0), Scale(3.0), Input(HiddenBTD, "x")
    first.label, second.label = "first", "second"
    graph = Graph(first(x), second(x))
    assert list(graph.output_ports) == ["output", "second_output"]


def test_a_module_called_twice_is_one_module():
    scale = Scale(2.0)
    graph = Graph(scale(scale(Embed()(tokens()))))
    assert [name for name, _ in graph.named_children()] == ["embed", "scale"]
    same(graph(TOKENS), 4 * Embed()(TOKENS))


def test_two_modules_of_one_class_have_two_names():
    graph = Graph(Scale(2.0)(Scale(3.0)(Embed()(tokens()))))
    assert [name for name, _ in graph.named_children()] == ["embed", "scale", "scale_2"]
    assert [graph.scale.by, graph.scale_2.by] == [3.0, 2.0]


def test_given_names_are_kept():
    embed = Embed()
    graph = Graph(embed(tokens()), names={"table": embed})
    assert list(graph.state_dict()) == ["table.weight"]
    assert embed.label == "table"


def test_lists_and_dictionaries_of_wires():
    embed, split = Embed(), Split()
    twins = split(embed(x := tokens()))
    total = Add()([twins.hidden, twins.hidden, twins.minus])
    graph = Graph(total=total, weighed=Weigh()({"a": embed(x), "b": twins.minus}))
    same(graph(TOKENS)["total"], embed(TOKENS))
    same(graph(TOKENS)["weighed"], -9 * embed(TOKENS))


def test_optional_inputs_and_options():
    graph = Graph(Scale(2.0)(Embed()(tokens()), Input(MaskBT, "mask", optional=True)))
    assert graph.input_ports["mask"].optional
    plain = graph(TOKENS)
    same(graph(TOKENS, mask=torch.ones(2, 3, dtype=torch.bool)), plain)
    same(graph(TOKENS, mask=torch.zeros(2, 3, dtype=torch.bool)), 0 * plain)
    same(graph(TOKENS, power=2), 2 * plain)
    fixed = Graph(Scale(2.0)(Embed()(tokens()), power=3))
    same(fixed(TOKENS), 4 * plain)
    with pytest.raises(WiringError, match="no input 'power'"):
        fixed(TOKENS, power=2)


@pytest.mark.parametrize(
    ("call", "texts"),
    [
        (lambda g: g(), ["input 'tokens' is missing", "B T TokenIds", "pass tokens=..."]),
        (lambda g: g(TOKENS), ["input 'labels' is missing", "B T Labels"]),
        (lambda g: g(tokens=TOKENS, label=LABELS), ["no input 'label'", "did you mean 'labels'?"]),
        (lambda g: g(TOKENS, LABELS, LABELS), ["too many arguments"]),
        (lambda g: g(TOKENS, tokens=TOKENS, labels=LABELS), ["given twice"]),
    ],
)
def test_a_wrong_call_says_what_is_wrong(call, texts):
    graph = Graph(Loss()(labels=Input(LabelsBT, "labels"), logits=Head()(Embed()(tokens()))))
    assert list(graph.input_ports) == ["tokens", "labels"]
    with pytest.raises(WiringError) as caught:
        call(graph)
    for text in texts:
        assert text in str(caught.value)


def test_ports_carry_what_the_wires_imply():
    x = tokens()
    graph = Graph(Loss()(Head()(Scale(2.0)(Embed()(x))), Input(LabelsBT, "labels")))
    assert [str(port) for port in graph.input_ports.values()] == [
        "tokens: B T TokenIds(vocab=5)",
        "labels: B T Labels(vocab=5)",
    ]
    assert str(graph.type_of(x)) == "B T TokenIds(vocab=5)"
    assert graph.declared().record is Sums


def test_gradients_reach_every_parameter():
    graph = Graph(Loss()(Head()(Embed()(tokens())), Input(LabelsBT, "labels")))
    graph(TOKENS, LABELS).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in graph.parameters())


def test_containers_are_inputs_of_a_graph():
    graph = Graph(total=Add()(Input(list[HiddenBTD], "parts")), weighed=Weigh()(Input(dict[str, HiddenBTD], "streams")))
    one, two = torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)
    with nl.checked():
        found = graph(parts=[one, two, two], streams={"a": one, "b": two})
        with pytest.raises(nl.NemoletError, match="streams: the container differs"):
            graph(parts=[one], streams=[one])
    same(found["total"], 5 * one)
    same(found["weighed"], 21 * one)
    outer = Graph(Graph(Add()(Input(list[HiddenBTD], "parts")))([Embed()(tokens())]))
    assert str(outer.input_ports["tokens"].type) == "B T TokenIds(vocab=5)"


def test_letters_of_a_container_are_those_of_the_graph():
    graph = Graph(a=Add()(Input(list[HiddenBTD], "parts")), b=Scale(2.0)(Input(HiddenBTD, "x")))
    assert str(graph.input_ports["parts"].type.item.axes) == str(graph.output_ports["a"].type.axes)
    assert not {axis.letter for axis in graph.input_ports["x"].type.axes[:2]} & {
        axis.letter for axis in graph.output_ports["a"].type.axes
    }


class Watch(NeuralModule):
    """Makes a tensor, and notes which of those made before are still alive."""

    def __init__(self, made: list, alive: list) -> None:
        super().__init__()
        self.made, self.alive = made, alive

    def forward(self, hidden: HiddenRestD) -> HiddenRestD:
        self.alive.append(sum(each() is not None for each in self.made))
        result = hidden + 1
        self.made.append(weakref.ref(result))
        return result


def test_a_value_is_freed_after_its_last_use():
    made, alive = [], []
    layers = [Watch(made, alive) for _ in range(6)]
    x = Input(HiddenBTD, "x")
    end = layers[0](x)
    for layer in layers[1:]:
        end = layer(end)
    with torch.no_grad():
        result = Graph(end)(torch.zeros(1, 1, 2))
    assert alive == [0, 1, 1, 1, 1, 1]
    same(result, torch.full((1, 1, 2), 6.0))


def test_a_value_that_is_read_later_or_returned_is_kept():
    made, alive = [], []
    first, second, third = (Watch(made, alive) for _ in range(3))
    split = Split()
    start = first(Input(HiddenBTD, "x"))
    middle = second(start)
    graph = Graph(out=Add()([third(split(middle).minus), start]), middle=middle)
    for _ in range(2):
        made.clear()
        with torch.no_grad():
            result = graph(torch.zeros(1, 1, 2))
        same(result["out"], torch.zeros(1, 1, 2))
        same(result["middle"], torch.full((1, 1, 2), 2.0))
        assert [each() is not None for each in made] == [False, True, False]


# --------------------------------------------------------------------------------------------------
# Nesting
# --------------------------------------------------------------------------------------------------


def test_graphs_nest():
    inner = Graph(Scale(2.0)(Embed()(tokens())), names={})
    outer = Graph(Head()(Scale(0.5)(inner(Input(TokenIdsBT, "ids")))))
    assert [str(port) for port in outer.input_ports.values()] == ["ids: B T TokenIds(vocab=5)"]
    same(outer(TOKENS), Head()(Embed()(TOKENS)))
    assert list(outer.state_dict()) == ["graph.embed.weight"]


def test_a_nested_graph_with_several_outputs():
    split = Split()
    twins = split(Input(HiddenBTD, "x"))
    inner = Graph(plus=twins.hidden, minus=twins.minus)
    ends = inner(Embed()(tokens()))
    outer = Graph(Add()([ends["plus"], ends["plus"], ends["minus"]]))
    same(outer(TOKENS), Embed()(TOKENS))
    record = Graph(split(Input(HiddenBTD, "x")))(Embed()(tokens()))
    assert isinstance(record, Twins)
    same(Graph(record.minus)(TOKENS), -Embed()(TOKENS))


def test_a_size_inside_a_nested_graph_is_checked_outside():
    inner = Graph(Embed(vocab=5, width=4)(tokens()))
    with pytest.raises(WiringError, match=r"graph.output -> linear.hidden(.|\n)*D=8(.|\n)*D=4"):
        nl.nn.Linear("D", "D", 8, 8)(inner(tokens()))


def test_axes_that_are_one_inside_are_one_outside():
    inner = Graph(Loss()(Input(LogitsBTV, "logits"), Input(LabelsBT, "labels")))
    with pytest.raises(WiringError, match=r"V is 5 by head.output, but 7 by"):
        inner(Head(5)(Input(HiddenBTD)), Input(NeuralType("B T", nl.Labels(7)), "labels"))


def test_options_reach_nested_graphs():
    inner = Graph(Scale(2.0)(Input(HiddenBTD, "x")))
    outer = Graph(inner(Embed()(tokens())))
    same(outer(TOKENS, power=3), 8 * Embed()(TOKENS))


# --------------------------------------------------------------------------------------------------
# From plain data
# --------------------------------------------------------------------------------------------------


def test_composed_and_written_graphs_are_equal():
    modules = {"embed": Embed(), "scale": Scale(2.0), "head": Head(), "loss": Loss()}
    embed, scale, head, loss = modules.values()
    written = Graph(loss(head(scale(embed(tokens()))), Input(LabelsBT, "labels")), names=modules)
    composed = compose(modules)
    assert composed.input_ports == written.input_ports
    assert composed.output_ports == written.output_ports
    assert list(composed.state_dict()) == list(written.state_dict())
    same(composed(tokens=TOKENS, labels=LABELS), written(tokens=TOKENS, labels=LABELS))
    assert composed.config() == written.config()


def test_wires_choose_what_matching_would_not():
    modules = {"embed": Embed(), "a": Scale(2.0), "b": Scale(3.0), "add": Add()}
    wires = {"b.hidden": "embed.output", "add.parts": ["a.output", "b.output", "embed.output"]}
    graph = compose(modules, wires, outputs={"sum": "add.output", "half": "a.output"})
    same(graph(TOKENS)["sum"], 6 * Embed()(TOKENS))
    same(graph(TOKENS)["half"], 2 * Embed()(TOKENS))


def test_a_wire_may_lead_to_an_earlier_module():
    graph = compose({"head": Head(), "embed": Embed()}, {"head.hidden": "embed.output"})
    assert list(graph.input_ports) == ["tokens"]
    assert list(graph.output_ports) == ["output"]


def test_a_module_named_without_a_port_is_its_only_one():
    modules = {"embed": Embed(), "a": Scale(2.0), "b": Scale(3.0), "add": Add()}
    graph = compose(modules, {"b": "embed", "add": ["a", "b", "embed"]}, outputs={"sum": "add", "half": "a"})
    assert list(graph.input_ports) == ["tokens"]
    same(graph(TOKENS)["sum"], 6 * Embed()(TOKENS))
    same(graph(TOKENS)["half"], 2 * Embed()(TOKENS))
    assert list(compose(modules, {"b": "embed", "add": ["a", "b"]}, outputs=["add"]).output_ports) == ["output"]


def test_a_module_is_not_named_after_an_input():
    class Mask(NeuralModule):
        def forward(self, hidden: HiddenBTD, mask: MaskBT) -> HiddenBTD:
            return hidden * mask[..., None]

    graph = Graph(Mask()(Embed()(tokens()), Input(MaskBT, "mask")))
    assert list(dict(graph.named_children())) == ["embed", "mask_2"]
    assert recompose(graph, dict(graph.named_children())).config() == graph.config()


def test_outputs_nothing_uses_are_the_outputs():
    modules = {"embed": Embed(), "split": Split(), "scale": Scale(2.0)}
    graph = compose(modules, {"scale.hidden": "split.minus"})
    assert list(graph.output_ports) == ["hidden", "output"]
    graph = compose({"embed": Embed(), "split": Split()}, outputs=["split.minus", "embed.output"])
    assert list(graph.output_ports) == ["minus", "output"]


def test_one_of_several_that_fit_is_taken_by_its_name():
    graph = compose({"embed": Embed(), "split": Split(), "scale": Scale(2.0)})
    same(graph(TOKENS)["output"], 2 * Embed()(TOKENS))  # hidden, not minus


def test_dictionaries_of_wires_and_options():
    graph = compose(
        {"embed": Embed(), "scale": Scale(2.0), "weigh": Weigh()},
        {"weigh.streams": {"a": "embed.output", "b": "scale.output"}},
        options={"scale": {"power": 2}},
    )
    same(graph(TOKENS), 41 * Embed()(TOKENS))


def test_null_leaves_an_optional_port_open():
    modules = {"embed": Embed(), "a": Scale(2.0), "b": Scale(3.0)}
    wired = {"a.mask": "mask"}
    assert "mask" in compose(modules, wired).nodes[-1].wires  # found by its name
    assert "mask" not in compose(modules, {**wired, "b.mask": None}).nodes[-1].wires


def test_an_input_has_the_narrowest_type_it_flows_into():
    graph = compose({"count": Count(), "embed": Embed()}, {"count.tokens": "ids", "embed.tokens": "ids"})
    assert str(graph.input_ports["ids"].type) == "B T TokenIds(vocab=5)"


def test_an_input_is_needed_if_one_port_needs_it():
    class Need(NeuralModule):
        def forward(self, hidden: HiddenBTD, mask: MaskBT) -> HiddenBTD: ...

    wires = {"scale.mask": "mask", "need.mask": "mask"}
    graph = compose({"embed": Embed(), "scale": Scale(2.0), "need": Need()}, wires)
    assert not graph.input_ports["mask"].optional
    assert compose({"embed": Embed(), "scale": Scale(2.0)}, {"scale.mask": "m"}).input_ports["m"].optional


# --------------------------------------------------------------------------------------------------
# Writing the data again
# --------------------------------------------------------------------------------------------------


def recompose(graph: Graph, modules: dict[str, NeuralModule]) -> Graph:
    data = graph.config()
    return compose(modules, data["wires"], data["outputs"], data["options"])


def test_a_graph_is_composed_again_from_its_own_data():
    embed, first, second = Embed(), Scale(2.0), Scale(3.0)
    mask = Input(MaskBT, "mask", optional=True)
    x = Input(TokenIdsBT, "ids")
    hidden = second(first(embed(x), mask), power=2)  # the second leaves its mask open
    graph = Graph(both=Add()([hidden, Split()(hidden).hidden]), counted=Count()(x))
    again = recompose(graph, dict(graph.named_children()))
    assert again.config() == graph.config()
    assert again.input_ports == graph.input_ports
    assert again.output_ports == graph.output_ports
    half = torch.tensor([[True, False, True], [False, True, True]])
    same(again(ids=TOKENS, mask=half), graph(ids=TOKENS, mask=half))


def test_the_data_is_plain():
    config = Graph(Scale(2.0)(Embed()(tokens()), power=2)).config()
    assert config == {
        "_target_": "nemolet.graph.compose",
        "modules": {
            "embed": {"_target_": f"{__name__}.Embed", "vocab": 5, "width": 4},
            "scale": {"_target_": f"{__name__}.Scale", "by": 2.0},
        },
        "wires": {"embed.tokens": "tokens", "scale.hidden": "embed.output"},
        "outputs": {"output": "scale.output"},
        "options": {"scale": {"power": 2}},
    }


def test_two_calls_of_one_module_cannot_be_written():
    scale = Scale(2.0)
    with pytest.raises(WiringError, match="called twice"):
        Graph(scale(scale(Input(HiddenBTD)))).config()


def test_build_makes_the_graph_again():
    build = pytest.importorskip("nemolet.config").build
    embed = nl.nn.Embedding("V", "D", 10, 4)
    head = nl.nn.Head("D", "V", tied=embed)
    graph = Graph(head(nl.nn.Linear("D", "D", 4, 4)(embed(tokens()))))
    again = build(graph.config())
    assert isinstance(again, Graph)
    assert again.config() == graph.config()
    again.load_state_dict(graph.state_dict())
    same(again(TOKENS), graph(TOKENS))
    assert len(list(again.parameters())) == len(list(graph.parameters())) == 2  # still tied


# --------------------------------------------------------------------------------------------------
# Compiling, copying
# --------------------------------------------------------------------------------------------------


def test_a_compiled_graph_gives_the_same_numbers():
    inner = Graph(Scale(2.0)(Input(HiddenBTD, "x"), Input(MaskBT, "mask", optional=True)))
    twins = Split()(inner(Embed()(tokens())))
    graph = Graph(Loss()(Head()(Add()([twins.hidden, twins.minus, twins.hidden])), Input(LabelsBT, "labels")))
    compiled = torch.compile(graph, fullgraph=True, backend="eager")
    same(compiled(tokens=TOKENS, labels=LABELS), graph(tokens=TOKENS, labels=LABELS))
    same(compiled(tokens=TOKENS, labels=LABELS, power=2), graph(tokens=TOKENS, labels=LABELS, power=2))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
def test_a_copied_graph_is_a_graph_of_its_own(copied):
    graph = Graph(Scale(2.0)(Embed()(tokens())))
    again = copied(graph)
    assert (again.config(), again.summary()) == (graph.config(), graph.summary())
    same(again(TOKENS), graph(TOKENS))
    with torch.no_grad():
        again.embed.weight.zero_()
    assert again(TOKENS).abs().sum() == 0
    assert graph(TOKENS).abs().sum() > 0
    assert again.input_ports == graph.input_ports
