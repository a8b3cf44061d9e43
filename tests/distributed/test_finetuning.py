"""``nemolet finetune`` over a mesh: each rank reads of the archive what it keeps, and learns what one rank learns."""

from __future__ import annotations

import csv

import pytest
import torch

import nemolet as nl
from nemolet.cli import main
from nemolet.parallel.deferred import Deferred
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


@pytest.mark.parametrize("addition", [("adapter=lora",), ("task=prompt", "model.length=2")])
def test_additions_are_not_spread(addition, base, tmp_path, capsys):
    overrides = ["parallel=fsdp", "parallel.dp_shard=2", "trainer.devices=2", *addition, "data=text"]
    where = [f"data.path={base.parent / 'fox.txt'}", f"data.cache={tmp_path}", f"folder={tmp_path / 'run'}"]
    assert main(["finetune", f"archive={base}", "schedule.warmup_steps=1", *overrides, *where]) == 2
    said = capsys.readouterr().err
    assert "parallel=one" in said and addition[0].removesuffix("=lora") in said
