"""Optimizers and schedules, against torch and transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

import nemolet as nl
from nemolet.errors import TrainingError
from nemolet.nn import RelativePositions
from nemolet.training import Optim, Schedule
from nemolet.training.folders import reader
from nemolet.training.optim import Pair, group_parameters, states
from nemolet.training.rates import LayeredOptim


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nl.language.CausalLM(
        vocab_size=11,
        layers=1,
        width=8,
        heads=2,
        context=16,
        norm="layer",
        position="learned",
        bias=True,
        gated=False,
        activation="gelu",
        tied=False,
    )


def test_rates_by_layer_keep_the_names_of_parameters(model):
    optimizer = LayeredOptim(layer_decay=0.5).make(model)
    named = {name: p for group in optimizer.param_groups for name, p in zip(group["param_names"], group["params"])}
    assert {name: id(p) for name, p in named.items()} == {name: id(p) for name, p in model.named_parameters()}


def test_a_state_without_names_is_refused_where_names_are_needed(model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens=torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    torch.save({"state_dict": {}, "optimizer_states": [optimizer.state_dict()]}, tmp_path / "a.ckpt")
    with pytest.raises(TrainingError, match="does not name its parameters"):
        reader(tmp_path / "a.ckpt")
    assert reader(tmp_path / "a.ckpt", optimizer=False).entries == {}


def state_tensors(optimizer):
    for inner in optimizer.both if isinstance(optimizer, Pair) else (optimizer,):
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def step(model, optimizer, keep=None):
    tokens = torch.arange(8).reshape(1, 8)
    model(tokens).square().mean().backward()
    if keep is not None:
        keep += [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    optimizer.zero_grad()


def test_groups_follow_the_axes(model):
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {k: sorted(names[id(p)].removeprefix("graph.") for p in ps) for k, ps in group_parameters(model).items()}
    assert groups["table"] == ["embed.weight", "head.weight"]
    assert "decoder.position.weight" in groups["vector"]
    assert all("weight" in n and "norm" not in n for n in groups["matrix"])
    assert sum(map(len, groups.values())) == len(names)


def test_no_decay_on_norms_and_biases(model):
    for name in ("adamw", "muon"):
        optimizer = Optim(name, weight_decay=0.3).make(model)
        decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert len(decay) == len(list(model.parameters()))
        for parameter_name, parameter in model.named_parameters():
            expected = 0.0 if parameter.ndim < 2 or "position" in parameter_name else 0.3
            assert decay[id(parameter)] == expected


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_every_optimizer_learns_and_restores_exactly(model, name):
    optimizer = Optim(name, lr=1e-2).make(model)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before) if p.grad is not None)
    twin = copy.deepcopy(model)
    second = Optim(name, lr=1e-2).make(twin)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, second)):
        step(m, o)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(state_tensors(optimizer), state_tensors(second)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_what_is_kept_is_known_before_training(model, name, tied):
    if tied:
        model.graph.head.weight = model.graph.embed.weight
    expected = states(Optim(name), model)
    assert all(p.device.type == "cpu" and p.grad is None for p in model.parameters())
    optimizer = Optim(name).make(model)
    step(model, optimizer)
    names = {id(p): n for n, p in model.named_parameters()}
    found = dict.fromkeys(names.values(), 0)
    for inner in optimizer.both if isinstance(optimizer, Pair) else (optimizer,):
        for parameter, state in inner.state.items():
            found[names[id(parameter)]] += sum(value.numel() for value in state.values() if value.ndim)
    assert expected == found


def test_adamw_equals_torch(model):
    twin = copy.deepcopy(model)
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = Optim(lr=1e-2, weight_decay=0.0).make(model)
    for _ in range(3):
        step(model, optimizer)
        step(twin, reference)
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # rounding near zero, after steps of 1e-2


def test_muon_orthogonalises_matrices(model):
    matrix = group_parameters(model)["matrix"][0]
    before = matrix.detach().clone()
    optimizer = Optim("muon", lr=1e-2, weight_decay=0.0).make(model)
    step(model, optimizer, keep=(kept := []))
    gradient = kept[[p is matrix for p in model.parameters()].index(True)]
    values = torch.linalg.svdvals(matrix.detach() - before)
    plain = torch.linalg.svdvals(gradient)
    assert values.median() / values.max() > 0.5  # most directions move alike, which the gradient does not
    assert plain.median() / plain.max() < 0.35


def test_muon_needs_a_matrix():
    with pytest.raises(TrainingError, match="no matrix"):
        Optim("muon").make(nl.nn.LayerNorm("D", 4))


def test_a_schedule_reaches_both_halves_of_muon(model):
    optimizer = Optim("muon", lr=1.0).make(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5**s)
    step(model, optimizer)
    scheduler.step()
    assert {g["lr"] for inner in optimizer.both for g in inner.param_groups} == {0.5}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Schedule("cosine", warmup_steps=10, min_ratio=0.0), get_cosine_schedule_with_warmup),
        (Schedule("linear", warmup_steps=10, min_ratio=0.0), get_linear_schedule_with_warmup),
    ],
)
def test_schedules_equal_transformers(ours, theirs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = theirs(optimizer, num_warmup_steps=10, num_training_steps=100)
    for number in range(100):
        expected = optimizer.param_groups[0]["lr"]
        # They start the warm-up at zero, which wastes a step; we reach the peak one step earlier.
        found = ours.factor(number - 1, 100) if number else 0.0  # theirs begins at zero, a step earlier
        if number:
            assert found == pytest.approx(expected, abs=1e-6)
        optimizer.step()
        reference.step()


def test_the_other_schedules():
    wsd = Schedule("wsd", warmup_steps=10, min_ratio=0.0, decay_ratio=0.5)
    assert [wsd.factor(s, 110) for s in (10, 59, 84, 109)] == pytest.approx([1, 1, 0.5, 0])
    root = Schedule("inverse_sqrt", warmup_steps=4)
    assert root.factor(15, 100) == pytest.approx(0.5)
    assert Schedule("constant", warmup_steps=2).factor(99, 100) == 1.0
    for name in ("cosine", "linear", "wsd"):
        assert Schedule(name, warmup_steps=0, min_ratio=0.1).factor(1000, 1000) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 2), (1, 3), (2, 3), (5, 40)])
def test_a_schedule_ends_where_it_says(name, warmup, total):
    schedule = Schedule(name, warmup_steps=warmup, min_ratio=0.25)
    factors = [schedule.factor(step, total) for step in range(total)]
    assert max(factors) == 1.0
    assert factors[-1] == pytest.approx(0.25)
    assert factors[max(0, warmup - 1) :] == sorted(factors[max(0, warmup - 1) :], reverse=True)


def test_only_matrices_are_orthogonalised():
    parts = {
        "phones": nl.nn.Embedding("P", "D", 7, 4),
        "relative": RelativePositions(2),
        "kernel": torch.nn.Conv1d(4, 4, 3, bias=False),
        "inner": nl.nn.Linear("D", "F", 4, 6),
    }
    groups = group_parameters(torch.nn.ModuleDict(parts))
    found = {kind: {id(parameter) for parameter in parameters} for kind, parameters in groups.items()}
    assert found["matrix"] == {id(parts["inner"].weight)}
    assert found["table"] == {id(parts[name].weight) for name in ("phones", "relative", "kernel")}
    Optim("muon").make(torch.nn.ModuleDict(parts))
