# `make quickstart` and `make test` each do all set-up on a machine with Python ≥ 3.11, in one go, idempotently.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart test test-all lint golden benchmark benchmark-quick clean

quickstart: $(VENV)/package.stamp
	$(BIN)/tunelab quickstart

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

# Everything, with the real weights and TRL as an oracle.
test-all: $(VENV)/oracles.stamp
	$(BIN)/python -m pytest -m "slow or weights or oracle or not slow"

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tunelab needs Python >= 3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/package.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/package.stamp
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/oracles.stamp: $(VENV)/dev.stamp
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,oracles]'
	@touch $@

# Record the golden curves anew, with their provenance, after a change that is meant to move them.
golden: $(VENV)/dev.stamp
	$(BIN)/python -m tests.golden.record

# Speed and memory against TRL, which gets an environment of its own: benchmarks/README.md. Hours on two cores; can be
# stopped and goes on where it was.
benchmark: $(VENV)/package.stamp
	$(BIN)/python -m benchmarks all

benchmark-quick: $(VENV)/package.stamp
	$(BIN)/python -m benchmarks sft --quick && $(BIN)/python -m benchmarks dpo --quick

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
