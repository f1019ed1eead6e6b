# The two commands of README: `make run` and `make test`. Both set up .venv first.
PYTHON ?= python3
# Processes that share the tests; each computes with one thread.
WORKERS ?= 2
BIN := .venv/bin

.PHONY: run test test-fast test-deployment check clean

run: .venv/sim
	$(BIN)/fedgen run --preset quickstart

test: .venv/dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

test-fast: .venv/dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal -m "not slow and not deployment"

# A fleet of processes that is broken on purpose: a quarter of an hour, with nginx (FEDGEN_NGINX where it is not on PATH).
test-deployment: .venv/dev
	$(BIN)/python -m pytest -m deployment

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/sim: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[sim]"
	touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[sim,dev]"
	touch $@
