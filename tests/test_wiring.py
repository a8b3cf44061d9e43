"""Wires: what fits is unified, and what does not is refused before any tensor exists."""

from __future__ import annotations

import sys
from typing import Annotated, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nemolet as nl
from nemolet.errors import DeclarationError, WiringError
from nemolet.graph import Graph, compose
from nemolet.module import NeuralModule
from nemolet.symbols import Input, Node, Symbol, upstream
from nemolet.types import (
    Audio,
    AudioBN,
    Axis,
    DictOf,
    Hidden,
    HiddenBTD,
    HiddenRestD,
    HiddenRestI,
    HiddenRestO,
    Index,
    LabelsBT,
    Lengths,
    LengthsB,
    ListOf,
    LogitsBTV,
    LossScalar,
    MaskBT,
    MemoryBSD,
    NeuralType,
    SpectrogramBTC,
    TokenIdsBT,
)
from nemolet.wiring import check

IndexBT = Annotated[Tensor, NeuralType("B T", Index())]
HiddenBDT = Annotated[Tensor, NeuralType("B D T", Hidden())]
HiddenAnyTD = Annotated[Tensor, NeuralType("Any T D", Hidden())]
HiddenVTD = Annotated[Tensor, NeuralType("V T D", Hidden())]
HiddenBD = Annotated[Tensor, NeuralType("B D", Hidden())]
HiddenRestTD = Annotated[Tensor, NeuralType("... T D", Hidden())]


