# PYTHON: 3.11 or newer.  TORCH: any build, e.g. make demo TORCH=torch==2.11.0
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: setup demo test check bench

# torch goes first and alone, so that every later range finds it satisfied
$(VENV)/setup: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -e .
	touch $@
$(VENV)/dev: $(VENV)/setup
	$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@

setup: $(VENV)/setup
demo: $(VENV)/setup
	$(BIN)/python -m openmimo demo
test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow and not gpu"
check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -m "not gpu"
bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.bench_cpu
