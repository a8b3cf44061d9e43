"""The table of files in ``architecture.md``, from the first line of each docstring: ``python docs/tree.py``.

The documentation build makes the table anew, so a page never shows another tree than the real one.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
MARKS = re.compile(r"(<!-- files -->\n).*?(<!-- end of files -->)", re.DOTALL)


def table() -> str:
    """One row for each module of the package."""
    rows = ["| file | what it holds |", "|---|---|"]
    package = ROOT / "nemolet"
    for file in [*sorted(package.glob("*.py")), *sorted(package.glob("*/**/*.py"))]:
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        first = re.sub(r":\w+:`([^`]*)`", r"`\1`", text.split("\n")[0]).replace("``", "`").replace("|", "\\|")
        rows.append(f"| `{file.relative_to(ROOT)}` | {first} |")
    return "\n".join(rows) + "\n"


def filled(page: str) -> str:
    """The page with the table of today."""
    return MARKS.sub(lambda marks: f"{marks[1]}{table()}{marks[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
