"""Worlds of several ranks for all tests of this folder.

A test gives a function of its own file to the fixture ``ranks``; every rank runs it inside a fresh process group
and returns something that can be pickled::

    def total(factor):
        number = torch.tensor(factor * dist.get_rank())
        dist.all_reduce(number)
        return number.item()


    def test_total(ranks):
        assert ranks(4, total, 2.0) == [12.0] * 4

What several test files share lies in modules beside this one (``import parity``).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for this process; workers do the same

from worlds import Pool


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(scope="session")
def ranks():
    """Run a function on n ranks: ``ranks(n, function, *args, limit=300, **kwargs)`` -> results by rank."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def expected():
    """What one rank computes, for each model once."""
    import parity

    known = {}

    def of(model, **changes):
        key = (model, *sorted(changes.items()))
        if key not in known:
            known[key] = parity.train(parity.build(model, **changes))
        return known[key]

    return of


def pytest_terminal_summary(terminalreporter):
    """The table of parity: how far each layout was from one rank."""
    measured = getattr(sys.modules.get("parity"), "MEASURED", {})
    if measured:
        terminalreporter.section("largest relative errors against one rank, in float32")
        for test, (loss, gradient) in sorted(measured.items()):
            terminalreporter.write_line(f"{loss:8.1e} loss  {gradient:8.1e} gradient  {test}")
