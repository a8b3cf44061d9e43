"""Checkpoints of every layout, read into every other."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from tables import OFF
from torch.distributed.tensor import DTensor
from training_runs import EXPERTS, LAYOUTS, make_graph, reference, result, train

import nemolet as nl
from nemolet.errors import TrainingError
from nemolet.parallel.checkpoint import ShardReader, remove_remains
from nemolet.training import ExponentialAverage, MeshStrategy, Optim
from nemolet.training.checkpoint import AtomicCheckpoints
from nemolet.training.folders import FolderCheckpoints
from nemolet.training.placement import stored_weights

STEPS, CUT = 3, 2
ONE = {}


class Save(pl.Callback):
    """Saves after one step."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, module, *unused):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def save(sizes, path, kind="llama", optim=None, background=False, callbacks=()):
    strategy = MeshStrategy(**sizes, checkpoint_io=FolderCheckpoints(background=background))
    return result(*train(strategy, kind, optim=optim, steps=STEPS, callbacks=[*callbacks, Save(path, CUT)]))


def resume(targets, path, kind="llama", optim=None):
    found = {}
    for name, sizes in targets.items():
        strategy, few = MeshStrategy(**sizes), {"limit_val_batches": 1}  # training is compared
        found[name] = result(*train(strategy, kind, optim=optim, steps=STEPS, resume=path, **few))
    return found


