# `make quickstart` and `make test` each do everything from a fresh clone: environment, installation, the job.
PYTHON ?= python3
BIN := .venv/bin

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow bench quality format clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

quickstart: .venv/.installed  ## Train, evaluate, save and reload tokens on the embedded base (no network)
	HF_HUB_OFFLINE=1 $(BIN)/python examples/quickstart/run.py

test: .venv/.installed  ## Run the fast tests (no network)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: .venv/.installed  ## Run the long tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow

bench: .venv/.installed  ## Run the benchmarks, shortened (a tenth of the attack steps)
	$(BIN)/python -m benchmarks.overhead --output outputs/benchmarks/short/overhead.json --rounds 5
	$(BIN)/python -m benchmarks.training_step --output outputs/benchmarks/short/training_step.json --num_attack_steps 3 --rounds 2
	$(BIN)/python -m benchmarks.sweep_step --output outputs/benchmarks/short/sweep_step.json --num_attack_steps 3 --rounds 2

quality: .venv/.installed  ## Check format, lint, layers and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_faces.py
	$(BIN)/mypy

format: .venv/.installed  ## Fix format and lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment and the caches
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
