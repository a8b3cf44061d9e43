"""Modules: ports from annotations, checks on demand, parameter axes, configs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import nemolet as nl
from nemolet.errors import DeclarationError, ShapeError, WiringError
from nemolet.module import NeuralModule, checked, parameter_axes
from nemolet.types import (
    Hidden,
    HiddenBTD,
    HiddenRestD,
    LogitsBTV,
    MaskBT,
    MemoryBSD,
    NeuralType,
    SpectrogramBTC,
    TokenIdsBT,
    format_dims,
)

HiddenAnyD = Annotated[Tensor, NeuralType("Any D", Hidden())]


class Pairs(NamedTuple):
    hidden: HiddenBTD
    mask: MaskBT | None


class Gate(NeuralModule):
    def __init__(self, width: int = 4, *, bias: bool = False) -> None:
        super().__init__(D=width)
        self.scale = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.declare_axes(scale="D", bias="D")

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return hidden * self.scale


class Attend(NeuralModule):
    def forward(
        self,
        hidden: HiddenBTD,
        memory: MemoryBSD,
        mask: MaskBT | None = None,
        heads: int = 1,
        name: str | None = None,
    ) -> Pairs:
        return Pairs(hidden + memory.sum(1, keepdim=True), mask)


class Wrong(NeuralModule):
    """Its output contradicts its declaration."""

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return hidden.mT


class Stack(NeuralModule):
    """A module that calls another."""

    def __init__(self, inner: NeuralModule, times: int = 1) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        for _ in range(self.times):
            hidden = self.inner(hidden)
        return hidden


class Lists(NeuralModule):
    def forward(
        self,
        two: tuple[HiddenBTD, HiddenBTD],
        any: list[HiddenBTD],
        named: dict[str, HiddenBTD],
        rest: tuple[HiddenBTD, ...] = (),
    ) -> list[HiddenBTD]:
        return [*two, *any, *named.values(), *rest]


def x(*shape: int) -> Tensor:
    return torch.zeros(*shape)


# --------------------------------------------------------------------------------------------------
# Ports
# --------------------------------------------------------------------------------------------------


def test_ports_are_what_the_annotations_say():
    module = Attend()
    assert [str(port) for port in module.input_ports.values()] == [
        "hidden: B T D Hidden",
        "memory: B S D Hidden",
        "mask: B T Mask | None",
    ]
    assert [str(port) for port in module.output_ports.values()] == ["hidden: B T D Hidden", "mask: B T Mask | None"]
    assert module.declared().options == ("heads", "name")
    assert module.declared().record is Pairs


def test_an_instance_fills_in_its_sizes():
    assert str(Gate(8).input_ports["hidden"]) == "hidden: B T D=8 Hidden"
    assert str(Gate(4).output_ports["output"]) == "output: B T D=4 Hidden"


def test_containers_are_ports():
    ports = {name: str(port.type) for name, port in Lists().input_ports.items()}
    assert ports == {
        "two": "list[B T D Hidden] of 2",
        "any": "list[B T D Hidden]",
        "named": "dict[str, B T D Hidden]",
        "rest": "list[B T D Hidden]",
    }
    assert str(Lists().output_ports["output"].type) == "list[B T D Hidden]"


def test_a_child_class_keeps_the_ports_of_its_parent():
    class Louder(Gate):
        def extra(self) -> None: ...

    assert Louder(3).input_ports == Gate(3).input_ports


def declare(**annotations):
    """Make a class whose forward has the given annotations; None stands for no annotation."""

    def forward(self, hidden, other=0):
        return hidden

    forward.__annotations__ = {k: v for k, v in annotations.items() if v is not None}
    return type("Made", (NeuralModule,), {"forward": forward})


@pytest.mark.parametrize(
    ("annotations", "texts"),
    [
        ({"hidden": Tensor}, ["Made.forward(hidden)", "a tensor has no type", "HiddenBTD"]),
        ({"hidden": nn.Parameter}, ["Made.forward(hidden)", "a tensor has no type"]),
        ({"hidden": Tensor | None}, ["Made.forward(hidden)", "a tensor has no type"]),
        ({"hidden": list[Tensor]}, ["Made.forward(hidden)", "a tensor has no type"]),
        ({"hidden": dict[str, Tensor]}, ["Made.forward(hidden)", "a tensor has no type"]),
        ({"hidden": tuple[Tensor, int]}, ["Made.forward(hidden)", "a tensor has no type"]),
        ({"hidden": tuple[Tensor, ...]}, ["Made.forward(hidden)", "a tensor has no type"]),
        ({"hidden": Sequence[Tensor]}, ["Made.forward(hidden)", "a tensor has no type"]),
        ({"hidden": Annotated[Tensor, "no type"]}, ["Made.forward(hidden)", "a tensor has no type"]),
        ({"hidden": tuple[HiddenBTD, MaskBT]}, ["Made.forward(hidden)", "an argument of its own"]),
        ({"hidden": Sequence[HiddenBTD]}, ["Made.forward(hidden)", "list[X]"]),
        ({"hidden": HiddenBTD, "other": None}, ["Made.forward(other)", "no annotation"]),
        ({"hidden": None}, ["Made.forward(hidden)", "no annotation"]),
        ({"hidden": HiddenBTD, "other": int, "return": None}, ["the output has no type"]),
        ({"hidden": HiddenBTD, "other": int, "return": int}, ["the output has no type"]),
        ({"hidden": HiddenBTD, "other": int, "return": Tensor}, ["a tensor has no type", "-> ..."]),
        ({"hidden": "Unknown"}, ["names something unknown", "TYPE_CHECKING"]),
    ],
)
def test_an_undeclared_tensor_is_refused_when_the_class_is_made(annotations, texts):
    with pytest.raises(DeclarationError) as caught:
        declare(**{"return": HiddenBTD, "other": int} | annotations)
    for text in texts:
        assert text in str(caught.value)


def test_plain_arguments_are_options():
    made = declare(hidden=HiddenBTD, other=tuple[int, str], **{"return": HiddenBTD})
    assert made.signature.options == ("other",)
    made = declare(hidden=HiddenBTD, other=Callable[[int], int], **{"return": HiddenBTD})
    assert made.signature.options == ("other",)


def test_ports_cannot_hide():
    with pytest.raises(DeclarationError, match="ports cannot hide"):

        class Hiding(NeuralModule):
            def forward(self, *hidden: HiddenBTD) -> HiddenBTD: ...

    with pytest.raises(DeclarationError, match="an output has no type"):

        class Untyped(NamedTuple):
            hidden: HiddenBTD
            number: int

        declare(hidden=HiddenBTD, other=int, **{"return": Untyped})


def test_a_module_without_forward_says_so():
    class Empty(NeuralModule):
        pass

    with pytest.raises(DeclarationError, match="the module has no forward"):
        Empty().declared()


# --------------------------------------------------------------------------------------------------
# Checks of real tensors
# --------------------------------------------------------------------------------------------------


def test_off_means_no_checks():
    assert Gate(4)(x(3, 4)).shape == (3, 4)  # rank and axes are wrong, and nobody looks
    assert Wrong()(x(1, 2, 3)).shape == (1, 3, 2)


@pytest.mark.parametrize(
    ("module", "arguments", "texts"),
    [
        (Gate(4), (x(2, 3, 5),), ["gate.hidden", "axis D", "D=4", "(2, 3, 5)"]),
        (Gate(4), (x(3, 4),), ["gate.hidden", "another rank", "B T D=4", "(3, 4)"]),
        (Gate(4), ([x(1, 1, 4)],), ["gate.hidden", "not a tensor", "list"]),
        (Wrong(), (x(1, 2, 3),), ["wrong.output", "axis T", "T=2 by wrong.hidden"]),
        (Attend(), (x(2, 3, 4), x(2, 5, 6)), ["attend.memory", "D=4 by attend.hidden"]),
        (Attend(), (x(2, 3, 4), x(1, 5, 4)), ["attend.memory", "B=2 by attend.hidden"]),
        (Attend(), (x(2, 3, 4), x(2, 5, 4), x(2, 5)), ["attend.mask", "T=3"]),
        (Lists(), ([x(1, 1, 1)], [], {}), ["lists.two", "container", "of 2"]),
        (Lists(), ([x(1, 1, 1)] * 2, {}, {}), ["lists.any", "container"]),
        (Lists(), ([x(1, 1, 1)] * 2, [], []), ["lists.named", "container"]),
        (Lists(), ([x(1, 1, 1), x(1, 1, 2)], [], {}), ["lists.two", "axis D"]),
    ],
)
def test_a_tensor_that_contradicts_its_type_is_refused(module, arguments, texts):
    with checked(), pytest.raises(ShapeError) as caught:
        module(*arguments)
    for text in texts:
        assert text in str(caught.value)


def test_what_fits_passes():
    with checked():
        assert Gate(4)(hidden=x(2, 3, 4)).shape == (2, 3, 4)
        assert Attend()(x(2, 3, 4), memory=x(2, 9, 4), mask=None).mask is None
        assert len(Lists()((x(1, 1, 1),) * 2, [x(1, 1, 1)], {"a": x(1, 1, 1)})) == 4


def test_open_and_free_axes_take_any_size():
    class Free(NeuralModule):
        def forward(self, rest: HiddenRestD, free: HiddenAnyD) -> HiddenRestD:
            return rest

    with checked():
        for shape in ((4,), (2, 4), (2, 3, 5, 4)):
            assert Free()(x(*shape), x(7, 4)).shape == shape
        with pytest.raises(ShapeError, match="axis D"):
            Free()(x(2, 4), x(7, 3))
        with pytest.raises(ShapeError, match="another rank"):
            Free()(x(2, 4), x(4))


def test_inner_modules_are_checked_too():
    with checked(), pytest.raises(ShapeError, match=r"gate\.hidden"):
        Stack(Gate(4))(x(1, 1, 5))


def test_blocks_nest_and_restore():
    wrong, tensor = Wrong(), x(1, 2, 3)

    def is_checked() -> bool:
        try:
            wrong(tensor)
        except ShapeError:
            return True
        return False

    with checked():
        assert is_checked()
        with checked(False):
            assert not is_checked()
            with checked():
                assert is_checked()
            assert not is_checked()
        assert is_checked()
        with pytest.raises(ValueError, match="left early"), checked(False):
            raise ValueError("left early")
        assert is_checked()
        with checked():
            assert is_checked()
        assert is_checked()
    assert not is_checked()


class Squash(NeuralModule):
    """Loses an axis, which its own open type cannot see."""

    def forward(self, hidden: HiddenRestD) -> HiddenRestD:
        return hidden.sum(0)


def test_every_output_of_a_graph_is_checked():
    source = nl.Input(HiddenBTD, "source")
    one = nl.Graph(mixed=Squash()(source))
    two = nl.Graph(first=Gate(3)(source), second=Squash()(source))
    with checked():
        with pytest.raises(ShapeError, match=r"graph\.mixed: the tensor has another rank"):
            one(x(1, 2, 3))
        with pytest.raises(ShapeError, match=r"graph\.second: the tensor has another rank"):
            two(x(1, 2, 3))
        with pytest.raises(ShapeError, match=r"graph\.source: axis D has another size"):
            two(x(1, 2, 4))


# --------------------------------------------------------------------------------------------------
# Parameters and configs
# --------------------------------------------------------------------------------------------------


def test_parameter_axes_by_full_name():
    axes = {name: format_dims(dims) for name, dims in parameter_axes(Stack(Gate(8, bias=True))).items()}
    assert axes == {"inner.scale": "D=8", "inner.bias": "D=8"}


def test_a_shared_parameter_is_listed_once():
    embed = nl.nn.Embedding("V", "D", 10, 4)
    both = nn.ModuleDict({"embed": embed, "head": nl.nn.Head("D", "V", tied=embed)})
    assert list(parameter_axes(both)) == [name for name, _ in both.named_parameters()]
    assert len(parameter_axes(both)) == 1


def test_undeclared_parameters_are_named_all_at_once():
    with pytest.raises(DeclarationError, match=r"first\.weight, first\.bias, second\.weight"):
        parameter_axes(nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2, bias=False)}))


@pytest.mark.parametrize(
    ("axes", "fits"),
    [
        ("(H 3) D", True),
        ("F D", True),
        ("F=6 D=4", True),
        ("(2 3) D", True),
        ("(2 4) D", False),
        ("F=5 D", False),
        ("F", False),
        ("F D T", False),
        ("D F", False),
    ],
)
def test_declared_axes_agree_with_the_shape(axes, fits):
    class Weighted(NeuralModule):
        def __init__(self) -> None:
            super().__init__(D=4)
            self.weight = nn.Parameter(torch.zeros(6, 4))
            self.declare_axes(weight=axes)

        def forward(self, hidden: HiddenBTD) -> HiddenBTD: ...

    if fits:
        assert list(parameter_axes(Weighted())) == ["weight"]
        return
    with pytest.raises(DeclarationError, match=r"Weighted\.weight: the declared axes(.|\n)*\(6, 4\)"):
        Weighted()


def test_a_config_holds_the_arguments_of_the_module():
    assert Stack(Gate(8, bias=True), times=2).config() == {
        "_target_": f"{__name__}.Stack",
        "inner": {"_target_": f"{__name__}.Gate", "width": 8, "bias": True},
        "times": 2,
    }


def test_a_config_refers_to_a_module_that_is_written_elsewhere():
    gate = Gate(8)
    assert Stack(gate).config({id(gate): "gate"})["inner"] == {"_ref_": "gate"}


def test_what_cannot_be_written_to_a_config_is_named():
    class Odd(NeuralModule):
        def __init__(self, table: dict) -> None:
            super().__init__()

        def forward(self, hidden: HiddenBTD) -> HiddenBTD: ...

    assert Odd({"a": [1, None, (2.0, "b")]}).config()["table"] == {"a": [1, None, [2.0, "b"]]}
    with pytest.raises(DeclarationError, match=r"Odd.table.a: this argument cannot be written(.|\n)*Tensor"):
        Odd({"a": torch.zeros(1)}).config()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_modules_are_copied_whole(copied):
    gate = copied(Gate(8))
    assert gate.config() == Gate(8).config()
    assert gate.input_ports == Gate(8).input_ports
    assert torch.equal(gate(torch.ones(1, 1, 8)), torch.ones(1, 1, 8))


class Mixer(NeuralModule):
    def __init__(self) -> None:
        super().__init__(V=5, C=3)
        self.table = nn.Parameter(torch.arange(15.0).view(5, 3))

    def forward(self, tokens: TokenIdsBT, features: SpectrogramBTC, scale: float = 1.0) -> LogitsBTV:
        return (self.table[tokens] * features * scale) @ self.table.mT


def test_a_compiled_module_gives_the_same_numbers():
    module = Mixer()
    arguments = torch.tensor([[1, 4]]), torch.rand(1, 2, 3)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments, scale=2.0), module(*arguments, scale=2.0))


def test_a_compiled_module_leaves_checks_to_the_calls_outside():
    compiled = torch.compile(Stack(Gate(4), times=2), fullgraph=True, backend="eager")
    with checked():
        assert compiled(x(1, 2, 4)).shape == (1, 2, 4)


def test_hooks_and_submodules_work_as_in_torch():
    seen = []
    stack = Stack(Gate(4))
    stack.inner.register_forward_hook(lambda module, args, output: seen.append(module.label))
    stack(x(1, 2, 4))
    assert seen == ["gate"]
    assert list(stack.state_dict()) == ["inner.scale"]


class Untyped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, hidden):
        return self.proj(hidden)


def test_a_module_in_the_place_of_a_tensor_is_refused():
    embed, layer = nl.nn.Embedding("V", "D", 5, 4), nl.nn.Linear("D", "D", 4, 4)
    for call in (lambda: layer(embed), lambda: layer(hidden=nn.Linear(4, 4))):
        with pytest.raises(WiringError, match="a module was passed where what it returns is meant") as caught:
            call()
        assert caught.value.where == "linear.hidden"
        assert "the module" in caught.value.found and "call it: hidden=" in caught.value.fix


def test_an_option_may_be_a_module():
    class Applies(NeuralModule):
        def forward(self, hidden: HiddenBTD, by: nn.Module) -> HiddenBTD:
            return by(hidden)

    assert Applies()(torch.ones(1, 2, 4), nn.Identity()).shape == (1, 2, 4)


def test_a_symbol_in_an_untyped_module_is_refused():
    hidden = nl.Input(HiddenBTD)
    for call in (lambda: nn.Linear(4, 4)(hidden), lambda: Untyped()(hidden), lambda: torch.relu(hidden)):
        with pytest.raises(WiringError, match="a symbol has no numbers") as caught:
            call()
        assert "nl.NeuralModule" in caught.value.fix


@pytest.mark.parametrize("part", [nn.Linear(2, 2), nn.Parameter(torch.zeros(2)), None])
def test_a_forgotten_beginning_is_told(part):
    class Forgetful(NeuralModule):
        def __init__(self) -> None:
            if part is not None:
                self.part = part

        def forward(self, hidden: HiddenBTD) -> HiddenBTD:
            return hidden

    with pytest.raises(DeclarationError, match=r"super\(\).__init__\(\) has not run") as caught:
        Forgetful()(nl.Input(HiddenBTD))
    assert caught.value.where == "Forgetful.__init__"
    assert "super().__init__(D=width)" in caught.value.fix


@pytest.mark.parametrize(
    ("tied", "fix"),
    [
        (lambda: nl.language.Decoder(layers=1, width=8, heads=2), "give both sizes"),
        (lambda: nl.nn.Linear("D", "V", 8, 5), "give both sizes"),
        (lambda: nl.nn.TextEmbedding(5, 8), "tied=....tokens"),
        (lambda: "embed", "give both sizes"),
    ],
)
def test_only_an_embedding_is_shared(tied, fix):
    with pytest.raises(DeclarationError, match="only the weight of an embedding") as caught:
        nl.nn.Head("D", "V", tied=tied())
    assert caught.value.where == "Head.tied"
    assert fix in caught.value.fix