class NoTensors(TorchDispatchMode):
    """Remembers every operation torch runs, the making of tensors included."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


class Embed(NeuralModule):
    def __init__(self, width: int | None = None, vocab: int | None = None) -> None:
        super().__init__(**{k: v for k, v in {"D": width, "V": vocab}.items() if v})
        self.weight = nn.Parameter(torch.zeros(vocab or 2, width or 2))

    def forward(self, tokens: TokenIdsBT) -> HiddenBTD:
        return self.weight[tokens]


class Layer(NeuralModule):
    def __init__(self, width: int | None = None) -> None:
        super().__init__(**({"D": width} if width else {}))

    def forward(self, hidden: HiddenBTD, mask: MaskBT | None = None) -> HiddenBTD:
        return hidden


class Cross(NeuralModule):
    def forward(self, hidden: HiddenBTD, memory: MemoryBSD) -> HiddenBTD:
        return hidden + memory.sum(1, keepdim=True)


class Norm(NeuralModule):
    def forward(self, hidden: HiddenRestD) -> HiddenRestD:
        return hidden


class Project(NeuralModule):
    def __init__(self, i: Axis, o: Axis) -> None:
        super().__init__(I=i, O=o)

    def forward(self, hidden: HiddenRestI) -> HiddenRestO:
        return hidden


class Add(NeuralModule):
    def forward(self, left: HiddenRestD, right: HiddenRestD) -> HiddenRestD:
        return left + right


class Deepen(NeuralModule):
    def forward(self, hidden: HiddenRestD) -> HiddenRestTD:
        return hidden


class AnyBatch(NeuralModule):
    def forward(self, hidden: HiddenAnyTD) -> HiddenAnyTD:
        return hidden


class Flip(NeuralModule):
    def forward(self, hidden: HiddenBTD) -> HiddenBDT:
        return hidden.mT


class Pool(NeuralModule):
    def forward(self, hidden: HiddenBTD) -> HiddenBD:
        return hidden.sum(1)


class Head(NeuralModule):
    def __init__(self, vocab: int) -> None:
        super().__init__(V=vocab)

    def forward(self, hidden: HiddenBTD) -> LogitsBTV:
        return hidden


class Loss(NeuralModule):
    def forward(self, logits: LogitsBTV, labels: LabelsBT) -> LossScalar:
        return logits.sum()


class Mel(NeuralModule):
    def __init__(self, sample_rate: int) -> None:
        super().__init__(sample_rate=sample_rate)

    def forward(self, audio: AudioBN) -> SpectrogramBTC:
        return audio


class Resample(NeuralModule):
    def __init__(self, sample_rate: int) -> None:
        super().__init__(sample_rate=sample_rate)

    def forward(self, audio: AudioBN) -> AudioBN:
        return audio


class Count(NeuralModule):
    def forward(self, tokens: IndexBT) -> IndexBT:
        return tokens


class Twins(NamedTuple):
    hidden: HiddenBTD
    memory: HiddenBTD


class Split(NeuralModule):
    def forward(self, hidden: HiddenBTD) -> Twins:
        return Twins(hidden, hidden)


class Sum(NeuralModule):
    def forward(self, parts: list[HiddenBTD]) -> HiddenBTD:
        return sum(parts)


class Pair(NeuralModule):
    def forward(self, parts: tuple[HiddenBTD, HiddenBTD]) -> HiddenBTD:
        return parts[0]


class Deep(NeuralModule):
    def forward(self, parts: list[list[HiddenBTD]]) -> HiddenBTD:
        return parts[0][0]


class Fan(NeuralModule):
    def forward(self, hidden: HiddenBTD) -> tuple[HiddenBTD, HiddenBTD, HiddenBTD]:
        return (hidden,) * 3


class Triple(NeuralModule):
    def forward(self, parts: tuple[HiddenBTD, HiddenBTD, HiddenBTD]) -> HiddenBTD:
        return parts[0]


class Grid(NeuralModule):
    def forward(self, parts: list[tuple[HiddenBTD, HiddenBTD]]) -> HiddenBTD:
        return parts[0][0]


class Turned(NeuralModule):
    def forward(self, hidden: HiddenVTD) -> HiddenVTD:
        return hidden


class Masked(NamedTuple):
    hidden: HiddenBTD
    mask: MaskBT


class Masker(NeuralModule):
    def forward(self, hidden: HiddenBTD) -> Masked:
        return Masked(hidden, hidden.sum(-1) > 0)


class Streams(NeuralModule):
    def forward(self, streams: dict[str, HiddenBTD]) -> HiddenBTD:
        return next(iter(streams.values()))


class MaybeMask(NeuralModule):
    def forward(self, hidden: HiddenBTD) -> MaskBT | None:
        return None


class NeedsMask(NeuralModule):
    def forward(self, hidden: HiddenBTD, mask: MaskBT) -> HiddenBTD:
        return hidden


class Trim(NeuralModule):
    def forward(self, hidden: HiddenBTD, lengths: LengthsB) -> HiddenBTD:
        return hidden


class Scaled(NeuralModule):
    def forward(self, hidden: HiddenBTD, scale: float = 1.0) -> HiddenBTD:
        return hidden * scale


def tokens() -> Symbol:
    return Input(TokenIdsBT, "tokens")


def hidden(name: str = "x") -> Symbol:
    return Input(HiddenBTD, name)


# --------------------------------------------------------------------------------------------------
# What does not fit
# --------------------------------------------------------------------------------------------------

CASES = []


def refused(*texts: str):
    """A case: the function makes the modules and returns the wiring; its error must say all the texts."""

    def add(function):
        CASES.append(pytest.param(function, texts, id=function.__name__))
        return function

    return add


@refused("embed.output", "embed.tokens", "TokenIds", "Hidden")
def wrong_element():
    first = Embed()
    return lambda: first(first(tokens()))


@refused("head.output", "layer.hidden", "Hidden", "Logits")
def siblings():
    head, layer = Head(5), Layer()
    return lambda: layer(head(hidden()))


@refused("input x", "layer.hidden", "B V T", "B T D")
def wrong_axis():
    layer = Layer()
    return lambda: layer(Input(NeuralType("B V T", Hidden()), "x"))


@refused("pool.output", "layer.hidden", "B D", "B T D")
def missing_axis():
    pool, layer = Pool(), Layer()
    return lambda: layer(pool(hidden()))


@refused("flip.output", "layer.hidden", "another order", "transpose")
def transposed_axes():
    flip, layer = Flip(), Layer()
    return lambda: layer(flip(hidden()))


@refused("embed.output", "layer.hidden", "D=8", "D=4")
def wrong_size():
    embed, layer = Embed(width=8), Layer(width=4)
    return lambda: layer(embed(tokens()))


@refused("layer.output", "layer_wide.hidden", "D=4", "D=8")
def wrong_size_through_a_module_that_knows_none():
    first, middle, last = Layer(4), Norm(), Layer(8)
    first.label, last.label = "layer", "layer_wide"
    middle.label = "layer"
    return lambda: last(middle(first(hidden())))


@refused("cross.memory", "narrow.output", "D is 8 by wide.output, but 4 by narrow.output")
def sizes_that_meet_in_a_third_module():
    wide, narrow, cross = Embed(8), Embed(4), Cross()
    wide.label, narrow.label = "wide", "narrow"
    return lambda: cross(wide(tokens()), narrow(Input(TokenIdsBT, "source")))


@refused("add.right", "input y", "'...' already stands for other axes")
def ranks_that_meet_in_a_third_module():
    add = Add()
    return lambda: add(hidden(), Input(HiddenBD, "y"))


@refused("add.right", "deepen.output", "'...' already stands for other axes")
def an_axis_more_than_itself():
    add, deepen = Add(), Deepen()

    def wire():
        x = Input(HiddenRestD, "x")
        return Graph(add(x, deepen(x)))  # only the whole graph knows that both come from one input

    return wire


@refused("cross.memory", "nothing flows into port 'memory'", "B S D Hidden")
def missing_port():
    cross = Cross()
    return lambda: cross(hidden())


@refused("cross.hidden", "'hidden' is given twice", "input x", "input y")
def doubled_port():
    cross = Cross()
    return lambda: cross(hidden("x"), hidden=hidden("y"))


@refused("cross.memry", "there is no port 'memry'", "did you mean 'memory'?", "input m")
def mistyped_port():
    cross = Cross()
    return lambda: cross(hidden(), memry=hidden("m"))


@refused("cross.zzz", "there is no port 'zzz'", "memory: B S D Hidden", "input m")
def unknown_port():
    cross = Cross()
    return lambda: cross(hidden(), zzz=hidden("m"))


@refused("layer", "too many arguments", "at most 2: hidden, mask")
def too_many_arguments():
    layer = Layer()
    return lambda: layer(hidden(), Input(MaskBT, "m"), hidden("y"))


@refused("input x", "any_batch.hidden", "Any T D", "B T V")
def any_beside_a_wrong_axis():
    module = AnyBatch()
    return lambda: module(Input(NeuralType("B T V", Hidden()), "x"))


@refused("any_batch.output", "layer.hidden", "D=4", "D=8")
def any_beside_a_wrong_size():
    first, second = AnyBatch(), Layer(4)
    return lambda: second(first(Input(NeuralType("B T D=8", Hidden()), "x")))


@refused("sum.parts", "input x", "list[B T D Hidden]")
def tensor_for_a_list():
    module = Sum()
    return lambda: module(hidden())


@refused("layer.hidden", "input x, input y", "list of 2")
def list_for_a_tensor():
    layer = Layer()
    return lambda: layer([hidden("x"), hidden("y")])


@refused("sum.parts", "input x", "dict of 1")
def dict_for_a_list():
    module = Sum()
    return lambda: module({"a": hidden()})


@refused("streams.streams", "input x", "dict[str, B T D Hidden]", "list of 1")
def list_for_a_dict():
    module = Streams()
    return lambda: module([hidden()])


@refused("pair.parts", "input x, input y, input z", "list of 3", "of 2")
def list_of_the_wrong_length():
    module = Pair()
    return lambda: module([hidden("x"), hidden("y"), hidden("z")])


@refused("fan.output", "pair.parts", "of 2", "of 3")
def output_list_of_the_wrong_length():
    fan, pair = Fan(), Pair()
    return lambda: pair(fan(hidden()))


@refused("deep.parts", "input x", "the containers differ", "list[B T D Hidden]   at")
def list_too_shallow():
    module = Deep()
    return lambda: module([hidden("x")])


@refused("sum.parts", "input x", "the containers differ", "list of 1: [B T D Hidden]")
def list_too_deep():
    module = Sum()
    return lambda: module([[hidden("x")]])


@refused("sum.parts", "head.output", "Logits")
def one_wrong_item_of_a_list():
    head, module = Head(5), Sum()
    return lambda: module([hidden("x"), head(hidden("y"))])


@refused("sum.parts", "narrow.output", "D=4", "D is 8 by wide.output, but 4 by narrow.output")
def items_of_two_sizes():
    wide, narrow, module = Embed(8), Embed(4), Sum()
    wide.label, narrow.label = "wide", "narrow"
    return lambda: module([wide(tokens()), narrow(Input(TokenIdsBT, "source"))])


@refused("resample.output", "mel.audio", "sample_rate=16000", "sample_rate=8000")
def wrong_sample_rate():
    resample, mel = Resample(8000), Mel(16000)
    return lambda: mel(resample(Input(AudioBN, "audio")))


@refused("loss.labels", "input labels", "vocab=7", "V is 5 by head.output")
def vocabularies_of_scores_and_labels():
    head, loss = Head(5), Loss()
    return lambda: loss(head(hidden()), Input(NeuralType("B T", nl.Labels(7)), "labels"))


@refused("second.tokens", "input tokens", "vocab=5", "vocab=7")
def one_input_for_two_vocabularies():
    first, second = Embed(vocab=5), Embed(vocab=7)
    second.label = "second"

    def wire():
        x = tokens()
        return Graph(a=first(x), b=second(x))

    return wire


@refused("maybe_mask.output", "needs_mask.mask", "optional")
def optional_output_into_a_port_that_needs_it():
    maybe, needs = MaybeMask(), NeedsMask()

    def wire():
        x = hidden()
        return needs(x, maybe(x))

    return wire


@refused("input mask", "needs_mask.mask", "optional")
def optional_input_into_a_port_that_needs_it():
    needs = NeedsMask()
    return lambda: needs(hidden(), Input(MaskBT, "mask", optional=True))


@refused("cross.memory", "a value was passed among symbols", "Tensor", "nl.Input")
def tensor_among_symbols():
    cross, real = Cross(), torch.zeros(1, 2, 3)
    return lambda: cross(hidden(), real)


@refused("cross.hidden", "is given twice", "Tensor")
def doubled_port_with_a_tensor():
    cross, real = Cross(), torch.zeros(1, 2, 3)
    return lambda: cross(hidden("x"), hidden=real)


@refused("sum.parts", "a value was passed among symbols", "int")
def number_among_symbols():
    module = Sum()
    return lambda: module([hidden(), 3])


@refused("scaled.scale", "an argument that is no port", "input y")
def symbol_for_a_plain_argument():
    module = Scaled()
    return lambda: module(hidden("x"), scale=hidden("y"))


@refused("loss.output", "layer.hidden", "scalar Loss", "B T D")
def scalar_for_a_sequence():
    loss, layer = Loss(), Layer()
    return lambda: layer(loss(Input(LogitsBTV, "logits"), Input(LabelsBT, "labels")))


@refused("count.output", "embed.tokens", "too general", "Index", "TokenIds")
def parent_element_for_a_child():
    count, embed = Count(), Embed()
    return lambda: embed(count(tokens()))


@refused("trim.lengths", "input lengths", "of=T", "of=N")
def lengths_of_another_axis():
    trim = Trim()
    return lambda: trim(hidden(), Input(NeuralType("B", Lengths("N")), "lengths"))


@refused("two inputs have one name", "input x", "B T D Hidden", "B T Mask", "x_2")
def two_inputs_with_one_name():
    layer = Layer()
    return lambda: Graph(layer(Input(HiddenBTD, "x"), Input(MaskBT, "x")))


@refused("two outputs have one name", "layer_output")
def two_outputs_with_one_name():
    layer = Layer()
    return lambda: Graph(layer(hidden("x")), layer(hidden("y")), layer(hidden("z")))


@refused("a graph ends in symbols", "Tensor")
def graph_of_a_tensor():
    real = torch.zeros(1)
    return lambda: Graph(real)


@refused("a graph ends in symbols", "Twins")
def named_output_of_several_symbols():
    split = Split()
    return lambda: Graph(both=split(hidden()))


@refused("a graph needs at least one module")
def graph_of_an_input():
    return lambda: Graph(hidden())


@refused("an input that no module uses", "input y")
def output_that_is_only_an_input():
    layer = Layer()
    return lambda: Graph(a=layer(hidden("x")), b=hidden("y"))


@refused("a module cannot have this name", "'forward'")
def module_named_like_a_method():
    layer = Layer()
    return lambda: compose({"forward": layer})


@refused("several outputs fit this port", "c.left", "a.output, b.output", "wires: {c.left: a.output}")
def ambiguous_match():
    modules = {"a": Layer(), "b": Layer(), "c": Add()}
    wires = {"a.hidden": "x", "b.hidden": "y"}
    return lambda: compose(modules, wires)


@refused("several outputs fit this port", "d.mask", "a.mask, b.mask", "wires: {d.mask: a.mask}, or null")
def ambiguous_match_of_an_optional_port():
    modules = {"a": Masker(), "b": Masker(), "d": Layer()}
    return lambda: compose(modules, {"a.hidden": "x", "b.hidden": "y", "d.hidden": "x"})


@refused("a has several ports", "wires.b.hidden", "a.hidden: B T D Hidden, a.memory: B T D Hidden")
def wire_from_a_module_with_several_outputs():
    modules = {"a": Split(), "b": Layer()}
    return lambda: compose(modules, {"b.hidden": "a"})


@refused("b has several ports", "wires.b", "b.hidden: B T D Hidden, b.memory: B S D Hidden")
def wire_into_a_module_with_several_ports():
    modules = {"a": Layer(), "b": Cross()}
    return lambda: compose(modules, {"b": "a"})


@refused("b.hidden: two wires enter one port", "a.output and x")
def two_wires_into_one_port():
    modules = {"a": Layer(), "b": Layer()}
    return lambda: compose(modules, {"b": "a", "b.hidden": "x"})


@refused("nothing flows into port 'memory'", "b.memory", "B S D Hidden")
def null_for_a_port_that_needs_a_wire():
    modules = {"a": Layer(), "b": Cross()}
    return lambda: compose(modules, {"b.memory": None})


@refused("options.lst", "options of no module", "did you mean 'last'?")
def options_of_no_module():
    modules = {"last": Scaled()}
    return lambda: compose(modules, options={"lst": {"scale": 2.0}})


@refused("a module cannot have this name", "'tokens'", "no input")
def module_named_like_an_input():
    modules = {"tokens": Embed()}
    return lambda: compose(modules)


@refused("turned.hidden", "input x", "B T D", "V T D")
def any_between_two_axes():
    layer, turned = Layer(), Turned()

    def wire():
        x = Input(HiddenAnyTD, "x")
        return Graph(a=layer(x), b=turned(x))

    return wire


@refused("turned.hidden", "any_batch.output", "B T D", "V T D")
def any_output_between_two_axes():
    first, layer, turned = AnyBatch(), Layer(), Turned()

    def wire():
        x = first(hidden())
        return Graph(a=layer(x), b=turned(x))

    return wire


@refused("add.right", "input y", "B V D", "'...' already stands for other axes")
def open_axes_between_two_axes():
    add = Add()
    return lambda: add(hidden(), Input(NeuralType("B V D", Hidden()), "y"))


@refused("triple.parts", "input parts", "list[B T D Hidden] of 3", "list[B T D Hidden] of 2")
def list_of_any_length_between_two_lengths():
    pair, triple = Pair(), Triple()

    def wire():
        parts = Input(list[HiddenBTD], "parts")
        return Graph(a=pair(parts), b=triple(parts))

    return wire


@refused("grid.parts", "input x, input y, input z", "list of 3", "list[B T D Hidden] of 2")
def nested_list_of_the_wrong_length():
    grid = Grid()
    return lambda: grid([[hidden("x"), hidden("y"), hidden("z")]])


@refused("layer.hiden", "there is no port 'hiden'", "embed.output", "did you mean 'hidden'?")
def renamed_port():
    embed, layer = Embed(), Layer()
    return lambda: layer(hiden=embed(tokens()))


@refused("the wires form a cycle", "b.output -> a.hidden", "a.output -> b.hidden")
def cycle():
    modules = {"a": Layer(), "b": Layer()}
    return lambda: compose(modules, {"a.hidden": "b.output", "b.hidden": "a.output"})


@refused("the wires form a cycle", "a.output -> a.hidden")
def module_that_feeds_itself():
    modules = {"a": Layer()}
    return lambda: compose(modules, {"a.hidden": "a.output"})


@refused("this wire ends at no port", "b.hiden", "a.output", "did you mean 'b.hidden'?")
def unknown_target_of_a_wire():
    modules = {"a": Layer(), "b": Layer()}
    return lambda: compose(modules, {"b.hiden": "a.output"})


@refused("this wire starts at no port", "b.hidden from a.outptu", "did you mean 'a.output'?")
def unknown_source_of_a_wire():
    modules = {"a": Layer(), "b": Layer()}
    return lambda: compose(modules, {"b.hidden": ["a.outptu"]})


@refused("there is no such output", "outputs.y", "b.out", "did you mean 'b.output'?")
def unknown_output():
    modules = {"a": Layer(), "b": Layer()}
    return lambda: compose(modules, outputs={"y": "b.out"})


@refused("a.output -> b.audio", "B T D Hidden", "B N Audio")
def wire_that_does_not_fit():
    modules = {"a": Layer(), "b": Mel(16000)}
    return lambda: compose(modules, {"b.audio": "a.output"})


class Still(NeuralModule):
    def forward(self, step: int = 0) -> HiddenBTD:
        return torch.zeros(1, 1, 1)


@refused("still", "the module has no inputs")
def module_without_inputs():
    modules = {"still": Still()}
    return lambda: compose(modules)


@pytest.mark.parametrize(("build", "texts"), CASES)
def test_a_wrong_wire_is_refused_before_any_tensor_exists(build, texts):
    with torch.device("meta"):
        wire = build()
    with NoTensors() as torch_ran, pytest.raises(WiringError) as caught:
        wire()
    assert torch_ran.operations == []
    for text in texts:
        assert text in str(caught.value)
    assert caught.value.where
    source, arrow, target = caught.value.what.rpartition(": ")[2].partition(" -> ")
    if arrow:  # a wire that does not fit: both its ports are named, each beside its own type
        assert f"from {source}" in caught.value.found
        assert f"at input {target}" in caught.value.expected


def test_the_table_is_long_and_the_recorder_records():
    assert len(CASES) >= 60
    promised = ["element", "axis", "size"]
    assert {f"wrong_{what}" for what in promised} <= (names := {case.id for case in CASES})
    promised = "missing_port doubled_port renamed_port ambiguous_match cycle any_between_two_axes"
    assert {*promised.split(), "nested_list_of_the_wrong_length", "any_beside_a_wrong_axis"} <= names
    with NoTensors() as torch_ran:
        torch.zeros(1).add(1)
    assert any("zeros" in name for name in torch_ran.operations)
    assert any("add" in name for name in torch_ran.operations)


def test_wiring_that_fits_makes_no_tensor_either():
    with torch.device("meta"):
        embed, layer, head, loss = Embed(8, 5), Layer(8), Head(5), Loss()
    with NoTensors() as torch_ran:
        Graph(loss(head(layer(embed(tokens()))), Input(LabelsBT)))
    assert torch_ran.operations == []


def test_a_refused_wire_leaves_no_trace():
    layer, x = Layer(8), tokens()
    with pytest.raises(WiringError):
        layer(Embed(4)(x))
    assert solved(layer(Embed(8)(x))) == "B T D=8 Hidden"


# --------------------------------------------------------------------------------------------------
# What fits
# --------------------------------------------------------------------------------------------------


def solved(end: Symbol) -> str:
    return str(check(upstream([end])).type_of(end))


def test_a_size_flows_forward_through_modules_that_know_none():
    assert solved(Norm()(Layer()(Embed(8)(tokens())))) == "B T D=8 Hidden"


def test_a_size_flows_backward_to_the_inputs():
    x = tokens()
    end = Loss()(Head(5)(Layer()(Embed()(x))), labels := Input(LabelsBT, "labels"))
    solution = check(upstream([end]))
    assert str(solution.type_of(labels)) == "B T Labels(vocab=5)"
    assert str(Graph(Layer(8)(Norm()(h := hidden()))).type_of(h)) == "B T D=8 Hidden"


def test_letters_of_one_kind_flow_into_each_other():
    x = hidden()
    assert solved(Cross()(x, x)) == "B T D Hidden"


def test_a_letter_of_a_reused_layer_is_bound_by_its_instance():
    up = Project(Axis("D", 4), Axis("F", 16))
    down = Project(Axis("F", 16), Axis("D", 4))
    assert solved(up(Embed(4)(tokens()))) == "B T F=16 Hidden"
    assert solved(down(up(Embed(4)(tokens())))) == "B T D=4 Hidden"


def test_leading_axes_stay_open_until_a_wire_says_what_they_are():
    x = Input(HiddenRestD, "x")
    assert solved(Norm()(x)) == "... D Hidden"
    graph = Graph(out=Layer(8)(Norm()(x)))
    assert str(graph.input_ports["x"].type) == "B T D=8 Hidden"


def test_open_leading_axes_that_meet_are_one():
    x, y = Input(HiddenRestD, "x"), hidden("y")
    graph = Graph(Add()(Norm()(x), y))
    assert str(graph.input_ports["x"].type) == "B T D Hidden"
    longer = Input(HiddenRestTD, "longer")
    graph = Graph(Add()(Input(HiddenRestD, "x"), longer))
    assert str(graph.input_ports["x"].type) == "... T D Hidden"
    assert solved(Deepen()(Input(HiddenRestD, "x"))) == "... T D Hidden"
    assert solved(Deepen()(hidden())) == "B T S D Hidden"  # no letter twice


def test_a_list_is_checked_item_by_item():
    embed = Embed(8)
    assert solved(Sum()([embed(tokens()), embed(tokens()), hidden()])) == "B T D=8 Hidden"
    assert solved(Sum()(Fan()(embed(tokens())))) == "B T D=8 Hidden"
    assert solved(Pair()((hidden("x"), hidden("y")))) == "B T D Hidden"
    assert solved(Streams()({"a": embed(tokens()), "b": hidden()})) == "B T D=8 Hidden"


def test_an_axis_of_any_kind_is_of_the_kind_it_meets():
    x = Input(HiddenAnyTD, "x")
    assert solved(x_end := AnyBatch()(x)) == "Any T D Hidden"
    assert str(Graph(Cross()(x, x)).input_ports["x"].type) == "B T D Hidden"
    assert solved(Layer()(x_end)) == "B T D Hidden"
    assert solved(Turned()(AnyBatch()(hidden()))) == "V T D Hidden"  # each Any is an axis of its own


def test_a_list_of_any_length_has_the_length_of_the_port_it_enters():
    parts = Input(list[HiddenBTD], "parts")
    graph = Graph(Pair()(parts), Sum()(parts))
    assert str(graph.input_ports["parts"]) == "parts: list[B T D Hidden] of 2"


def test_an_optional_port_may_stay_open_or_take_an_optional_input():
    layer = Layer()
    assert solved(layer(hidden())) == solved(layer(hidden(), Input(MaskBT, optional=True)))
    assert solved(layer(hidden(), None)) == "B T D Hidden"


def test_a_child_flows_where_its_parent_is_expected():
    assert solved(Count()(tokens())) == "B T Index"


def test_several_outputs_come_as_the_record_of_forward():
    twins = Split()(hidden())
    assert isinstance(twins, Twins)
    assert twins.memory.name == "split.memory"


def test_modules_run_after_what_they_need_and_in_the_order_of_their_ports():
    first, second, cross = Layer(), Layer(), Cross()
    end = cross(first(hidden("x")), second(hidden("y")))
    assert [node.module for node in upstream([end])] == [first, second, cross]


def test_a_deep_stack_meets_no_recursion_limit():
    layer, end = Norm(), Embed(8)(tokens())
    for _ in range(2000):
        end = Node(layer, {"hidden": end}).outputs()["output"]
    assert solved(end) == "B T D=8 Hidden"
    assert len(upstream([end])) == 2001


def test_inputs_are_declared_by_alias_or_type():
    assert str(Input(ListOf(NeuralType("B T", Index()))).port.type) == "list[B T Index]"
    assert str(Input(DictOf(NeuralType("B", Audio())), "a")) == "Symbol(input a: dict[str, B Audio])"
    assert str(Input(list[HiddenBTD], "parts")) == "Symbol(input parts: list[B T D Hidden])"
    assert str(Input(tuple[HiddenBTD, HiddenBTD]).port.type) == "list[B T D Hidden] of 2"
    assert str(Input(dict[str, MaskBT] | None, "m").port) == "m: dict[str, B T Mask] | None"
    for wrong in (Tensor, list[Tensor], HiddenBTD | MaskBT, tuple[HiddenBTD, MaskBT]):
        with pytest.raises(DeclarationError, match="input x: "):
            Input(wrong, "x")
    for wrong in (int, "B T D", None):
        with pytest.raises(DeclarationError, match="an input needs a type"):
            Input(wrong)


def test_a_symbol_has_no_value():
    for use in (bool, len, list, lambda symbol: symbol[0]):
        with pytest.raises(WiringError, match="a symbol has no value yet"):
            use(hidden())


def lines_of(work) -> int:
    """How many lines of Python a piece of work runs."""
    count = 0

    def line(frame, event, argument):
        nonlocal count
        count += event == "line"
        return line

    before = sys.gettrace()
    sys.settrace(line)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def chain(length, make):
    symbol = Embed(width=4)(Input(TokenIdsBT))
    for _ in range(length):
        symbol = make(symbol)
    return Graph(symbol)


CHAINS = {
    "with a width": lambda layer: lambda symbol: layer(4)(symbol),
    "without one": lambda layer: lambda symbol: layer()(symbol),
    "of any rank": lambda _: lambda symbol: Norm()(symbol),
    "with residuals": lambda layer: lambda symbol: Add()(symbol, layer(4)(symbol)),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_the_work_of_wiring_is_in_proportion_to_the_modules(kind):
    make = CHAINS[kind](Layer)
    few, many = (lines_of(lambda n=n: chain(n, make).config()) for n in (100, 400))
    assert many < 4.4 * few


def test_the_work_of_composing_is_in_proportion_to_the_modules():
    def work(length):
        modules = {f"layer{i}": Layer(4) for i in reversed(range(length))}  # each needs the one that is named after it
        wires = {f"layer{i}.hidden": f"layer{i - 1}.output" for i in range(1, length)}
        return lines_of(lambda: compose(modules, wires))

    assert work(400) < 4.4 * work(100)


def test_a_chain_of_thousands_is_wired():
    graph = chain(2000, lambda symbol: Layer()(symbol))
    assert str(graph.output_ports["output"].type) == "B T D=4 Hidden"
    assert len(graph.nodes) == 2001


def test_a_size_that_only_the_whole_graph_knows_is_found_there():
    class Pool(NeuralModule):
        def forward(self, hidden: HiddenBTD, mask: MaskBT) -> MaskBT:
            return mask

    hidden, mask = Input(HiddenBTD, "hidden"), Input(MaskBT, "mask")
    wide, narrow = Layer(8)(hidden), Layer(4)(hidden)  # each fits by itself
    both = Pool()(narrow, Pool()(wide, mask))
    with pytest.raises(WiringError, match="another size") as caught:
        Graph(both)
    assert (caught.value.expected, caught.value.found) == (
        "B T D=8 Hidden   at input layer.hidden",
        "B T D=4 Hidden   from input hidden",
    )


def test_an_error_names_who_fixed_the_size_however_far_away():
    tokens = Input(TokenIdsBT)
    wide, narrow = (Norm()(Norm()(Embed(width=width)(tokens))) for width in (8, 4))
    with pytest.raises(WiringError) as caught:
        Add()(wide, narrow)
    assert caught.value.fix.startswith("D is 8 by embed.output, but 4 by embed.output")
