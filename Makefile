# Each target does its own set-up: a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: clean demo docs format test test-targets

demo: .venv/demo
	$(BIN)/vmoba-flex demo

test: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	HYPOTHESIS_PROFILE=ci $(BIN)/pytest -n auto --dist loadgroup

# Compiles the kernels for GPUs that are not here: minutes, and skipped without Triton.
test-targets: .venv/dev
	$(BIN)/pytest -n auto -m targets -rs tests/test_targets.py

docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: .venv/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv site

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) torch
	$(INSTALL) --editable ".[demo]"
	touch $@

.venv/dev: .venv/demo
	$(INSTALL) --editable ".[dev]"
	touch $@
