# The commands of this repository. Needs Python 3.11 or newer, git and make; `make help` lists them.

SHELL := /bin/bash
.DEFAULT_GOAL := help

NEWEST_FIRST := python3 python3.13 python3.12 python3.11 python3.14
IS_3_11 := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in $(NEWEST_FIRST); do $$p $(IS_3_11) 2>/dev/null && echo $$p && break; done)

BIN := .venv/bin
STAMP := .venv/.installed
# Without a GPU the constraints hold torch at the release whose CPU build we test; with one, any torch.
CONSTRAINTS := $(shell nvidia-smi -L >/dev/null 2>&1 || echo -c constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The other files in benchmarks/ are their tools.
BENCHMARKS := allreduce batched_trainer codecs fedlaw joiner kill_in_reduce merge rate rendezvous round simulator time_to_target
# One thread a process: the tests' models are small, and processes share the cores. Bytecode is kept,
# whatever the shell says: hundreds of processes are started.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: help setup demo peers test check lint bench proto prove-processes prove-long prove-packaging prove-peers prove-science clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## Make .venv and install everything into it; does nothing when that is done

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed, this machine has" \
	  "$$(python3 --version 2>/dev/null || echo none). Install one, or name it: make setup PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) $(IS_3_11) || { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), but 3.11 or newer is needed" >&2; exit 2; }
	@$(BIN)/python $(IS_3_11) 2>/dev/null || $(PYTHON) -m venv --clear .venv || { echo \
	  "error: $(PYTHON) cannot make .venv: install its venv module (Debian: apt install python3-venv)" >&2; exit 2; }
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## The main job: a real federation on this machine (ARGS="--strategy fedavg ...")
	@$(BIN)/fl-server demo $(ARGS)

peers: $(STAMP)  ## The same without a server: peers on this machine, one late, one killed (ARGS="--peers 5 ...")
	@$(BIN)/fl-peer demo $(ARGS)

test: $(STAMP)  ## All fast tests, on all cores (ARGS="tests/protocols -x ...")
	@$(PYTEST) -n logical --dist loadfile $(ARGS)

lint: $(STAMP)  ## Format, lint and types, without changing a file
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

check: lint  ## lint, then the fast tests with branch coverage
	@$(PYTEST) --cov=aggregation --cov=client --cov=p2p --cov=protocols --cov=server \
	  --cov-branch --cov-report=term:skip-covered $(ARGS)

bench: $(STAMP)  ## Every benchmark, one JSON line each (ARGS=--quick); fails where a limit is missed
	@failed=0; for b in $(BENCHMARKS); do $(BIN)/python benchmarks/$$b.py $(ARGS) || failed=1; done; exit $$failed

proto: build/proto/.installed  ## Regenerate the protobuf stubs from protocols/wire.proto
	@build/proto/bin/python -m grpc_tools.protoc -I.types --python_out=.types --pyi_out=.types \
	  --grpc_python_out=.types .types/atoll/protocols/wire.proto

# The oldest grpcio-tools we support: a stub demands at least the runtime that made it.
build/proto/.installed: Makefile
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed" >&2; exit 2; }
	@$(PYTHON) -m venv build/proto
	@build/proto/bin/python -m pip install --quiet grpcio-tools==1.71.0 'setuptools<81'
	@touch $@

prove-processes: $(STAMP)  ## Slow proofs: real sockets, real processes, kills
	@$(PYTEST) -m "slow and not long" -n logical --dist loadfile $(ARGS)

prove-long: $(STAMP)  ## Slow proof: what takes minutes: all pairs of parts, 200 cases a codec, 10,000 swarms
	@$(PYTEST) -m long $(ARGS)

prove-packaging: $(STAMP)  ## Slow proof: wheel from sdist, and nothing but atoll/ in it
	@$(PYTEST) -m slow tests/test_packaging.py $(ARGS)

prove-peers: $(STAMP)  ## Slow proof: 10,000 swarms with faults in virtual time; no fork, no stall
	@$(PYTEST) -m slow tests/aggregation/test_storms.py $(ARGS)

prove-science: $(STAMP)  ## Slow proof: the methods' effects on real data; writes docs/science.md (ARGS=fedlaw)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/science/page.py $(ARGS)

clean:  ## Remove what the commands above made, .venv too
	@rm -rf .venv build dist atoll.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov
