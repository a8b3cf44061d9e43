"""The rules of CONTRIBUTING.md that a program can see."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

import nemolet

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "nemolet").rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
LONGEST_FILE, LONGEST_FUNCTION = 450, 70
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_short_and_so_are_its_functions(name):
    path = ROOT / name
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(TREES[path])}
    assert {n: size for n, size in long.items() if size > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_public_says_what_it_is(name):
    """Classes and functions of a module, and the methods of its public classes that nothing else describes."""
    tree = TREES[ROOT / name]
    assert ast.get_docstring(tree), "the module"
    silent = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert silent == []


@pytest.mark.parametrize("name", NAMES)
def test_no_error_is_swallowed_unseen(name):
    for node in ast.walk(TREES[ROOT / name]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            broad = ast.unparse(node.type) in ("Exception", "BaseException")
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert raises or not broad, f"everything is caught and nothing raised in line {node.lineno}"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_runs_text_or_pickles(name):
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "os.system", "yaml.load", "yaml.unsafe_load"}
    calls = {ast.unparse(node.func) for node in ast.walk(TREES[ROOT / name]) if isinstance(node, ast.Call)}
    assert not calls & forbidden


def test_no_file_is_a_drawer_for_everything():
    assert [path.name for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")] == []


def test_no_script_hides_a_module_of_python():
    scripts = {path.stem for folder in ("benchmarks", "examples", "docs") for path in (ROOT / folder).glob("*.py")}
    assert scripts & sys.stdlib_module_names == set()


def test_every_package_is_installed():
    listed = set(setup()["options"]["packages"].split())
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES if path.name == "__init__.py"}
    assert listed - {"nemolet.conf"} == found
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES}
    assert folders <= listed


def test_every_config_is_installed():
    patterns = [p.strip() for p in setup()["options.package_data"]["nemolet.conf"].split(",")]
    installed = {path for pattern in patterns for path in (ROOT / "conf").glob(pattern)}
    assert installed == set((ROOT / "conf").rglob("*.yaml"))
    others = {p.name for p in (ROOT / "conf").rglob("*") if p.is_file() and p.suffix not in (".yaml", ".pyc")}
    assert others == {"__init__.py"}


def test_the_version_has_one_home():
    assert setup()["metadata"]["version"] == "attr: nemolet.__version__"
    texts = {path: path.read_text() for path in [*FILES, ROOT / "setup.cfg", ROOT / "pyproject.toml"]}
    homes = [
        path.name for path, text in texts.items() if re.search(rf"""["']{re.escape(nemolet.__version__)}["']""", text)
    ]
    assert homes == ["__init__.py"]


def test_what_is_offered_can_be_had():
    for name in dir(nemolet):
        assert getattr(nemolet, name) is not None
    with pytest.raises(AttributeError, match="did you mean 'Graph'"):
        nemolet.Grahp  # noqa: B018 - the access is what is tested


@pytest.mark.parametrize("package", ["nn", "data", "language", "parallel", "training"])
def test_what_a_package_offers_can_be_had(package):
    module = getattr(nemolet, package)
    for name in module._EXPORTS:
        assert getattr(module, name).__doc__
    with pytest.raises(AttributeError, match=f"nemolet.{package} has no"):
        module.nothing_of_the_kind  # noqa: B018 - the access is what is tested


def test_tests_mirror_the_package():
    """Every package has tests of its own."""
    tested = {path.name for path in (ROOT / "tests").iterdir()}
    for path in (ROOT / "nemolet").iterdir():
        if path.is_dir() and (path / "__init__.py").is_file():
            assert path.name in tested
