# Builds, tests and shows rayserve-fast on a machine that has Python >= 3.10, a Rust toolchain and make.
#
# Everything goes into .venv and target/. Each step leaves a stamp in .venv, so that a second run does only what changed.
# Targets run one after the other, also with -j: they share one environment, and Cargo uses all cores by itself.
# Variables: PYTHON (the interpreter that .venv is made from, default python3), PYTEST_ARGS (passed on to pytest).

PYTHON ?= python3
PYTEST_ARGS ?=

BIN := .venv/bin
RUST := Cargo.toml $(wildcard Cargo.lock) $(shell find rust -name target -prune -o \( -name '*.rs' -o -name Cargo.toml \) -print)
DEVELOP := env -u CONDA_PREFIX VIRTUAL_ENV="$(CURDIR)/.venv" $(BIN)/maturin develop --quiet --release

# The interpreter that PyO3 builds against; the same everywhere, or Cargo would rebuild it at each turn.
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
export PIP_QUIET := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-rust test-python test-pythons lint format bench readme clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/extension ## serve a digits classifier, send it real images, print what it says
	@$(BIN)/python examples/demo.py

test: test-rust test-python ## every Rust and Python test

# The extension crate is tested through Python: a test binary of its own would have to link against libpython.
test-rust: .venv/extension
	@if cargo nextest --version >/dev/null 2>&1; then cargo nextest run -p rayserve-dataplane; else cargo test -p rayserve-dataplane; fi

test-python: .venv/test
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-pythons: ## the replica's tests on every Python from 3.10 to 3.13 that the machine has
	@.ci/pythons

lint: .venv/lint ## formatting, clippy, ruff, mypy, and the type stubs against the extension
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest rayserve_fast._core --mypy-config-file pyproject.toml

format: .venv/lint ## rewrite the sources as `make lint` wants them
	cargo fmt --all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/extension ## measure against Ray Serve and others; results go to bench/results
	$(BIN)/python -m bench

readme: ## put the newest bench results into README.md
	$(PYTHON) -m bench readme

clean: ## remove everything that make built
	rm -rf .venv .venvs target dist .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/.venvs bench/work
	rm -f python/rayserve_fast/_core*.so

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "rayserve-fast needs Python 3.10 or newer: make PYTHON=/path/to/python3 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@command -v cargo >/dev/null || { echo "there is no cargo on PATH; https://rustup.rs installs it"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install 'maturin>=1.9,<2'
	@touch $@

.venv/extension: .venv/python pyproject.toml $(RUST)
	@echo "building the extension and installing Ray and scikit-learn (minutes the first time)"
	$(DEVELOP) --extras demo
	@touch $@

.venv/test: pyproject.toml | .venv/extension
	$(DEVELOP) --extras test
	@touch $@

.venv/lint: pyproject.toml | .venv/test
	$(DEVELOP) --extras lint
	@touch $@
