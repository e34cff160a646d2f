# `make` alone lists what can be done. Everything runs in .venv, which is made on first use.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
# Extra arguments for pip install; pip's own settings (PIP_*) apply too.
PIP_FLAGS ?=
# Extra arguments for pytest: make test PYTEST_FLAGS="-x tests/unit"
PYTEST_FLAGS ?=

# Tests of one file stay in one process; PYTEST_FLAGS="-n 0" for a debugger.
TEST_PROCESSES ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(INSTALLED) ## Make .venv and install Roundtable in it with all extras

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Roundtable needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V): make PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: resolved with the rest, pip may fetch a variant that drags the CUDA packages along.
# hatchling goes in beforehand so that the build uses the pinned one.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt hatchling torch
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[all]'
	@touch $@

.PHONY: test
test: venv prometheus node check ## Run every check and every test (what CI runs)
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_FLAGS)

# For each target; two hours in all, or SECONDS=60 for a quarter of one.
SECONDS ?= 600
.PHONY: fuzz
fuzz: venv ## Fuzz everything that reads hostile or damaged bytes, SECONDS=600 each
	$(BIN)/python -m tests.fuzz.run --seconds $(SECONDS)

.PHONY: check
check: venv ## Check format, lint, types, import layers and the generated stubs
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python scripts/generate_stubs.py --check

.PHONY: fmt
fmt: venv ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.PHONY: stubs
stubs: venv ## Generate the Python stubs from proto/fedproto/v1/*.proto
	$(BIN)/python scripts/generate_stubs.py

.PHONY: demo
demo: venv ## Run a federation of five clients on this machine; results lie in demo/
	$(BIN)/python examples/demo.py

.PHONY: bench
bench: venv ## Measure rounds, ours and Flower's, and codecs; write benchmarks/RESULTS.md (forty minutes; installs Flower beside it)
	$(BIN)/python -m benchmarks.suite
	$(BIN)/python -m benchmarks.report

.PHONY: prometheus
prometheus: ## Install the Debian package prometheus, which one test needs (as root, where apt-get exists)
	@if command -v prometheus promtool >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing the Debian package prometheus"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus; } >/dev/null \
			|| echo "apt-get could not install prometheus: the monitoring test will fail"; \
	else echo "prometheus is not on PATH: the monitoring test will fail until you install it (Debian: apt-get install prometheus)"; \
	fi

.PHONY: node
node: ## Install the Debian package nodejs, which the decoder in examples/js_client needs (as root, where apt-get exists)
	@if command -v node >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing the Debian package nodejs"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nodejs; } >/dev/null \
			|| echo "apt-get could not install nodejs: the tests of examples/js_client will fail"; \
	else echo "node is not on PATH: the tests of examples/js_client will fail until you install it (Debian: apt-get install nodejs)"; \
	fi

.PHONY: clean
clean: ## Delete what make made (.venv, demo/, caches)
	rm -rf $(VENV) benchmarks/peers/.venv-flower demo build dist .fuzz .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
