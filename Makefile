# `make` alone prints what there is. Everything runs in .venv, which `make setup` keeps as requirements.lock says.

.DEFAULT_GOAL := help
BIN := .venv/bin
STAMP := .venv/.set-up
# Tests of whole workers and of stores, which run the kernel often and cover no line of models that others do not.
BEYOND := $(addprefix --ignore=tests/unit/test_,exactness.py routed.py crashes.py homes.py checkpoints.py assignor.py membership.py)

# Most tests of services wait: two processes share them, each with services of its own.
IN_TWO := --numprocesses=2 --dist=loadgroup

.PHONY: help setup demo test coverage lint format unit bench chaos up down lock clean

help: ## Show this help
	@echo "Headrace: make TARGET [ARGS='...']"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## Make .venv from the locked packages (PYTHON=... chooses the interpreter)

$(STAMP): pyproject.toml requirements.lock scripts/install
	@scripts/install
	@touch $@

demo: setup ## Run the demonstration from end to end (ARGS are its options)
	@$(BIN)/headrace demo $(ARGS)

test: coverage ## Everything that must pass: lint, the coverage of models, then all tests
	@$(BIN)/pytest $(IN_TWO) --durations=20 $(ARGS)

# Coverage sees into the kernel only where it runs as plain Python; all tests then run it compiled.
coverage: lint ## That the unit tests cover at least 95 % of models
	@NUMBA_DISABLE_JIT=1 $(BIN)/pytest $(IN_TWO) tests/unit $(BEYOND) --quiet --cov=models --cov-report=term --cov-fail-under=95

lint: setup ## Style, types, and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup ## Put the code into the one format, and mend what ruff can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

unit: setup ## The tests that need no service, in seconds
	@$(BIN)/pytest -m "not integration" tests/unit $(ARGS)

bench: setup ## Measure this machine (ARGS=latency for the other benchmark)
	@$(BIN)/headrace bench $(or $(ARGS),throughput)

chaos: setup ## Five minutes of faults under load, every prediction compared (ARGS are its options)
	@$(BIN)/headrace chaos $(ARGS)

up: setup ## Start Kafka, Valkey, PostgreSQL and MLflow on this machine, unless the settings name others
	@$(BIN)/headrace up $(ARGS)

down: setup ## Stop what `make up` started
	@$(BIN)/headrace down $(ARGS)

# The build backend goes into the lock too, and what it needs for an editable install.
lock: setup ## Resolve pyproject.toml anew (ARGS=--upgrade for the newest versions)
	@printf '%s\n' $$(sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml) editables | \
		$(BIN)/uv pip compile pyproject.toml - --all-extras --universal --generate-hashes \
		--no-header --no-emit-index-url --quiet --output-file requirements.lock $(ARGS) > /dev/null

clean: ## Stop the services and remove all that was made here: their data, .venv, caches
	@if [ -d .headrace ] && [ -x $(BIN)/python ]; then $(BIN)/python -c \
		"from app.local.services import down; from app.settings import Settings; down(Settings(), remove_data=True)"; fi
	@rm -rf .headrace .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
