"""Checkpoints of every layout, read into every other."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from tables import OFF
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor
from training_runs import EXPERTS, LAYOUTS, make_graph, reference, result, train, whole

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


class StepAfter(pl.Callback):
    """Before each step reads another checkpoint; notes the loss of the step, and the weights after it."""

    def __init__(self, paths):
        self.paths, self.found = dict(paths), {}
        self.waiting = list(self.paths)

    def on_train_batch_start(self, trainer, module, *unused):
        assert trainer.strategy.load_checkpoint(self.paths[self.waiting[0]])["global_step"] == CUT

    def on_train_batch_end(self, trainer, module, outputs, *unused):
        after = {name: tensor.clone() for name, tensor in whole(module).items()}
        self.found[self.waiting.pop(0)] = {"losses": [float(outputs["loss"])], "weights": after}


def step_after(readers, paths, kind="llama"):
    """By layout and by checkpoint, what the step comes to that follows; one trainer reads them all."""
    found = {}
    for name, sizes in readers.items():
        notes = StepAfter(paths)
        train(MeshStrategy(**sizes), kind, steps=len(paths), only=CUT, callbacks=[notes], limit_val_batches=0)
        found[name] = notes.found
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


class Written:
    """A checkpoint of each layout."""

    def __init__(self, ranks, folder, kind, layouts):
        self.kind, self.layouts = kind, layouts
        self.paths = {layout: folder / layout / "step.ckpt" for layout in layouts}
        self.weights = {layout: {} for layout in layouts}  # of the run that went on without a break
        for each in ranks(4, save_all, self.paths, layouts, kind):
            for layout, held in each.items():
                self.weights[layout] |= held

    def read(self, ranks, fewer):
        """What each layout makes of each checkpoint: by rank, reader and writer."""
        found = ranks(4, step_after, self.layouts, self.paths, self.kind)
        found.append({f"2 {name}": own for name, own in ranks(2, step_after, fewer, self.paths, self.kind)[0].items()})
        return [*found, step_after({"one": ONE}, self.paths, self.kind)]

    def check(self, writer, found):
        """Every rank of every layout went on from the checkpoint of this one."""
        for of_rank in found:
            for reader, each in of_rank.items():
                exact = self.weights[writer] if reader == writer else None
                assert_goes_on(each[writer], self.kind, exact=exact, place=(writer, reader))


def save_all(paths, layouts, kind):
    return {layout: save(sizes, paths[layout], kind)["weights"] for layout, sizes in layouts.items()}


@pytest.fixture(scope="module")
def written(ranks, tmp_path_factory):
    return Written(ranks, tmp_path_factory.mktemp("written"), "llama", LAYOUTS)


@pytest.fixture(scope="module")
def read(ranks, written):
    return written.read(ranks, {"fsdp": {"dp_shard": 2}, "tp": {"tp": 2}})


@pytest.fixture(scope="module")
def written_experts(ranks, tmp_path_factory):
    """The same of a mixture of experts."""
    return Written(ranks, tmp_path_factory.mktemp("experts"), "moe", EXPERTS)


@pytest.fixture(scope="module")
def read_experts(ranks, written_experts):
    return written_experts.read(ranks, {"ep": {"dp_shard": 2, "ep": 2}})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_any_layout_goes_on_in_any_other(layout, written, read):
    path = written.paths[layout]
    assert (path / "files.json").exists() and (path.parent / "last").resolve() == path
    written.check(layout, read)


@pytest.mark.parametrize("layout", EXPERTS)
def test_experts_go_on_in_any_layout(layout, written_experts, read_experts):
    written_experts.check(layout, read_experts)


@pytest.mark.parametrize("kind", ["llama", "moe"])
def test_a_run_goes_on_bit_by_bit_in_its_layout(ranks, kind, request):
    """Through all of Lightning's resuming: progress, position of the data, optimizer, weights."""
    states = request.getfixturevalue("written" if kind == "llama" else "written_experts")
    for of_rank in ranks(4, resume_each, states.layouts, states.paths, kind):
        for layout, found in of_rank.items():
            assert_goes_on(found, kind, exact=states.weights[layout])


