"""Plans derived from declared axes, against plans written by hand, and against snapshots.

``NEMOLET_UPDATE_GOLDEN=1 pytest tests/parallel`` writes the snapshots anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import pytest
import torch
from torch import Tensor, nn

import nemolet as nl
from nemolet.errors import ParallelError
from nemolet.metrics import TokenAccuracy
from nemolet.nn.router import Mixture
from nemolet.parallel.layout import Boundary
from nemolet.parallel.mesh import MeshSizes
from nemolet.parallel.patterns import Pattern
from nemolet.parallel.plan import plan
from nemolet.parallel.rules import Rules
from nemolet.training.graphs import training_graph
from nemolet.types import Hidden, HiddenBTD, NeuralType

SNAPSHOTS = Path(__file__).parent / "plans"
WHOLE_SEQUENCE = Rules.of({"activations": {"T": "cp"}})
GPT = {"norm": "layer", "gated": False, "bias": True, "position": "learned", "tied": True}
LLAMA = {"kv_heads": 2, "tied": False, "qk_norm": True}


def model(**changes):
    base = {"vocab_size": 64, "layers": 2, "width": 32, "heads": 4, "ffn_width": 64, "context": 16}
    with torch.device("meta"):
        return nl.language.CausalLM(**{**base, **changes})


def graph(**changes):
    with torch.device("meta"):
        return training_graph(model(**changes), nl.language.CrossEntropy())


def shards(derived):
    """Without the prefix of the model, and for the first block only."""
    names = {n: p for n, p in derived.parameters.items() if ".blocks.1." not in n}
    return {n.removeprefix("model.graph.").replace("decoder.blocks.0.", ""): dict(p.shards) for n, p in names.items()}


def crossings(derived):
    found = {n: m for n, m in derived.modules.items() if (m.enter, m.leave) != (Boundary.KEEP, Boundary.KEEP)}
    return {n.removeprefix("model.graph.decoder."): (m.enter.value, m.leave.value) for n, m in found.items()}


# ------------------------------------------------------------------------------------ written by hand


def test_gpt_is_planned_as_by_hand():
    derived = plan(graph(**GPT), sizes=MeshSizes(dp_shard=2, tp=2))
    column, row, copies = {"tp": 0, "fsdp": 1}, {"tp": 1, "fsdp": 0}, {"fsdp": 0}
    assert shards(derived) == {
        "embed.weight": column,
        "attention_norm.weight": copies,
        "attention_norm.bias": copies,
        "attention.qkv.weight": column,
        "attention.qkv.bias": {"tp": 0, "fsdp": 0},
        "attention.out.weight": row,
        "attention.out.bias": copies,
        "feed_forward_norm.weight": copies,
        "feed_forward_norm.bias": copies,
        "feed_forward.up.weight": column,
        "feed_forward.up.bias": {"tp": 0, "fsdp": 0},
        "feed_forward.down.weight": row,
        "feed_forward.down.bias": copies,
        "decoder.norm.weight": copies,
        "decoder.norm.bias": copies,
        "decoder.position.weight": copies,
    }
    assert derived.parameters["model.graph.embed.weight"].tied == ("model.graph.head.weight",)
    assert derived.units[-1] == "" and "model.graph.embed" not in derived.units  # a tied table is in one unit, the rest
    summed = {n.removeprefix("model.graph.decoder.blocks.0.") for n, p in derived.parameters.items() if p.summed}
    assert {n for n in summed if not n.startswith("model")} == {
        "attention_norm.weight",
        "attention_norm.bias",
        "attention.out.bias",
        "feed_forward_norm.weight",
        "feed_forward_norm.bias",
        "feed_forward.down.bias",
    }


def test_llama_is_planned_as_by_hand():
    derived = plan(graph(**LLAMA), sizes=MeshSizes(tp=2))
    assert shards(derived) == {
        "embed.weight": {"tp": 0},
        "attention_norm.weight": {},
        "attention.qkv.weight": {"tp": 0},
        "attention.out.weight": {"tp": 1},
        "attention.query_norm.weight": {},
        "attention.key_norm.weight": {},
        "feed_forward_norm.weight": {},
        "feed_forward.up.weight": {"tp": 0},
        "feed_forward.gate.weight": {"tp": 0},
        "feed_forward.down.weight": {"tp": 1},
        "decoder.norm.weight": {},
        "head.weight": {"tp": 0},
    }
    block = {
        "attention": ("gather T", "keep"),
        "attention.out": ("keep", "sum and scatter T"),
        "feed_forward": ("gather T", "keep"),
        "feed_forward.down": ("keep", "sum and scatter T"),
    }
    assert crossings(derived) == {
        "model.graph.embed": ("keep", "sum"),
        **{f"blocks.{i}.{name}": value for i in (0, 1) for name, value in block.items()},
        "blocks.0": ("own part of T", "keep"),
        "blocks.1": ("keep", "join T"),
        "model.graph.head": ("copy", "keep"),
    }
    assert derived.modules["loss"].apart
    assert derived.parameters["model.graph.decoder.blocks.0.attention.query_norm.weight"].summed
    assert {"model.graph.embed", "model.graph.head"} < set(derived.units)


def test_without_sequence_parallelism_branches_copy_and_sum():
    derived = plan(graph(**LLAMA), WHOLE_SEQUENCE, MeshSizes(tp=2))
    found = crossings(derived)
    assert found["blocks.0.attention"] == ("copy", "keep") and found["blocks.0.attention.out"] == ("keep", "sum")
    assert "blocks.0" not in found and "blocks.1" not in found
    summed = {n for n, p in derived.parameters.items() if p.summed}
    assert all("query_norm" in n or "key_norm" in n for n in summed) and len(summed) == 4  # norms of cut heads only


def test_experts_are_planned_as_by_hand():
    mixture = Mixture(number=4, per_token=2, shared_width=16)
    apart = plan(graph(tied=False, experts=mixture), sizes=MeshSizes(dp_shard=2, tp=2, ep=4))
    name = "model.graph.decoder.blocks.0.feed_forward"
    assert dict(apart.parameters[f"{name}.experts.gate"].shards) == {"ep": 0}
    assert apart.parameters[f"{name}.experts.gate"].local_shape == (1, 64, 32)
    assert apart.parameters[f"{name}.router.weight"].summed  # each rank of tp routes tokens of its own
    assert crossings(apart)["blocks.0.feed_forward.shared"] == ("gather T", "keep")
    assert apart.units[0] == f"{name}.experts"
    spread = plan(graph(tied=False, experts=mixture), sizes=MeshSizes(dp_shard=4, tp=2, ep=2))
    assert dict(spread.parameters[f"{name}.experts.down"].shards) == {"ep": 0, "efsdp": 1}
    inside = plan(graph(tied=False, experts=mixture), sizes=MeshSizes(dp_shard=2, tp=2))
    assert dict(inside.parameters[f"{name}.experts.gate"].shards) == {"tp": 1, "fsdp": 0}
    assert dict(inside.parameters[f"{name}.experts.down"].shards) == {"tp": 2, "fsdp": 0}
    assert not inside.parameters[f"{name}.router.weight"].summed
    assert crossings(inside)["blocks.0.feed_forward"] == ("join T", "own part of T")


def test_scores_are_joined_where_they_are_seen():
    derived = plan(model(**LLAMA), sizes=MeshSizes(tp=2))
    assert derived.modules["graph.head"].leave is Boundary.JOIN_SCORES


def test_scores_that_are_looked_at_stay_cut_in_training():
    with torch.device("meta"):
        loss, metric = nl.language.CrossEntropy(), TokenAccuracy()
        measured = training_graph(model(**LLAMA), loss, {"accuracy": metric})
    derived = plan(measured, sizes=MeshSizes(tp=2))
    assert derived.modules["loss"].apart
    assert derived.modules["accuracy"].enter is Boundary.JOIN_SCORES
    assert derived.modules["model.graph.head"].leave is Boundary.SHOW_SCORES


def test_one_rank_needs_nothing():
    derived = plan(graph(**LLAMA))
    assert derived.modules == {} and all(not p.shards for p in derived.parameters.values())


def test_parts_of_a_vocabulary_may_be_uneven():
    derived = plan(graph(**{**LLAMA, "vocab_size": 67}), sizes=MeshSizes(tp=4), kv_heads="replicate")
    assert derived.parameters["model.graph.head.weight"].local_shape == (17, 32)


def test_fewer_key_value_heads_than_ranks_need_a_decision():
    with pytest.raises(ParallelError, match="kv_heads=replicate"):
        plan(graph(**LLAMA), sizes=MeshSizes(tp=4))
    derived = plan(graph(**LLAMA), sizes=MeshSizes(tp=4), kv_heads="replicate")
    qkv = derived.parameters["model.graph.decoder.blocks.0.attention.qkv.weight"]
    assert dict(qkv.shards) == {} and qkv.summed
    assert dict(derived.parameters["model.graph.decoder.blocks.0.attention.out.weight"].shards) == {"tp": 1}


# ------------------------------------------------------------------------------------ modules of users


class Mixer(nl.NeuralModule):
    """A block of a user: a residual inside, a norm and a scale that only it knows."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(D=width, F=inner)
        self.norm = nl.nn.RMSNorm("D", width)
        self.up = nl.nn.Linear("D", "F", width, inner, bias=True)
        self.scale = Scale(inner)
        self.down = nl.nn.Linear("F", "D", inner, width, bias=True)

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return hidden + self.down(self.scale(self.up(self.norm(hidden)).sigmoid()))


