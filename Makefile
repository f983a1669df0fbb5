# `make demo` and `make test` do all their own set-up in .venv; nothing is installed elsewhere.
PYTHON ?= python3
TORCH  ?= "torch==2.13.0" "triton==3.7.1; platform_system == 'Linux'"
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint bench bench-cpu readme-figures gpu clean compile-report mutants hub-kernel

demo: $(VENV)/.demo
	$(BIN)/gptfast demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(TESTS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy
	@test ! -e kernels/__init__.py || { echo "kernels/__init__.py would shadow HuggingFace's 'kernels' package"; exit 1; }

# What each kernel compiles to on four targets: registers, spills, shared memory, blocks an SM. Needs no GPU.
compile-report: $(VENV)/.test
	PYTHONPATH=.:kernels $(BIN)/python -m tests.support.compile_gate $(CASES)

# Breaks the kernels on purpose, one place at a time; each break must turn a test red.
mutants: $(VENV)/.test
	PYTHONPATH=.:kernels $(BIN)/python -m tests.support.mutants $(MUTANTS)

# Every op and the whole model against their peers, on a GPU if there is one: ten minutes; BENCH=--quick takes two.
bench: $(VENV)/.test
	$(BIN)/gptfast bench $(BENCH)

# The README's table of inference on a CPU: half an hour on two cores with nothing beside it.
bench-cpu: $(VENV)/.test
	$(BIN)/gptfast bench --profile inference --device cpu --output-dir benchmarks/results/inference-cpu $(BENCH)

# The README's tables, from benchmarks/results.
readme-figures: $(VENV)/.test
	$(BIN)/python -m gptfast_bench.report README.md

# Needs a GPU: the kernels' tests on it, then timings, to benchmarks/results/gpu or $$OUT, in ten minutes.
# STEPS=sanitize runs a few tests under compute-sanitizer instead; STEPS="bench -- --resume FILE" goes on.
gpu: $(VENV)/.test
	$(BIN)/python -m gptfast_bench.gpu $(STEPS)

# A folder for HuggingFace's Hub and its `kernels` package: build/hub, or HUB=FOLDER. Nothing is compiled.
HUB ?= build/hub
hub-kernel:
	$(PYTHON) kernels/hub/build.py $(HUB)

# torch first: another package's range must not choose the build.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt --editable ".[text]"
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt --editable ".[test]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build *.egg-info