def resume_each(layouts, paths, kind):
    return {layout: resume({layout: sizes}, paths[layout], kind)[layout] for layout, sizes in layouts.items()}


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


def save_late(sizes, path):
    write, over = FileSystemWriter.write_data, threading.Event()

    def write_late(*args):
        assert over.wait(60)
        return write(*args)

    class Over(pl.Callback):
        def on_train_batch_end(self, trainer, *unused):
            if trainer.global_step > CUT:
                over.set()

    with mock.patch.object(FileSystemWriter, "write_data", write_late):
        save(sizes, path, background=True, callbacks=[Over()])


def test_a_checkpoint_in_the_background_holds_the_state_of_its_step(ranks, tmp_path):
    """Its files are written when the next step is over."""
    path = tmp_path / "step.ckpt"
    ranks(4, save_late, LAYOUTS["tp_fsdp"], path)
    for found in ranks(4, resume, {"fsdp": LAYOUTS["fsdp"]}, path):
        assert_goes_on(found["fsdp"])


def test_checkpoints_that_are_saved_at_once_are_all_whole(ranks, tmp_path):
    """In the background: one, another, and the first once more, with no step between them."""
    paths = {name: tmp_path / f"{name}.ckpt" for name in ("one", "two")}
    also = [Save(paths["two"], CUT), Save(paths["one"], CUT)]
    ranks(4, save, LAYOUTS["pp_fsdp"], paths["one"], background=True, callbacks=[Save(paths["one"], CUT), *also])
    assert (tmp_path / "last").resolve() == paths["one"] and len(list(tmp_path.iterdir())) == 3
    for found in ranks(4, step_after, {"fsdp": LAYOUTS["fsdp"]}, paths):
        for name in paths:
            assert_goes_on(found["fsdp"][name])


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
def stored(written):
    """A checkpoint that no test changes."""
    return written.paths["tp_fsdp"]


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


def test_a_folder_that_takes_its_name_is_not_read(stored, written, tmp_path):
    """As when a step is saved again, or an old checkpoint is removed, while somebody reads."""
    path = copied(stored, tmp_path)
    reader = ShardReader(path)
    name = next(key for key in reader.entries if key.startswith("weights."))
    expected = reader.one(name)
    path.rename(tmp_path / "old.ckpt")
    shutil.copytree(written.paths["fsdp"], path)
    assert torch.equal(reader.one(name), expected) and reader.rest()["layout"]["tp"] == 2
    assert ShardReader(path).rest()["layout"]["tp"] == 1


@pytest.mark.parametrize("how", ["exchanged", "cut", "removed"])
def test_a_shard_that_changes_after_the_check_is_refused(stored, written, tmp_path, how):
    path = copied(stored, tmp_path)
    reader = ShardReader(path)
    for shard in path.glob("*.distcp"):
        if how == "exchanged":
            other = written.paths["fsdp"] / shard.name
            copy = shard.with_name("new")
            copy.write_bytes(other.read_bytes())
            copy.replace(shard)
        elif how == "cut":
            with shard.open("r+b") as file:
                file.truncate(shard.stat().st_size // 2)
        else:
            shard.unlink()
    message = "missing" if how == "removed" else "was changed while the folder was read"
    with pytest.raises(TrainingError, match=message):
        reader.one(next(iter(reader.entries)))


def test_files_outside_of_the_folder_are_not_read(stored, tmp_path):
    path = copied(stored, tmp_path)
    sizes = json.loads((path / "files.json").read_text())
    (path / "files.json").write_text(json.dumps({**sizes, "../copy.ckpt/state.pt": sizes["state.pt"]}))
    with pytest.raises(TrainingError, match=r"missing(.|\n)*\.\./copy.ckpt"):
        ShardReader(path)


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
