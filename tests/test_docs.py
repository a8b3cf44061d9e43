"""What a page shows is what happens: examples, printed tables, and refusals are run and compared."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from pathlib import Path

import pytest

from nemolet.cli import main
from nemolet.errors import NemoletError

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A command, and what the page says it is refused with.
REFUSED = re.compile(
    r"^```bash\n(nemolet [^\n]*)\n```\n```text\n((?:Config|Wiring)Error: .*?)\n```", re.MULTILINE | re.DOTALL
)
REFUSALS = [(page, *found.groups()) for page, text in PAGES.items() for found in REFUSED.finditer(text)]
RUN = ["tokenizers.md", "compose.md"]  # pages whose Python is run from top to bottom


def told(found: str, shown: str) -> bool:
    """Whether a page shows what was printed; ``...`` stands for lines, and numbers with a point are of a machine."""
    pattern = re.escape(shown.strip()).replace(re.escape("..."), ".*")
    return re.search(re.sub(r"\d+\\\.\d+", r"\\d+[.]\\d+", pattern), found, re.DOTALL) is not None


def test_the_pages_have_what_is_tested_here():
    assert len(REFUSALS) >= 4
    assert {page for page, *_ in REFUSALS} >= {"configs.md", "quickstart.md"}


@pytest.mark.parametrize(("page", "command", "shown"), REFUSALS, ids=[f"{page}: {line}" for page, line, _ in REFUSALS])
def test_a_refusal_is_the_one_that_is_printed(page, command, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("it rains")
    assert main(shlex.split(command)[1:]) != 0
    assert told(capsys.readouterr().err, shown)


@pytest.mark.parametrize("page", RUN)
def test_the_python_of_a_page_does_what_it_shows(page, tmp_path, monkeypatch):
    """A block of Python is run; a text right below it is what that prints, or the error that it ends in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(DOCS.parent / "examples")
    space: dict[str, object] = {}
    blocks = list(BLOCK.finditer(PAGES[page]))
    compared = 0
    for block, after in zip(blocks, [*blocks[1:], None]):
        kind, code = block.groups()
        if kind == "yaml":
            (tmp_path / "model.yaml").write_text(code)  # by which name the Python below reads it
        if kind != "python":
            continue
        if code.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(code, space, page, page, 0)
            failed, tried = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, clear_globs=False)
            space, compared = test.globs, compared + tried
            assert not failed
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                exec(compile(code, page, "exec"), space)
            except NemoletError as error:
                print(f"nemolet.errors.{type(error).__name__}: {error}")
        below = after is not None and after[1] == "text" and not PAGES[page][block.end() : after.start()].strip()
        assert below or "nemolet.errors." not in printed.getvalue(), printed.getvalue()
        if below:
            compared += 1
            assert told(printed.getvalue(), after[2]), printed.getvalue()
    assert compared >= 2
