"""Tables that the tests of this folder print at their end: what was sent, and how far checkpoints were off."""

from __future__ import annotations

from collections.abc import Mapping

SENT: dict[tuple[str, str, str], tuple[float, float]] = {}  # by layout, collective, axis: counted, by the formula
OFF: dict[str, dict[str, dict[str, float]]] = {}  # by model, layout that wrote, layout that read


def assert_sent(layout: str, counted: Mapping[tuple[str, str], float], formula: Mapping[tuple[str, str], float]):
    """What was sent is what the formula says, and nothing else."""
    for op, axis in {**counted, **formula}:
        SENT[layout, op, axis] = (counted.get((op, axis), 0), formula.get((op, axis), 0))
    assert counted == formula


def sent_table() -> list[str]:
    """A line for each collective of each layout."""
    lines = [f"{'layout':<22} {'collective':<15} {'axis':<13} {'counted':>9} {'formula':>9}"]
    for (layout, op, axis), (counted, formula) in SENT.items():
        lines.append(f"{layout:<22} {op:<15} {axis:<13} {counted:>9,.0f} {formula:>9,.0f}")
    return lines


def off_table(model: str) -> list[str]:
    """The largest relative error of a weight, of a run that went on: a line for who wrote, a column for who read."""
    rows = OFF[model]
    readers = list(dict.fromkeys(reader for row in rows.values() for reader in row))
    lines = [" ".join([f"{'written by':<10}", *(f"{reader:>8}" for reader in readers)])]
    for writer, row in rows.items():
        cells = [f"{row[reader]:.0e}" if row.get(reader) else "0" if reader in row else "" for reader in readers]
        lines.append(" ".join([f"{writer:<10}", *(f"{cell:>8}" for cell in cells)]))
    return lines
