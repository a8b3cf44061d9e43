"""Tiny models of transformers with random weights, saved by ``save_pretrained`` once per session."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

import nemolet as nl  # noqa: E402 - after the skip
from nemolet.convert.reading import read  # noqa: E402

from .table import Table  # noqa: E402
from .tiny_models import MODELS, VOCAB, save  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "huggingface.md"


@dataclass(frozen=True)
class Pair:
    """One model, theirs and ours."""

    name: str
    folder: Path
    theirs: Any
    ours: Any  # the archive that reading the folder gave

    @property
    def kind(self) -> str:
        return type(self.ours.model).__name__


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A pair by its name, made when it is first asked for."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            folder = save(name, tmp_path_factory.mktemp("hf") / name)
            theirs = getattr(transformers, MODELS[name][0]).from_pretrained(folder, attn_implementation="eager").eval()
            made[name] = Pair(name, folder, theirs, read(folder))
        return made[name]

    return get


@pytest.fixture(scope="session")
def table(pairs):
    """The table of architectures, whose cells the tests keep."""
    table = Table(DOCS, update=os.environ.get("NEMOLET_UPDATE_GOLDEN") == "1")
    yield table
    if table.update:
        table.write({name: pairs(name).kind for name in MODELS})


@pytest.fixture(params=MODELS)
def pair(request, pairs) -> Pair:
    """Each of the models in turn."""
    return pairs(request.param)


__all__ = ["MODELS", "VOCAB", "Pair", "nl"]
