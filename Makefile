# Every target sets up what it needs: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2

.PHONY: help setup demo test test-fast lint types bench clean

help:
	@echo "make demo       write tiny checkpoints, generate images from them, look into both"
	@echo "make test       lint, types and every test, as CI runs them"
	@echo "make test-fast  the quick tests alone"
	@echo "make bench      the CPU benchmarks against diffusers"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-fast: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

bench: $(READY)
	$(BIN)/python benchmarks/cpu.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
