# Each command sets up what it needs, in .venv, and starts at once when that is already there.
#
#   PYTHON=python3.12   the interpreter for a new .venv (default: python3)
#   PIP_ARGS="..."      more arguments for pip, for example the small build of torch for machines without an NVIDIA GPU:
#                       PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   ARGS="..."          more arguments for the command itself: make test ARGS="-k reference"
#   MODEL=...           make demo: a local folder or the hub name of another encoder
#   FRESH=1             make demo: start over instead of resuming

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --quiet -c constraints.txt $(PIP_ARGS)
PACKAGES := hina_optim hina_lightning callbacks
CODE := $(PACKAGES) $(wildcard tests examples benchmarks)
TYPES := build/types

# Stamps are written when an installation has ended, so an interrupted one is done again.
BASE := $(VENV)/.stamp-base
DEMO := $(VENV)/.stamp-demo
DEV := $(VENV)/.stamp-dev

# An environment that was copied with the checkout still points at the code of the original: install again.
MOVED := $(shell test ! -e $(BASE) || test "$$(cat $(BASE))" = "$(CURDIR)" || { rm -f $(VENV)/.stamp-*; echo yes; })

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-sharded check lint types format bench clean distclean

help:
	@echo "make demo     fine-tune a small language model with HinaAdaptive, beside AdamW; resumes when interrupted"
	@echo "make test     all tests that need no GPU               (ARGS=\"-k name\" selects)"
	@echo "make test-sharded    every optimizer on every engine, in 2 and 4 processes, with a table of the results"
	@echo "make check    lint, format and types"
	@echo "make format   put the code into the house's format and repair what ruff can"
	@echo "make bench    time, memory and operators of a step beside torch's AdamW and others  (ARGS=\"--quick\", --help)"
	@echo "make clean    remove caches and builds; runs/ and .venv stay (make distclean removes .venv too)"
	@echo "Variables: PYTHON, PIP_ARGS, ARGS, MODEL, FRESH, WORKERS; the head of the Makefile explains them."

demo: $(DEMO)
	@$(PY) examples/demo.py $(if $(MODEL),--model "$(MODEL)") $(ARGS)

# One thread for each worker: more would contend for the same cores.
test test-sharded: export OMP_NUM_THREADS := 1
test test-sharded: export MKL_NUM_THREADS := 1
test test-sharded: export MPLBACKEND := Agg
test test-sharded: export TOKENIZERS_PARALLELISM := false
test: $(DEV)
	@$(PY) -m pytest -n $(WORKERS) --durations=10 -m "not sharded" $(ARGS)

# What `make test` runs a diagonal of.
test-sharded: $(DEV)
	@$(PY) -m pytest -n $(WORKERS) --durations=10 -m sharded $(ARGS)

check: lint types

lint: $(DEV)
	@$(PY) -m ruff check $(CODE)
	@$(PY) -m ruff format --check $(CODE)

# mypy does not see that callbacks/ installs as hina_lightning.callbacks, so it gets a tree of links in that layout.
types: $(DEV)
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/hina_lightning
	@ln -s ../../hina_optim $(TYPES)/hina_optim
	@for f in hina_lightning/*; do ln -s "../../../$$f" "$(TYPES)/$$f"; done
	@ln -s ../../../callbacks $(TYPES)/hina_lightning/callbacks
	@cd $(TYPES) && ../../$(PY) -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
		-p hina_optim -p hina_lightning

format: $(DEV)
	@$(PY) -m ruff check --fix --exit-zero $(CODE)
	@$(PY) -m ruff format $(CODE)

# The profiler would report each of its starts.
bench: export KINETO_LOG_LEVEL := 99
bench: $(DEV)
	@$(PY) -m benchmarks.bench $(ARGS)

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# --- set-up ---------------------------------------------------------------------------------------------------------

RECENT := import sys; sys.exit(sys.version_info < (3, 10))
NO_PYTHON := error: no '$(PYTHON)' on PATH. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3
OLD_PYTHON := error: Python 3.10 or newer is needed. Name one (make PYTHON=python3.12) and remove $(VENV) if it is older.
NO_VENV := error: $(PYTHON) could not make a virtual environment. On Debian and Ubuntu: sudo apt install python3-venv

# A .venv that works is kept, whoever made it; one that does not (interrupted, or its Python is gone) is made anew.
$(BASE): constraints.txt
	@if ! { $(PY) -m pip --version || $(PY) -m ensurepip; } >/dev/null 2>&1; then \
		command -v "$(PYTHON)" >/dev/null || { echo "$(NO_PYTHON)" >&2; exit 1; }; \
		"$(PYTHON)" -c '$(RECENT)' || { "$(PYTHON)" --version; echo "$(OLD_PYTHON)" >&2; exit 1; }; \
		echo "Making $(VENV) with $$("$(PYTHON)" --version) ..."; \
		rm -rf $(VENV); \
		"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "$(NO_VENV)" >&2; exit 1; }; \
	fi
	@$(PY) -c '$(RECENT)' || { $(PY) --version; echo "$(OLD_PYTHON)" >&2; exit 1; }
	@echo "Installing torch, the largest download: minutes on a slow line ..."
	@$(INSTALL) pip setuptools torch
	@echo "$(CURDIR)" > $@

# setuptools is there by now, in its pinned version, so the build needs no environment of its own.
$(DEMO): $(BASE) pyproject.toml
	@echo "Installing hina-lightning[demo] ..."
	@PYTHONWARNINGS=ignore $(INSTALL) --no-build-isolation -e ".[demo]"
	@touch $@

$(DEV): $(BASE) pyproject.toml
	@echo "Installing hina-lightning[dev] ..."
	@PYTHONWARNINGS=ignore $(INSTALL) --no-build-isolation -e ".[dev]"
	@touch $(DEMO) $@
