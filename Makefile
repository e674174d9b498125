# `make demo` and `make test` work on a fresh clone; both keep their environment in .venv and share it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.h csrc/cuda/*.cuh csrc/cuda/*.cu)
PYTEST_ARGS ?=

.PHONY: help demo test lint format types build wheel sanitize gpu-check quality clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml setup.py constraints.txt CMakeLists.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED) ## train a small model, prune it two ways, compare and generate
	$(BIN)/python -m msp.demo

test: $(INSTALLED) ## all tests, with coverage of msp/
	$(BIN)/python -m pytest --cov=msp --cov-report=term:skip-covered $(PYTEST_ARGS)

lint: $(INSTALLED) ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: $(INSTALLED) ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

types: $(INSTALLED) ## mypy --strict
	$(BIN)/mypy --strict msp

build: $(INSTALLED) ## install in place, with the compiled modules

wheel: $(INSTALLED) ## a wheel in dist/; MSP_CUDA=0 leaves the CUDA module out
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

sanitize: $(INSTALLED) ## native code under the address and undefined-behaviour sanitizers
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/sanitize $(BIN)/python

gpu-check: $(INSTALLED) ## the kernels on a real GPU; ONLY=name runs a part
	$(BIN)/python benchmarks/gpu_check.py $(if $(ONLY),--only $(ONLY))

quality: $(INSTALLED) ## measure the README's quality table (hours on a CPU; resumes)
	$(BIN)/python benchmarks/quality.py

clean: ## everything that was built or installed here
	rm -rf $(VENV) build dist *.egg-info msp/*.so demo-output .cache .pytest_cache .mypy_cache .ruff_cache
