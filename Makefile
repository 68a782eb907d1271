# Everything a contributor or CI does goes through these targets. `make` alone lists them.
#   PYTHON=…       which Python makes the virtual environment (3.11 or newer); default: the first that fits
#   TENURE_HOME=…  where `make demo` keeps its state; default: .demo/home

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
TENURE_HOME ?= $(CURDIR)/.demo/home
PYTEST_ARGS ?=
BENCH ?= --quick

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs clean setup-demo setup-dev browser postgres guest docker prometheus strace peers

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

setup-demo: $(VENV)/.with-demo
setup-dev: $(VENV)/.with-dev

$(VENV)/.with-demo: pyproject.toml tools/setup.sh tools/constraints.txt
	@tools/setup.sh $(VENV) demo

$(VENV)/.with-dev: pyproject.toml tools/setup.sh tools/constraints.txt
	@tools/setup.sh $(VENV) dev

demo: setup-demo ## set everything up, run the main job, say where the report is
	@TENURE_HOME="$(TENURE_HOME)" $(BIN)/tenure run examples/digits.toml

test: setup-dev browser postgres guest docker prometheus strace peers ## set everything up, run all tests
	@echo "make: running the tests"
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup-dev ## format, lint, strict types, import directions, generated pages
	@echo "make: ruff check" && $(BIN)/ruff check -q .
	@echo "make: ruff format" && $(BIN)/ruff format -q --check .
	@echo "make: mypy" && $(BIN)/mypy --no-error-summary
	@echo "make: import contracts" && $(BIN)/lint-imports
	@echo "make: CLI reference" && $(BIN)/python tools/cli_reference.py --check

bench: setup-dev ## run every benchmark (BENCH= for the long form)
	@set -e; names=$$($(BIN)/python -m benchmarks --list | awk '{print $$1}'); \
	for name in $$names; do echo "make: benchmark $$name"; $(BIN)/python -m benchmarks $$name $(BENCH); done

docs: setup-dev ## write the generated pages anew
	@$(BIN)/python tools/cli_reference.py

browser: # the tests that look at the report want a Chromium and iproute2; without them they skip and say why
	@tools/browser.sh

postgres: # the tests of a ledger on PostgreSQL want a server's programs; without them they skip and say why
	@tools/postgres.sh

guest: # the tests on unified control groups want QEMU and a kernel; without them they skip and say why
	@tools/guest.sh

docker: # the tests of containers want a Docker Engine's programs; without them they skip and say why
	@tools/docker.sh

prometheus: # the tests of metrics want Prometheus's programs; without them they skip and say why
	@tools/prometheus.sh

strace: # the tests that make closures want strace; without it they skip and say why
	@tools/strace.sh

peers: setup-dev # the tests with other people's clients of a server want these; without them they skip and say why
	@tools/peers.sh $(BIN)/python

clean: ## remove what the targets above made (TENURE_HOME set by you stays)
	@rm -rf $(VENV) .demo .cache build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	@rm -rf src/tenure.egg-info
