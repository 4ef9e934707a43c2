# make run   the whole loop on the embedded world
# make test  lint, format check and tests

PYTHON ?= python3
BIN := .venv/bin

export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test lint clean

run: .venv/ready
	$(BIN)/python -m pipeline run configs/shapes.yaml

test: lint
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs
