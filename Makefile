# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp-installed

.PHONY: setup demo test lint docs clean

setup: $(STAMP)

# torch comes first and pinned: other packages would otherwise pull a build with gigabytes of GPU libraries.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,docs]"
	touch $@

demo: setup  ## train a small language model on the text that every Python carries, and let it write
	$(BIN)/nemolet train experiment=demo

test: setup  ## style, types, import contract, tests, notebooks, docs
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -q -n 2 --doctest-modules nemolet tests --ignore=tests/distributed
	$(BIN)/python -m pytest -q tests/distributed
	$(MAKE) --no-print-directory docs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) build dist docs/_build .mypy_cache .ruff_cache .pytest_cache
