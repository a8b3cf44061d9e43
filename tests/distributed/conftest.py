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

SPENT: list[dict[str, float]] = []  # of the pool, for the summary


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(scope="session")
def ranks():
    """Run a function on n ranks: ``ranks(n, function, *args, limit=300, **kwargs)`` -> results by rank."""
    pool = Pool()
    SPENT.append(pool.spent)
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
    """How far each layout was from one rank, what was sent, and how far checkpoints in other layouts were off."""
    measured = getattr(sys.modules.get("parity"), "MEASURED", {})
    if measured:
        terminalreporter.section("largest relative errors against one rank, in float32")
        for test, (loss, gradient) in sorted(measured.items()):
            terminalreporter.write_line(f"{loss:8.1e} loss  {gradient:8.1e} gradient  {test}")
    tables = sys.modules.get("tables")
    if tables is not None and tables.SENT:
        terminalreporter.section("bytes that were sent, and the textbook's")
        for line in tables.sent_table():
            terminalreporter.write_line(line)
    for spent in SPENT:
        terminalreporter.section(f"seconds of the processor, of all ranks: {sum(spent.values()):.0f}")
        for test, seconds in sorted(spent.items(), key=lambda each: -each[1]):
            terminalreporter.write_line(f"{seconds:7.1f}  {test}")
    for model in tables.OFF if tables is not None else ():
        terminalreporter.section(f"{model}: largest relative error of a weight after a checkpoint of another layout")
        for line in tables.off_table(model):
            terminalreporter.write_line(line)
