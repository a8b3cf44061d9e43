"""Checkpoints of every layout, read into every other."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from runs import LAYOUTS, reference, result, train

from nemolet.training import MeshStrategy
from nemolet.training.folders import FolderCheckpoints

STEPS, CUT = 4, 2
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
        found[name] = result(*train(MeshStrategy(**sizes), kind, optim=optim, steps=STEPS, resume=path))
    return found


def assert_goes_on(found, kind="llama", optim=None, exact=None):
    expected = reference(kind, optim, steps=STEPS)
    assert found["losses"] == pytest.approx(expected["losses"][CUT:], rel=1e-6)
    for name, weight in found["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], rtol=1e-6, atol=1e-9, msg=name)
        assert exact is None or torch.equal(weight, exact[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_any_layout_goes_on_in_any_other(ranks, layout, tmp_path):
    path = tmp_path / "step.ckpt"
    before = {
        name: weight for each in ranks(4, save, LAYOUTS[layout], path) for name, weight in each["weights"].items()
    }
    assert (path / "files.json").exists() and (tmp_path / "last").resolve() == path
    for found in ranks(4, resume, LAYOUTS, path):
        for target, state in found.items():
            assert_goes_on(state, exact=before if target == layout else None)
    other = {"fsdp": {"dp_shard": 2}, "tp": {"tp": 2}}
    for state in ranks(2, resume, other, path)[0].values():
        assert_goes_on(state)
    assert_goes_on(resume({"one": ONE}, path)["one"])
