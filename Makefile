# moecomm: every target sets up what it needs. `make help` lists them.
#   make demo PYTHON=python3.12      another interpreter for the virtual environment
#   make test VENV=/tmp/venv         another place for it
#   make test ARGS="-k topology"     more options for the command behind the target

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= bench,dev,docs,hf,test
ARGS ?=
# Files of tests at a time: ranks share two cores well enough, and many tests wait.
TEST_WORKERS ?= 2

DEMO_RANKS ?= 4
DEMO_LAYER_ARGS ?=
DEMO_TRAIN_ARGS ?= --ep $(DEMO_RANKS) --steps 100
BENCH_RANKS ?= 4
BENCH_ARGS ?=
SOAK_ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.moecomm-$(EXTRAS)
# One process per rank, one thread per process, and a free port.
TORCHRUN := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone

# Hundreds of processes import moecomm: where bytecode may not be kept, each compiles all of it again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test check docs format bench kernel-report gpu-check wheel soak clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch comes first and by itself, so that no other package chooses its version; the build uses the pinned setuptools.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch setuptools
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

setup: $(STAMP)  ## make the virtual environment and install moecomm into it

demo: $(STAMP)  ## one MoE layer on 4 processes, checked; then train a small model
	$(TORCHRUN) --nproc-per-node $(DEMO_RANKS) examples/moe_layer.py $(DEMO_LAYER_ARGS)
	$(TORCHRUN) --nproc-per-node $(DEMO_RANKS) examples/train_moe_lm.py $(DEMO_TRAIN_ARGS)

test: $(STAMP)  ## the whole test suite
	$(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(STAMP)  ## formatting, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

docs: $(STAMP)  ## the documentation as a site in out/site, without a warning
	$(PY) docs/diagrams.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(STAMP)  ## rewrite the sources as `make check` wants them
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(STAMP)  ## dispatch and combine against baseline and roof: a table, plots and a page in out/bench
	$(TORCHRUN) --nproc-per-node $(BENCH_RANKS) bench/bench_dispatch_combine.py --out out/bench/run $(BENCH_ARGS)
	$(PY) bench/report.py out/bench/run.json

kernel-report: $(STAMP)  ## registers, shared memory and instructions of every kernel, per target
	$(PY) bench/kernel_report.py $(ARGS)

gpu-check: $(STAMP)  ## the tests and benchmarks that need a GPU
	@reason=$$($(PY) -c "import torch; print('' if torch.cuda.is_available() else 'torch ' + torch.__version__ + ' sees no CUDA or ROCm device')"); \
	if [ -n "$$reason" ]; then echo "no GPU: skipped, because $$reason"; \
	else $(PY) -m pytest -m gpu $(ARGS) && $(PY) bench/bench_kernels.py --out bench/results/kernels; fi

soak: $(STAMP)  ## random cases, kills and stalls for 10 minutes; SOAK_ARGS="--minutes 60 --tally FILE" adds up
	$(PY) -m tests.faults.soak $(SOAK_ARGS)

wheel: $(STAMP)  ## build dist/moecomm-*.whl
	$(PIP) wheel --quiet --no-deps --no-build-isolation -w dist .

clean:  ## remove builds and caches; the virtual environment stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
