# The interpreter that makes .venv; everything else runs inside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
CXX_FILES := $(filter %.h %.cpp %.cu,$(NATIVE))
SANITIZED := build/sanitize

# Small models have a barrier every few microseconds. Threads that spin there take the core from the thread that they
# wait for as soon as another program runs on the machine.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

build: $(INSTALLED) ## make .venv and the compiled modules (the other targets do so themselves)

demo: $(INSTALLED) ## train a small model, prune it two ways, compare, generate: minutes, no download
	$(BIN)/python -m msp.cli.demo

# Whole files go to one process for each core; four are enough memory for a machine of 16 GB. WORKERS=0 runs all in one.
WORKERS ?= logical
SPREAD = -n $(WORKERS) --maxprocesses 4 --dist loadfile
test: $(INSTALLED) ## the whole test suite; ARGS="tests/ops -k select" for less, WORKERS=0 for one process
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

# At least one file of every room; none that builds, kills or waits.
DAILY := $(addprefix tests/, formats/test_patterns.py plan/test_levels.py plan/test_plan.py plan/test_recipe.py \
    models/test_model.py text/test_data.py base/test_reading.py show/test_report.py packed/test_sparse_linear.py \
    test_docs.py test_doc_references.py test_papers.py cli/test_cli.py pruners/test_registry.py pruners/test_masks.py \
    allocators/test_controls.py engine/test_evolution.py engine/test_constants.py \
    ops/test_dispatch.py ops/test_packed.py ops/test_nm_select.py ops/test_nm_rank.py)
.PHONY: check
check: lint types ## for every day, a minute: lint, types and the quick tests of every room
	$(BIN)/python -m pytest -q $(DAILY) -k "not compiles" $(ARGS)

coverage: $(INSTALLED) ## the test suite, with the share of msp it runs; fails below 90 %
	$(BIN)/python -m pytest $(SPREAD) --cov=msp --cov-report=term-missing:skip-covered --cov-fail-under=90 $(ARGS)

lint: $(INSTALLED) ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(INSTALLED) ## let ruff and clang-format correct the findings of lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

types: $(INSTALLED) ## mypy --strict on msp, and on wrong calls of its functions
	$(BIN)/mypy --strict msp tests/typed_api.py

wheel: $(INSTALLED) ## the wheel for a release, repaired and checked, in dist/; MSP_CUDA=0|1 and MSP_CUDA_ARCHS as in setup.py
	rm -rf build/lib.* build/bdist.*
	$(BIN)/python .ci/release_wheel.py

# Preloaded, since the interpreter itself has no sanitizer; libstdc++ too, so that its exceptions are found.
# An interpreter never frees all its memory, so leaks are not searched for.
PRELOADED = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/$(SANITIZED)/lib:$(CURDIR)/tests
sanitized: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" MSP_SANITIZE=1 MSP_CUDA=0 \
	    $(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib

sanitize: sanitized ## the C++ kernels under the address, undefined-behaviour and thread sanitizers
	cd $(SANITIZED) && $(PRELOADED) ../../$(BIN)/python -c 'import msp._cpu as m; assert "$(SANITIZED)" in m.__file__, m'
	$(PRELOADED) $(BIN)/pytest --noconftest --import-mode=importlib -p no:cacheprovider -p isas tests/native/test_native*.py
	$(CXX) -std=c++17 -O1 -g -fsanitize=thread -pthread -Icsrc tests/native/parallel_stress.cpp csrc/cpu/parallel.cpp \
	    -o $(SANITIZED)/parallel_stress
	$(SANITIZED)/parallel_stress

MINUTES ?= 30
torture: sanitized ## kills, full disks, damaged files, bad numbers: 30 minutes; MINUTES=3, ONLY="kills disk", SEED=, OUT=
	PYTHONPATH=$(CURDIR)/tests:$(CURDIR)/benchmarks $(BIN)/python -m torture --minutes $(MINUTES) \
	    $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED)) $(if $(OUT),--out "$(OUT)")

# Any Python with torch will do, so that a machine with a GPU and no network can check a copy of the source.
gpu-check: ## prove the kernels on this machine's GPU; ONLY="spmm bench" for a part, OUT= for another result file
	PYTHONPATH=$(CURDIR)/.ci $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m gpu_check $(ONLY) $(if $(OUT),--out "$(OUT)")

kernel-table: $(INSTALLED) ## docs/kernels/resources.md from the compiled GPU kernels; needs nvcc, but no GPU
	$(BIN)/python tests/build/kernel_table.py

gpu-table: $(INSTALLED) ## the GPU figures of docs/results.md from the newest results of gpu-check
	cd benchmarks && ../$(BIN)/python -m gpu.tables

# On an idle machine OpenMP's own waiting is best: a passive thread takes a third of the shortest rows to wake up.
bench: $(INSTALLED) ## the speed of the kernels and of decoding on this machine, into benchmarks/results/ and docs/
	mkdir -p build
	env -u OMP_WAIT_POLICY $(BIN)/python -m pytest benchmarks --benchmark-disable-gc --benchmark-json build/bench.json $(ARGS)
	$(BIN)/python benchmarks/runner.py build/bench.json --save

quality: $(INSTALLED) ## measure the quality tables: hours on a CPU, continues an interrupted run; ARGS="--only wanda-0.25" for less
	$(BIN)/python benchmarks/quality.py $(ARGS)

matrix: $(INSTALLED) ## the oldest and newest versions allowed, each in an environment of its own; PYTHONS=/path/to/python3.10 ARGS=--anew
	$(BIN)/python .ci/matrix.py $(ARGS)

clean: ## remove everything that was built; .venv stays
	rm -rf build dist *.egg-info .coverage coverage.xml .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f msp/*.so

.PHONY: help build demo test coverage lint format types wheel sanitized sanitize torture gpu-check kernel-table gpu-table bench quality matrix clean
