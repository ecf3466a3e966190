# make quickstart             set up, generate scenes, train, evaluate, report     (out/quickstart/report.html)
# make quickstart-pretrained  the same with the shipped weights, about a minute    (out/quickstart-pretrained/)
# make test                   set up and run every test
# make coverage               the same, and fail where less than 90 % of the lines are run
# make fuzz                   the property tests with as many damaged files each (FUZZ_EXAMPLES=1000), new ones every time
# make storm                  kill commands at random moments so many times (KILLS=100), and compare what they make
# make bench                  set up and time every part against its reference       (benchmarks/results/, docs/performance.md)
# make lint types             ruff, mypy
#
# BENCH="--quick"             options of make bench: --only paste crop, --device cuda, --help
# TEST_WORKERS=4             processes of make test, each with one thread of PyTorch's
# PYTHON=python3.12           another interpreter (3.11 or newer)
# TORCH_INDEX=URL             where pip looks for torch first, e.g. https://download.pytorch.org/whl/cpu (small, no CUDA)
#                             or https://download.pytorch.org/whl/cu130 (CUDA); empty: PyPI's default build

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH_INDEX ?=
BENCH ?=
TEST_WORKERS ?= 2
FUZZ_EXAMPLES ?= 1000
KILLS ?= 100
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart quickstart-pretrained test coverage fuzz storm bench lint types check clean
.DEFAULT_GOAL := quickstart

quickstart: $(VENV)/.installed
	$(BIN)/ssdir quickstart

quickstart-pretrained: $(VENV)/.installed
	$(BIN)/ssdir quickstart --pretrained

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(COVERAGE)

# Watching the lines takes a quarter longer.
coverage: COVERAGE = --cov --cov-report=term:skip-covered --cov-fail-under=90
coverage: test

fuzz: $(VENV)/.installed-dev
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) tests/reliability -k "readers or resume"

storm: $(VENV)/.installed-dev
	$(BIN)/python tests/reliability/storm.py --kills $(KILLS)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks $(BENCH)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff check --preview --select PLW1514 src # every file is opened with its encoding
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: test lint types

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ssdir needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# torch first and alone when an index is named, so that nothing else is taken from there
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --extra-index-url https://pypi.org/simple) -c constraints.txt torch
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install -c constraints.txt -e ".[eval]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) out