class Scale(nl.NeuralModule):
    """Acts on features that are cut."""

    def __init__(self, inner: int) -> None:
        super().__init__(F=inner)
        self.weight = nn.Parameter(torch.ones(inner))
        self.declare_axes(weight="F")

    def forward(
        self, wide: Annotated[Tensor, NeuralType("... F", Hidden())]
    ) -> Annotated[Tensor, NeuralType("... F", Hidden())]:
        return wide * self.weight


class Stack(nl.NeuralModule):
    def __init__(self, width: int = 8, inner: int = 16, layers: int = 2) -> None:
        super().__init__(D=width)
        self.blocks = nn.ModuleList(Mixer(width, inner) for _ in range(layers))

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_a_module_of_a_user_is_planned_by_its_axes():
    derived = plan(Stack(), sizes=MeshSizes(dp_shard=2, tp=2))
    assert {n: dict(p.shards) for n, p in derived.parameters.items() if n.startswith("blocks.0")} == {
        "blocks.0.norm.weight": {"fsdp": 0},
        "blocks.0.up.weight": {"tp": 0, "fsdp": 1},
        "blocks.0.up.bias": {"tp": 0, "fsdp": 0},
        "blocks.0.scale.weight": {"tp": 0, "fsdp": 0},
        "blocks.0.down.weight": {"tp": 1, "fsdp": 0},
        "blocks.0.down.bias": {"fsdp": 0},
    }
    assert derived.modules["blocks.0.scale"].pattern is Pattern.BETWEEN
    # Mixer does not say that it is a branch, so each column gathers for itself and the residual is right.
    assert derived.modules["blocks.0.up"].enter is Boundary.GATHER
    assert derived.modules["blocks.0"].enter is Boundary.SPLIT


