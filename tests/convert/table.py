"""The table of architectures in the documentation: each cell is a bound that a test keeps, and is written by it.

``NEMOLET_UPDATE_GOLDEN=1 pytest tests/convert`` writes the table anew from what the tests find.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from .tiny_models import MODELS

FAR = 1e-5  # no logit may differ by more
HEAD = ("model", "in transformers", "here", "logits", "padding", "cache", "50 tokens", "bytes")
BEGIN, END = "<!-- written by tests/convert: begin -->\n", "<!-- written by tests/convert: end -->\n"


def bound(difference: float) -> str:
    """Three times the difference, since machines differ, rounded up to a power of ten."""
    return f"{min(FAR, 10 ** math.ceil(math.log10(max(3 * difference, 1e-6)))):.0e}"


class Table:
    """Rows by model, cells by heading (final)."""

    def __init__(self, path: Path, *, update: bool) -> None:
        self.path, self.update = path, update
        self.found: dict[str, dict[str, float]] = {}
        _, begin, rest = path.read_text().partition(BEGIN)
        lines = rest.partition(END)[0].splitlines()[2:] if begin else []
        rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
        self.rows = {row[0]: dict(zip(HEAD, row)) for row in rows}

    def close(self, name: str, column: str, ours: Tensor, theirs: Tensor) -> None:
        """Two results are equal within the bound of a cell, and are not all alike."""
        assert theirs.std() > 0.1
        self.keep(name, column, (ours - theirs).abs().max().item())

    def equal(self, name: str, column: str, same: bool) -> None:
        """Two results are exactly equal."""
        assert same
        self.keep(name, column, 0.0)

    def keep(self, name: str, column: str, difference: float) -> None:
        """A difference is within the bound of its cell; or becomes one, where the table is written anew."""
        assert difference < FAR
        cells = self.found.setdefault(name, {})
        cells[column] = max(difference, cells.get(column, 0.0))
        if not self.update:
            stated = self.rows.get(name, {}).get(column, "")
            assert stated == "equal" or (stated and difference <= float(stated)), f"{name}, {column}: {difference:.1e}"

    def write(self, kinds: dict[str, str]) -> None:
        """Put the table into the page; cells without a test are empty."""
        lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        for name, (model_class, _, _) in MODELS.items():
            cells = [self._cell(name, column) for column in HEAD[3:]]
            lines.append("| " + " | ".join([name, f"`{model_class}`", f"`{kinds[name]}`", *cells]) + " |")
        before, _, rest = self.path.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        self.path.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after)

    def _cell(self, name: str, column: str) -> str:
        difference = self.found.get(name, {}).get(column)
        if difference is None:
            return ""
        return "equal" if column in HEAD[6:] else bound(difference)
