"""Shared fixtures. Runs write to temporary folders only."""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

# Several tests and their processes run side by side; threads of one would only wait for those of another.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def _seed(name: str) -> None:
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    """A fixture is the same in each run, whichever test asks for it first and whatever ran before."""
    _seed(f"{fixturedef.baseid}::{fixturedef.argname}[{getattr(request, 'param_index', 0)}]")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    _seed(item.nodeid)


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory):
    """Tokens that tests make do not land in the user's cache."""
    os.environ["NEMOLET_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside a checkout of the developers; users have only the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def poem(tmp_path_factory) -> Path:
    """A small text with structure to learn."""
    path = tmp_path_factory.mktemp("text") / "poem.txt"
    path.write_text("".join(f"the {i % 7} rains in spain stay mainly in the plain.\n" for i in range(400)))
    return path
