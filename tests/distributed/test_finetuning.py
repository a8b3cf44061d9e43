"""``nemolet finetune`` over a mesh: each rank reads of the archive what it keeps, and learns what one rank learns."""

from __future__ import annotations

import csv

import parity
import pytest
import torch

import nemolet as nl
from nemolet.cli import main
from nemolet.nn.adapter_files import load_adapter
from nemolet.nn.adapters import Adapter, adapt, adapted_layers, merge
from nemolet.parallel import MeshSizes, make_mesh, parallelize
from nemolet.parallel.deferred import Deferred
from nemolet.parallel.plan import plan
from nemolet.tokenizers import CharTokenizer

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
SIZES = {"vocab_size": 32, "layers": 2, "width": 16, "heads": 2, "kv_heads": 2, "context": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An archive in half precision, with a tied head, and a text."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = nl.language.CausalLM(**SIZES).bfloat16()
    (folder / "fox.txt").write_text(TEXT)
    return nl.save(folder / "base.nemolet", model=model, tokenizer=CharTokenizer("".join(sorted(set(TEXT)))))


def command(folder, base, overrides):
    """Fine-tune by the command line; the losses, and whether the weights were read while the model was spread."""
    read = []

    class Seen(Deferred):
        def values(self, module):
            read.append(all(p.is_meta for p in module.get_submodule("model").parameters()))
            return super().values(module)

    from nemolet.cli import finetune

    before, finetune.Deferred = finetune.Deferred, Seen
    try:
        data = ["data=text", f"data.path={base.parent / 'fox.txt'}", f"data.cache={folder.parent / 'tokens'}"]
        steps = ["trainer.max_steps=3", "trainer.log_every=1", "trainer.valid_every=3", "schedule.warmup_steps=1"]
        quiet = ["trainer.loggers=[]", "trainer.accelerator=cpu", "trainer.progress=false", f"folder={folder}"]
        assert main(["finetune", f"archive={base}", *data, *steps, *quiet, *overrides]) == 0
    finally:
        finetune.Deferred = before
    with (folder / "metrics.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]], read


def test_a_mesh_learns_from_an_archive_as_one_rank_does(ranks, base, tmp_path):
    alone, read = command(tmp_path / "one", base, ["data.batch_size=4"])
    assert len(alone) == 3 and not read
    expected = nl.load(tmp_path / "one").model.state_dict()
    for name, size, batch in (("fsdp", "dp_shard", 2), ("tp", "tp", 4)):
        overrides = [f"parallel={name}", f"parallel.{size}=2", "trainer.devices=2", f"data.batch_size={batch}"]
        for losses, read in ranks(2, command, tmp_path / name, base, overrides):
            assert read == [True]
            assert losses == pytest.approx(alone, rel=1e-5)
        for key, tensor in nl.load(tmp_path / name).model.state_dict().items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5)


MESHES = {
    "fsdp": ["parallel=fsdp", "parallel.dp_shard=2", "data.batch_size=2"],
    "tp": ["parallel=tp", "parallel.tp=2", "data.batch_size=4"],
    "pp": ["parallel=pp", "parallel.pp=2", "data.batch_size=4"],
}


def on_meshes(folder, base, overrides, meshes):
    """Losses by mesh; runs on every rank."""
    return {name: command(folder / name, base, [*MESHES[name], "trainer.devices=2", *overrides])[0] for name in meshes}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_additions_learn_on_a_mesh_what_they_learn_on_one_rank(ranks, base, tmp_path, dora):
    """Losses, the merged model, and the addition, which is written whole and makes the base that model."""
    # A small rate: the first gradient of half of an addition is zero, and Adam divides the next by next to nothing.
    overrides = ["adapter=dora" if dora else "adapter=lora", "adapter.rank=3", "optim.lr=0.001"]
    alone, _ = command(tmp_path / "one", base, ["data.batch_size=4", *overrides])
    expected = nl.load(tmp_path / "one").model.state_dict()
    for losses in ranks(2, on_meshes, tmp_path, base, overrides, list(MESHES)):
        for name in MESHES:
            assert losses[name] == pytest.approx(alone, rel=1e-5), name
    for name in MESHES:
        again = nl.load(base, dtype=torch.float32).model
        load_adapter(again, tmp_path / name / "adapter")
        found = nl.load(tmp_path / name).model.state_dict()
        assert found.keys() == expected.keys()
        for key, tensor in merge(again).state_dict().items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")
            torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")


def added(sizes, dora, kv_heads):
    """Gradients of additions that are not zero, in a graph that is spread."""
    graph = parity.build("llama", kv_heads=kv_heads, bias=True)
    adapt(graph, Adapter(rank=3, alpha=3.0, dora=dora))
    torch.manual_seed(4)
    for _, layer in adapted_layers(graph):
        layer.up.data.normal_(std=0.1)
    if sizes is None:
        return parity.train(graph)
    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    parallelize(graph, plan(graph, sizes=mesh.sizes, kv_heads="replicate"), mesh)
    return parity.train(graph, mesh.data_rank, mesh.data_ranks)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_gradients_of_additions_are_those_of_one_rank(ranks, dora, kv_heads):
    expected = added(None, dora, kv_heads)
    assert expected.gradients[0] and all("base" not in name for name in expected.weights)
    for found in ranks(4, added, {"tp": 2, "dp_shard": 2}, dora, kv_heads):
        parity.assert_same(found, expected)


def test_a_teacher_is_spread_beside_its_student(ranks, base, tmp_path):
    torch.manual_seed(5)
    teacher = nl.save(
        tmp_path / "teacher.nemolet",
        model=nl.language.CausalLM(**{**SIZES, "width": 24, "layers": 1}),
        tokenizer=nl.load(base).tokenizer,
    )
    overrides = [f"teacher={teacher}", "optim.lr=0.01"]
    alone, _ = command(tmp_path / "one", base, ["data.batch_size=4", *overrides])
    expected = nl.load(tmp_path / "one").model.state_dict()
    for losses in ranks(2, on_meshes, tmp_path, base, overrides, ["fsdp", "tp"]):
        for name in ("fsdp", "tp"):
            assert losses[name] == pytest.approx(alone, rel=1e-5), name
    for name in ("fsdp", "tp"):
        for key, tensor in nl.load(tmp_path / name).model.state_dict().items():
            # Where a gradient is near zero, AdamW makes much of its rounding; a wrong one would move a weight by 0.01.
            torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-4, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    "overrides", [["task=prompt", "model.length=2"], ["adapter=lora", "adapter.quantize=nf4"]], ids=["prompt", "nf4"]
)
def test_what_is_not_spread_is_refused(base, tmp_path, capsys, overrides):
    mesh = ["parallel=fsdp", "parallel.dp_shard=2", "trainer.devices=2", "schedule.warmup_steps=1"]
    where = [
        "data=text",
        f"data.path={base.parent / 'fox.txt'}",
        f"data.cache={tmp_path}",
        f"folder={tmp_path / 'run'}",
    ]
    assert main(["finetune", f"archive={base}", *mesh, *overrides, *where]) == 2
    assert "parallel=one" in capsys.readouterr().err
