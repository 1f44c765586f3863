# Everything a newcomer needs: `make demo` and `make test`. Both create .venv on first use.

PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= runs/demo
# Two workers suit two cores; each test uses one thread.
WORKERS ?= 2
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint wheel-test clean

help:
	@echo "make demo    train on real text of eight domains and write the report (under 10 minutes)"
	@echo "make test    run the whole test suite"
	@echo "make lint    formatting, style, types, layers"
	@echo "make clean   remove .venv and build products; runs and the corpus cache stay"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps say which extras are installed; editing the requirements installs them again.
$(VENV)/train.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/train.stamp

demo: $(VENV)/train.stamp
	$(BIN)/drgr train demo --run-dir $(RUN_DIR) --overwrite

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_FLAGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

# The built wheel, in an environment of its own and outside the source tree.
wheel-test: $(VENV)/dev.stamp
	bash .ci/wheel

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
