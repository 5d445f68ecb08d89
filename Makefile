# make demo    trains a small GPT on Python's manual; again, it says that the run is complete
# make test    every check: style, types, layers, tests
# make storm   kills runs at random and compares what becomes of them with undisturbed ones
# make bench   speed beside a hand-written loop and other trainers
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test storm bench
.DELETE_ON_ERROR:

demo: .venv/.recipes
	$(BIN)/paceline train recipes/gpt.yaml

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2

storm: .venv/.dev
	$(BIN)/python tests/storm.py

bench: .venv/.bench
	$(BIN)/python -m benchmarks

# The stamps say what is installed, so that a second `make` starts at once. torch comes first and
# alone: its exact version names one build, where a range would fetch one for other hardware.
.venv/.recipes .venv/.dev .venv/.bench: .venv/.%: .venv/.torch
	$(PIP) --editable '.[$*]'
	touch $@

.venv/.torch: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $$(grep ^torch== constraints.txt)
	touch $@
