# Every target sets itself up from nothing: a virtual environment in .venv, made again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
BIN := .venv/bin
# without byte-compiling: Python compiles what is used at first use, a small part of it
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help scan test test-all lint types layers docs clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("headwise needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps timm
	@touch $@

scan: .venv/.installed  ## scan the heads of a small language model and write report.html
	$(BIN)/headwise scan zoo:llm --out report.html

test: .venv/.installed-dev  ## the tests, without the slow ones and those that need a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-all: .venv/.installed-dev  ## every test this machine can run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m ''

lint: .venv/.installed-dev  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-dev  ## mypy on attention/, models/ and swap/
	$(BIN)/mypy

layers: .venv/.installed-dev  ## import-linter: dependencies run downwards only
	$(BIN)/lint-imports

docs: .venv/.installed-dev  ## the documentation, warnings are errors: docs/_build/index.html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

clean:  ## forget the environment and what was built
	rm -rf .venv docs/_build docs/_generated build dist report.html