class Undeclared(nl.NeuralModule):
    def __init__(self) -> None:
        super().__init__(D=8)
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return hidden * self.weight


class Swapped(nl.NeuralModule):
    """Gate and value in one weight, the axis to be cut not outermost."""

    def __init__(self) -> None:
        super().__init__(D=8)
        self.up = nl.nn.Linear("D", "(2 F=16)", 8, 32)
        self.down = nl.nn.Linear("F", "D", 16, 8)

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        gate, value = self.up(hidden).chunk(2, -1)
        return self.down(gate * value)


class Alone(nl.NeuralModule):
    def __init__(self) -> None:
        super().__init__(D=8)
        self.up = nl.nn.Linear("D", "F", 8, 16)

    def forward(self, hidden: HiddenBTD) -> Annotated[Tensor, NeuralType("B T F", Hidden())]:
        return self.up(hidden)


class Blocks(nl.NeuralModule):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(D=8)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Across(nl.NeuralModule):
    """Looks at all positions at once."""

    def __init__(self) -> None:
        super().__init__(D=8)
        self.weight = nn.Parameter(torch.ones(8))
        self.declare_axes(weight="D")

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return hidden.cumsum(1) * self.weight


@pytest.mark.parametrize(
    "module, words",
    [
        (Undeclared(), ["without declared axes", "Undeclared", "declare_axes", "overrides"]),
        (Blocks(Undeclared()), ["blocks.0", "replicate"]),
        (Swapped(), ["up.weight", "only the major factor", "F outermost"]),
        (Alone(), ["up", "no counterpart", "replicate"]),
        (Blocks(Across()), ["blocks.0", "every position alone", "'... D'", "activations.T"]),
        (Stack(inner=15), ["tp does not divide F", "F=15", "ffn_width"]),
        (nn.Sequential(nn.Linear(4, 4)), ["Linear with weight, bias", "replicate"]),
    ],
    ids=["undeclared", "in_a_block", "not_major", "alone", "across", "indivisible", "plain"],
)
def test_what_fits_no_pattern_is_refused_by_name(module, words):
    with pytest.raises(ParallelError) as caught:
        plan(module, sizes=MeshSizes(tp=2))
    for word in words:
        assert word in str(caught.value)


