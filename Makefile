# Everything runs in .venv, which this file makes. `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

VENV ?= .venv
# Where the tests and the demo need PyTorch they need its CPU build only.
TORCH ?= torch==2.13.0
# For instance: make test PYTEST_ARGS="-n 0 -x -k transport"
PYTEST_ARGS ?=
# A test process per core and one more, as they wait a quarter of their time; five at most, as each
# starts device servers of its own. The tests of a file share a server and stay together. The order
# is kept: the last files are short ones.
SPREAD := -n $(shell echo $$(($$(nproc) + 1))) --maxprocesses 5 --dist loadfile \
	--no-loadscope-reorder
BENCH_ARGS ?=
# Which of the RDMA tests: all, or short for those that are marked so.
RDMA ?= all
# Seconds for the machine in which they run.
RDMA_LIMIT ?= 1200
# Tests without an event loop of their own: once is enough.
LOOPLESS := $(addprefix --ignore=tests/,arrays ops backend memory wire cli test_docs.py \
	test_examples.py test_structure.py test_config.py test_benchmarks.py \
	transport/test_cutting.py test_fixtures.py)
# Long ones, which find on one loop and with one part what they would with the other.
LONG := $(addprefix --ignore=tests/,faults/test_contents.py faults/test_deaths.py \
	faults/test_flow.py faults/test_identity.py faults/test_lanes.py faults/test_starting.py \
	faults/test_strangers.py faults/test_threads.py faults/test_tls.py session/test_arithmetic.py \
	session/test_chains.py session/test_choice.py session/test_copies.py session/test_errors.py \
	session/test_functions.py session/test_fusion.py session/test_fusion_looks.py \
	session/test_given.py session/test_large.py session/test_long_runs.py session/test_many.py \
	session/test_memory.py session/test_streams.py \
	pytorch/test_arrays.py pytorch/test_contents.py pytorch/test_faults.py \
	pytorch/test_operator.py pytorch/test_processes.py pytorch/test_program_memory.py \
	pytorch/test_programs.py pytorch/test_tcp.py)

# The tests start some hundred servers; what was compiled for one need not be for the next.
unexport PYTHONDONTWRITEBYTECODE

NATIVE := $(wildcard src/gpuremote/native/* src/gpuremote/torch_native/*)

BIN := $(VENV)/bin
# What is imported is compiled then; all of it would be a minute.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
# Asked only when the virtual environment has to be made. Each candidate is run: a version
# manager leaves commands on the path that do not work.
PYTHON ?= python3 python3.13 python3.12 python3.11
FIND_PYTHON = for p in $(PYTHON); do \
	if "$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo "$$p"; exit; fi; done; \
	echo "no Python 3.11 or newer with venv among: $(PYTHON)" >&2; \
	echo "(Debian: apt-get install python3-venv)" >&2; exit 1

.PHONY: help demo test test-rdma bench lint format clean

help: ## list the targets
	@echo "gpuremote: the targets of this Makefile"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

# PyTorch's part in C++ is left out: a demo compiles nothing for half a minute.
demo: $(VENV)/.stamp-demo ## handwritten digits on device servers, compared with local NumPy
	@echo "== demo: PCA and a logistic regression of handwritten digits on a device server"
	@$(BIN)/python examples/digits.py
	@echo "== demo: one program on NumPy, on gpuremote.cupy and on PyTorch's remote"
	@GPUREMOTE_TORCH_TIER=python $(BIN)/python examples/cupy_digits.py

test: lint ## every check: lint, types, then the test suite on asyncio and on uvloop
	@echo "== test: the suite on plain asyncio, without the parts in C and C++ (less what no event loop comes into)"
	@GPUREMOTE_TEST_LOOP=asyncio GPUREMOTE_NATIVE=0 GPUREMOTE_TORCH_TIER=python $(BIN)/python -m pytest $(SPREAD) $(LOOPLESS) $(LONG) $(PYTEST_ARGS)
	@echo "== test: the suite on uvloop, with the parts in C and C++"
	@GPUREMOTE_TEST_LOOP=uvloop GPUREMOTE_TORCH_TIER=cpp $(BIN)/python -m pytest $(SPREAD) $(PYTEST_ARGS)

test-rdma: $(VENV)/.stamp-test ## the RDMA tests, in an emulated machine (RDMA=short: a part of them)
	@case '$(RDMA)' in all|short) ;; *) echo 'RDMA is all or short, not $(RDMA)' >&2; exit 2 ;; esac
	@echo "== test-rdma: real verbs on a kernel that QEMU boots ($(RDMA); a few minutes)"
	@$(BIN)/python tests/rdma/machine.py --limit $(RDMA_LIMIT) -- \
		$(BIN)/python -m pytest tests/rdma --timeout 400 \
		-o faulthandler_timeout=390 -p no:cacheprovider $(if $(filter short,$(RDMA)),-m short) \
		$(PYTEST_ARGS)

bench: $(VENV)/.stamp-bench ## every workload with every contender, into benchmarks/results/
	@echo "== bench: gpuremote beside plain sockets, asyncio streams, pyzmq and memcpy"
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

lint: $(VENV)/.stamp-test ## ruff, the layers of the imports, mypy --strict
	@echo "== lint: style and formatting (ruff)"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== lint: imports go downwards only (import-linter)"
	@$(BIN)/lint-imports --no-cache
	@echo "== lint: types (mypy --strict)"
	@$(BIN)/mypy --num-workers 2

format: $(VENV)/.stamp-test ## rewrite the sources as ruff formats them
	@echo "== format: imports and layout (ruff)"
	@$(BIN)/ruff check --select I --fix .
	@$(BIN)/ruff format .

clean: ## remove the virtual environment and all that the tools left
	@echo "== clean: removing $(VENV), caches and build folders"
	@rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache \
		.import_linter_cache .hypothesis

# One virtual environment, made in steps. Each step is recorded by a stamp, so that one that was
# interrupted runs again.
$(VENV)/.stamp-venv:
	@python=$$($(FIND_PYTHON)); \
	echo "== setup: a virtual environment in $(VENV) ($$("$$python" --version))"; \
	"$$python" -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-torch: | $(VENV)/.stamp-venv
	@echo "== setup: PyTorch for the demo and the tests ($(TORCH); large, downloaded once)"
	@$(INSTALL) '$(TORCH)'
	@touch $@

$(VENV)/.stamp-demo: pyproject.toml $(NATIVE) | $(VENV)/.stamp-torch
	@echo "== setup: gpuremote and what the demo needs"
	@$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.stamp-bench: pyproject.toml $(NATIVE) | $(VENV)/.stamp-venv
	@echo "== setup: gpuremote and what the benchmarks need"
	@$(INSTALL) -e '.[bench]'
	@touch $@

$(VENV)/.stamp-test: pyproject.toml $(NATIVE) | $(VENV)/.stamp-torch
	@echo "== setup: gpuremote and what the tests need; meanwhile its part in C++ is built"
	@$(INSTALL) -e .
	@$(BIN)/gpuremote torch build >$(VENV)/torch-build.log 2>&1 & build=$$!; \
		$(INSTALL) -e '.[test]'; installed=$$?; \
		wait $$build || { cat $(VENV)/torch-build.log >&2; exit 1; }; \
		tail -n 1 $(VENV)/torch-build.log; exit $$installed
	@touch $(VENV)/.stamp-demo $(VENV)/.stamp-bench $@
