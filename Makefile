# The same commands by hand and in CI. Every target does its own set-up.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
ENGINES := .venv-engines/bin
# Compiled kernels of the two environments would take turns in one folder.
ENGINES_RUN := NUMBA_CACHE_DIR=$(CURDIR)/.venv-engines/numba $(ENGINES)
ENGINES_STAMP := .venv-engines/.installed
ENGINES_PIP := $(ENGINES)/python -m pip --disable-pip-version-check

.PHONY: install demo demo-daemon test check bench gpu soak engines engines-bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvstore needs Python 3.11 or newer: make PYTHON=python3.11 install")'
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing (the first time takes minutes)"
	@$(PIP) install -qq --upgrade pip
	@$(PIP) install -qq torch==2.13.0
	@$(PIP) install -qq -e '.[transformers,encryption,serve,bench,dev]' -c constraints.txt
	@touch $(STAMP)

demo: $(STAMP)
	@mkdir -p out && rm -rf out/demo-cache
	@$(BIN)/kvstore replay bench/data/demo.json --interleave --host 12MiB --dir out/demo-cache --json out/demo.json --report out/demo.html

demo-daemon: $(STAMP)
	@$(BIN)/python -m kvstore.bench.workers bench/data/demo.json

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(STAMP)
	@mkdir -p out
	@$(BIN)/python -m kvstore.bench.micro --json out/micro.json

# Installs nothing: a CUDA machine brings its own torch and triton.
gpu:
	@if test -x $(BIN)/python; then run=$(BIN)/python; else run=$(PYTHON); fi; $$run -m kvstore.bench.gpu

soak: $(STAMP)
	@$(BIN)/pytest -m soak --timeout 7200

# Real engines, on the CPU: an environment of their own, since they pin what ours has newer.
engines: $(STAMP) $(ENGINES_STAMP)
	@OMP_NUM_THREADS=1 $(ENGINES_RUN)/pytest tests/engines

engines-bench: $(ENGINES_STAMP)
	@mkdir -p out
	@$(ENGINES_RUN)/python -m kvstore.bench.engines --json out/engines.json

$(ENGINES_STAMP): pyproject.toml tests/engines/requirements.txt
	@test -x $(ENGINES)/python || { echo "making .venv-engines"; $(PYTHON) -m venv .venv-engines; }
	@echo "installing engines (the first time takes minutes, and 4 GB)"
	@$(ENGINES_PIP) install -qq --upgrade pip
	@$(ENGINES_PIP) install -qq torch==2.13.0
	@$(ENGINES_PIP) install -qq --no-deps -r tests/engines/requirements.txt
	@$(ENGINES_PIP) install -qq --no-deps -e .
	@touch $(ENGINES_STAMP)

clean:
	@rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