def assert_goes_on(found, kind="llama", optim=None, exact=None, place=None):
    expected = reference(kind, optim, steps=STEPS)
    assert found["losses"] == pytest.approx(expected["losses"][CUT:], rel=1e-6)
    for name, weight in found["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], rtol=1e-6, atol=1e-9, msg=name)
        assert exact is None or torch.equal(weight, exact[name]), name
        if place is not None:
            against = expected["weights"][name] if exact is None else exact[name]
            error = ((weight - against).abs().max() / against.abs().max().clamp(min=1e-9)).item()
            writer, reader = place
            row = OFF.setdefault(kind, {}).setdefault(writer, {})
            row[reader] = max(error, row.get(reader, 0.0))


def save_all(folder, layouts, kind="llama"):
    return {layout: save(sizes, folder / layout / "step.ckpt", kind)["weights"] for layout, sizes in layouts.items()}


def saved_by_all(ranks, folder, layouts, kind):
    """By layout the weights of the run that went on without a break."""
    weights = {layout: {} for layout in layouts}
    for each in ranks(4, save_all, folder, layouts, kind):
        for layout, held in each.items():
            weights[layout] |= held
    return folder, weights


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A checkpoint of every layout: the folder, and by layout the weights of the run that went on without a break."""
    return saved_by_all(ranks, tmp_path_factory.mktemp("saved"), LAYOUTS, "llama")


@pytest.fixture(scope="module")
def saved_experts(ranks, tmp_path_factory):
    """The same of a mixture of experts."""
    return saved_by_all(ranks, tmp_path_factory.mktemp("experts"), EXPERTS, "moe")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_any_layout_goes_on_in_any_other(ranks, layout, saved):
    folder, weights = saved
    path = folder / layout / "step.ckpt"
    assert (path / "files.json").exists() and (folder / layout / "last").resolve() == path
    for found in ranks(4, resume, LAYOUTS, path):
        for target, state in found.items():
            exact = weights[target] if target == layout else None
            assert_goes_on(state, exact=exact, place=(layout, target))
    other = {"fsdp": {"dp_shard": 2}, "tp": {"tp": 2}}
    for target, state in ranks(2, resume, other, path)[0].items():
        assert_goes_on(state, place=(layout, f"2 {target}"))
    assert_goes_on(resume({"one": ONE}, path)["one"], place=(layout, "one"))


@pytest.mark.parametrize("layout", EXPERTS)
def test_experts_go_on_in_any_layout(ranks, layout, saved_experts):
    folder, weights = saved_experts
    path = folder / layout / "step.ckpt"
    for found in ranks(4, resume, EXPERTS, path, "moe"):
        for target, state in found.items():
            exact = weights[target] if target == layout else None
            assert_goes_on(state, "moe", exact=exact, place=(layout, target))
    two = ranks(2, resume, {"ep": {"dp_shard": 2, "ep": 2}}, path, "moe")[0]["ep"]
    assert_goes_on(two, "moe", place=(layout, "2 ep"))
    assert_goes_on(resume({"one": ONE}, path, "moe")["one"], "moe", place=(layout, "one"))


# ---------------------------------------------------------------- what else it holds, and other ways to write it


@pytest.mark.parametrize("layout", ["tp_fsdp", "pp_fsdp"])
def test_the_single_file_of_one_rank_goes_on_in_any_layout(ranks, layout, tmp_path):
    path = tmp_path / "step.ckpt"
    callbacks = [ExponentialAverage(0.5), Save(path, CUT)]
    train(
        "auto",
        optim=Optim("muon", lr=1e-2),
        steps=STEPS,
        callbacks=callbacks,
        plugins=[AtomicCheckpoints(background=False)],
    )
    assert path.is_file()
    muon = Optim("muon", lr=1e-2)
    for found in ranks(4, resume, {layout: LAYOUTS[layout]}, path, "llama", muon):
        assert found[layout]["losses"] == pytest.approx(reference("llama", muon, steps=STEPS)["losses"][CUT:], rel=1e-6)


def test_a_checkpoint_in_the_background_holds_the_state_of_its_step(ranks, tmp_path):
    path = tmp_path / "step.ckpt"
    ranks(4, save, LAYOUTS["tp_fsdp"], path, background=True)
    for found in ranks(4, resume, {"fsdp": LAYOUTS["fsdp"]}, path):
        assert_goes_on(found["fsdp"])


class Seed(pl.Callback):
    """Lets each rank draw other numbers, as training by config does for ranks of other samples."""

    def on_train_start(self, trainer, module):
        torch.manual_seed(trainer.global_rank)


def test_ranks_that_compute_together_draw_the_same_numbers(ranks, tmp_path):
    """Ranks of other samples drop other features; those that come to share an activation must not."""
    path = tmp_path / "step.ckpt"
    ranks(4, save, LAYOUTS["fsdp"], path, "dropout", callbacks=[Seed()])
    whole_sequences = {"tp": 2, "dp_shard": 2, "rules": {"activations": {"T": "cp"}}}
    first, *others = (found["tp"]["weights"] for found in ranks(4, resume, {"tp": whole_sequences}, path, "dropout"))
    for other in others:
        for name, weight in other.items():
            assert torch.equal(weight, first[name]), name


def average(sizes, path, resumed):
    kept = ExponentialAverage(0.5)
    callbacks = [kept] if resumed else [kept, Save(path, CUT)]
    train(
        MeshStrategy(**sizes) if sizes else "auto", steps=STEPS, callbacks=callbacks, resume=path if resumed else None
    )
    return {n: a.full_tensor() if isinstance(a, DTensor) else a for n, a in kept.average.items()}


@pytest.mark.parametrize(("first", "second"), [("fsdp", "pp_tp"), ("pp_fsdp", "tp_fsdp")])
def test_averages_travel_between_layouts(ranks, first, second, tmp_path):
    path = tmp_path / "step.ckpt"
    ranks(4, average, LAYOUTS[first], path, False)
    expected = average({}, tmp_path / "one.ckpt", False)
    for found in ranks(4, average, LAYOUTS[second], path, True):
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.fixture(scope="module")
def stored(saved):
    """A checkpoint that no test changes."""
    return saved[0] / "tp_fsdp" / "step.ckpt"


def test_an_archive_is_written_from_the_parts_one_tensor_at_a_time(stored, tmp_path):
    model = make_graph().model.double()
    nl.save(tmp_path / "m.nemolet", model=model, weights=stored_weights(stored))
    found = nl.load(tmp_path / "m.nemolet").model.double().state_dict()
    reader = ShardReader(stored)
    for name, weight in found.items():
        key = f"weights.graph.model.{name}"
        if key in reader.entries:
            torch.testing.assert_close(weight, reader.one(key).float().double(), rtol=0, atol=0)


def copied(stored, tmp_path):
    return Path(shutil.copytree(stored, tmp_path / "copy.ckpt"))


def test_a_missing_or_cut_shard_is_named(stored, tmp_path):
    path = copied(stored, tmp_path)
    shard = sorted(path.glob("*.distcp"))[-1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainingError, match=f"cut off(.|\n)*{shard.name}"):
        ShardReader(path)
    shard.unlink()
    with pytest.raises(TrainingError, match=f"missing(.|\n)*{shard.name}"):
        ShardReader(path)
    (path / "files.json").unlink()
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        resume({"one": ONE}, path)


def test_nothing_in_the_index_is_executed(stored, tmp_path):
    path = copied(stored, tmp_path)
    index, trace = path / ".metadata", tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (trace,))

    index.write_bytes(pickle.dumps(Hostile()).ljust(index.stat().st_size, b"\0"))
    with pytest.raises(TrainingError, match="index of shards"):
        ShardReader(path)
    assert not trace.exists()


def test_another_model_or_optimizer_is_refused(stored):
    with pytest.raises(TrainingError, match=r"another model(.|\n)*attention_norm.bias is missing"):
        resume({"one": ONE}, stored, kind="gpt")
    with pytest.raises(TrainingError, match=r"another optimizer(.|\n)*Muon"):
        resume({"one": ONE}, stored, optim=Optim("muon", lr=1e-2))


def test_a_half_done_exchange_of_folders_is_undone(stored, tmp_path):
    path = copied(stored, tmp_path)
    path.rename(tmp_path / ".copy.ckpt.old")
    (tmp_path / ".other.ckpt.partial").mkdir()
    remove_remains(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["copy.ckpt"]