def test_an_override_keeps_a_module_whole():
    derived = plan(Blocks(Across(), Mixer(8, 16)), sizes=MeshSizes(tp=2), overrides={"blocks.0": "replicate"})
    assert dict(derived.parameters["blocks.0.weight"].shards) == {}
    assert derived.modules["blocks.0"].leave is Boundary.SPLIT  # and enters whole, being the first of the stack
    with pytest.raises(ParallelError, match="matches no module"):
        plan(Stack(), sizes=MeshSizes(tp=2), overrides={"block.7": "replicate"})


def test_every_rank_needs_a_row_of_a_vocabulary():
    with pytest.raises(ParallelError, match="nothing of the vocabulary"):
        plan(nl.nn.Embedding("V", "D", 9, 4), sizes=MeshSizes(tp=4))


def test_an_override_says_what_axes_leave_open():
    class Square(nl.NeuralModule):
        def __init__(self) -> None:
            super().__init__(D=8)
            self.first = nl.nn.Linear("D", "D", 8, 8)
            self.second = nl.nn.Linear("D", "D", 8, 8)

        def forward(self, hidden: HiddenBTD) -> HiddenBTD:
            return self.second(self.first(hidden).relu())

    derived = plan(Square(), sizes=MeshSizes(tp=2), overrides={"first": "column", "second": "row"})
    assert dict(derived.parameters["first.weight"].shards) == {"tp": 0}
    assert dict(derived.parameters["second.weight"].shards) == {"tp": 1}


def test_heads_that_tp_does_not_divide_name_the_setting():
    with pytest.raises(ParallelError, match=r"model\.kv_heads|model\.heads"):
        plan(graph(heads=2, width=24), sizes=MeshSizes(tp=3))
    with pytest.raises(ParallelError, match=r"model\.experts"):
        plan(graph(experts=Mixture(number=6, per_token=2)), sizes=MeshSizes(dp_shard=4, ep=4))


# ------------------------------------------------------------------------------------ snapshots

CASES = {
    "gpt_8": (GPT, MeshSizes(dp_shard=4, tp=2)),
    "gpt_1024": ({**GPT, "width": 2048, "heads": 16, "ffn_width": 8192}, MeshSizes(dp_shard=128, tp=8)),
    "llama_8": (LLAMA, MeshSizes(dp_replicate=2, dp_shard=2, tp=2)),
    "llama_1024": (
        {"width": 8192, "heads": 64, "kv_heads": 8, "ffn_width": 28672, "vocab_size": 128256, "tied": False},
        MeshSizes(pp=4, dp_shard=32, tp=8),
    ),
    "experts_8": ({"experts": Mixture(8, 2), "tied": False}, MeshSizes(dp_shard=8, ep=4)),
    "experts_1024": (
        {"width": 4096, "heads": 32, "kv_heads": 8, "ffn_width": 14336, "experts": Mixture(8, 2), "tied": False},
        MeshSizes(dp_replicate=4, dp_shard=32, tp=8, ep=8),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_as_reviewed(name):
    changes, sizes = CASES[name]
    text = plan(graph(**changes), sizes=sizes).explain() + "\n"
    snapshot = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("NEMOLET_UPDATE_GOLDEN"):
        SNAPSHOTS.mkdir(exist_ok=True)
        snapshot.write_text(text)
    assert text == snapshot.read_text()
