# `make demo` and `make test` need Python 3.11 or newer, pip and g++, and nothing else: each makes its own .venv
# with the pinned tools of requirements/dev.txt and builds the extension. `make help` lists all targets.

PYTHON ?= python3
VENV ?= .venv
# Extra arguments of the program that a target runs, as in: make test ARGS="-k adam"
ARGS ?=
# Processes of the demo, which share the cores.
RANKS ?= 2

BIN := $(VENV)/bin
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
SANITIZED := build/sanitize
SANITIZE_TESTS ?= $(addprefix tests/test_,binding*.py cpu_kernels.py sharded_kernels.py norm.py casts.py shm*.py cuda_host_run.py cuda_convert.py)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv build demo test lint types format bench gpu-report sanitize clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.tools: requirements/dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("pyshard needs Python 3.11 or newer, \
	and $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/dev.txt
	@touch $@

# The build comes first so that it is seen: pip hides it. The editable install then takes over its objects.
$(VENV)/.package: $(VENV)/.tools pyproject.toml
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# DeepSpeed's set-up needs the torch that is there, hence no build isolation.
$(VENV)/.peers: $(VENV)/.tools requirements/bench.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -r requirements/bench.txt
	@touch $@

venv: $(VENV)/.tools ## make .venv with the pinned tools

build: $(VENV)/.package ## build the extension in place (again: only what changed)
	$(BIN)/python setup.py -q build_ext --inplace

demo: build ## train a small GPT on two ranks, beside what torch has for it (RANKS=1: in one process)
ifeq ($(RANKS),1)
	$(BIN)/python examples/train_gpt.py $(ARGS)
else
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(cores=$$(nproc); echo $$((cores > $(RANKS) ? cores / $(RANKS) : 1)))} \
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(RANKS) \
	examples/train_gpt.py --out docs/demo.png $(ARGS)
endif

test: lint types build ## lint, types and tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.tools ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

types: $(VENV)/.tools ## mypy
	$(BIN)/mypy

format: $(VENV)/.tools ## bring Python and C++ into form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: build $(VENV)/.peers ## benchmarks beside torch, DeepSpeed, bitsandbytes and torchao
	$(BIN)/python -m pytest benchmarks $(ARGS)

# With the Python that is there, since a GPU machine brings its own torch, and without a network.
gpu-report: ## on a GPU machine: GPU tests and benchmarks into benchmarks/results/<card>.json
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m benchmarks.gpu_report $(ARGS)

# A package of its own under build/, tests beside it, so that its module is the one imported. The sanitizer's
# library must come first in the process, and libstdc++ beside it, or an exception ends it. Leaks are not looked for, since
# Python and torch keep memory at exit. Findings go to stderr, past pytest (-s).
sanitize: $(VENV)/.tools ## kernel tests under the address and undefined-behaviour sanitizers
	PYSHARD_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib $(SANITIZED)
	rm -rf $(SANITIZED)/tests
	cp -R tests pyproject.toml $(SANITIZED)/
	cd $(SANITIZED) && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 $(abspath $(BIN))/python -m pytest -s -p no:cacheprovider $(SANITIZE_TESTS) $(ARGS)

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info pyshard/_C*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
