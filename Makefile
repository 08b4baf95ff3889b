# Everything on one machine with nothing but Python 3.11+, git and make.
# Every target makes sure of what it needs first; a second run of `setup` costs nothing.

PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed
CODE   := $(wildcard storage_tiers runtime kvbm router frontend planner connectors mocker examples tools benchmarks tests)

# Containers often forbid bytecode: then every program compiles all it imports at every start.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup check format test test-fast chaos soak demo up down lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml tools/install.py tools/programs.py tools/constraints.txt
	@$(PYTHON) tools/install.py
	@touch $@

setup: $(STAMP) ## install everything into .venv (seconds with a warm cache)

check: $(STAMP) ## ruff, its formatter, mypy --strict and the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CODE)
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Engines want the machine to themselves; the rest mostly waits for servers and clocks. By itself
# xdist would leave files of one test, which are the longest, to the end.
test: $(STAMP) ## every test, real engines included
	@$(BIN)/python tools/browser.py
	$(BIN)/python -m pytest tests/e2e
	$(BIN)/python -m pytest -m "not e2e" -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP) ## every test but those that start an engine
	@$(BIN)/python tools/browser.py
	$(BIN)/python -m pytest -m "not e2e" -n 2 --dist loadfile --no-loadscope-reorder

chaos: $(STAMP) ## kill the daemon 200 times under load, then every program of a fleet, 200 times
	KVBM_CHAOS_KILLS=200 KVBM_CHAOS_ROUNDS=200 $(BIN)/python -m pytest tests/chaos

soak: $(STAMP) ## an hour of mixed load: right bytes, and memory, descriptors and latency flat
	KVBM_SOAK_S=3600 $(BIN)/python -m pytest tests/soak

demo: $(STAMP) ## two real engines, every tier, routed: build/demo.json and build/demo.svg
	$(BIN)/python -m examples.demo

up: $(STAMP) ## an OpenAI endpoint over two engines, left running (MORE=1: a planner may start one more)
	$(BIN)/python -m examples.demo up --more-engines $(or $(MORE),0)

down: $(STAMP) ## end what `make up` started
	$(BIN)/python -m examples.demo down

bench-%: $(STAMP) ## one benchmark of benchmarks/, for example bench-ssd
	$(BIN)/python -m benchmarks.$(subst -,_,$*)

lock: ## write tools/constraints.txt anew
	$(PYTHON) tools/install.py --lock

clean: ## remove what was built; .venv stays
	rm -rf build dist .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
