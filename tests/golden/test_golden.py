"""Composed configs against their snapshots: a change of a preset is seen where it is reviewed.

``NEMOLET_UPDATE_GOLDEN=1 pytest tests/golden`` writes the snapshots anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from nemolet.config import compose, config_folder

SNAPSHOTS = Path(__file__).parent / "composed"


def options(group):
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


ON_ARCHIVES = {"digit_strings_transducer", "instruct"}  # experiments of nemolet finetune

# A preset is shown by its own block; an experiment by the whole config.
CASES = {
    "train": ([], None),
    **{f"experiment_{name}": ([f"experiment={name}"], None) for name in options("experiment")},
    **{f"model_{name}": ([f"model={name}"], "model") for name in options("model")},
}


@pytest.mark.parametrize("name", CASES)
def test_a_composed_config_is_as_reviewed(name):
    overrides, block = CASES[name]
    verb = "finetune" if name.removeprefix("experiment_") in ON_ARCHIVES else "train"
    config, problems = compose(verb, [*overrides, *(["archive=base.nemolet"] if verb == "finetune" else [])])
    assert problems == []
    text = yaml.safe_dump(config if block is None else config[block], sort_keys=False, allow_unicode=True)
    snapshot = SNAPSHOTS / f"{name}.yaml"
    if os.environ.get("NEMOLET_UPDATE_GOLDEN"):
        SNAPSHOTS.mkdir(exist_ok=True)
        snapshot.write_text(text)
    assert snapshot.is_file(), "a new preset; write its snapshot with NEMOLET_UPDATE_GOLDEN=1"
    assert text == snapshot.read_text()


def test_no_snapshot_is_left_of_a_preset_that_is_gone():
    assert {path.stem for path in SNAPSHOTS.glob("*.yaml")} == set(CASES)
