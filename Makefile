# Development and the demo. `make help` lists the targets. Copy examples/Makefile for your own data.
PYTHON ?= python3
PYTHON3_8 ?= python3.8
FUZZ_RUNS ?= 20000
VENV := .venv
BIN := $(abspath $(VENV))/bin

.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-gpu fuzz check-tensorrt-api lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 28

demo: demo/solar-cells ## train, quantize and compare on real images of solar cells (2 minutes on 2 cores)
	@$(MAKE) --no-print-directory -f examples/Makefile UADTOOL=$(BIN)/uadtool DATA=demo/solar-cells OUT=demo

demo/solar-cells: examples/solar_cells.py | $(VENV)/.demo
	mkdir -p demo
	$(BIN)/python examples/solar_cells.py $@

test: $(VENV)/.dev ## run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.dev ## run the tests that take minutes each: killed processes, full disks, several processes
	$(BIN)/python -m pytest -m slow -n auto --dist worksteal

test-gpu: $(VENV)/.dev ## build and run engines on this machine's NVIDIA GPU (requires its driver)
	$(BIN)/python -m pip install --quiet tensorrt
	$(BIN)/python -m pytest -m gpu -rs -s tests/runtimes/test_gpu.py

fuzz: $(VENV)/.dev ## feed broken input to every parser, at most FUZZ_RUNS times each (x86-64 Linux, Python 3.11 or newer)
	$(BIN)/python -m pip install --quiet -e '.[fuzz]'
	$(BIN)/python tests/fuzz/fuzz.py $(FUZZ_RUNS)

check-tensorrt-api: $(VENV)/.dev build/tensorrt-8.5/done build/tensorrt-stubs/done ## check the names of TensorRT's API against 8.5, 10 and RTX (downloads half a gigabyte)
	LD_LIBRARY_PATH=$$(find $(abspath build/tensorrt-8.5) -type d -name tensorrt) \
		build/tensorrt-8.5/bin/python tests/tensorrt_engines/check_tensorrt_api.py tensorrt
	$(BIN)/python tests/tensorrt_engines/check_tensorrt_api.py build/tensorrt-stubs/*/*.pyi
	$(BIN)/python tests/tensorrt_engines/check_tensorrt_api.py tensorrt_rtx

# The version of JetPack 5, which has wheels for Python 3.8. Its library of plugins requires cuDNN and cuBLAS, a gigabyte;
# the importer uses one function of it.
build/tensorrt-8.5/done:
	$(PYTHON3_8) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps numpy tensorrt==8.5.2.2
	echo 'int initLibNvInferPlugins(void *logger, const char *name) { return 1; }' | gcc -shared -fPIC -x c \
		-Wl,-soname,libnvinfer_plugin.so.8 -o $(@D)/lib/python3.8/site-packages/tensorrt/libnvinfer_plugin.so.8 -
	touch $@

build/tensorrt-stubs/done: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) tensorrt-stubs
	touch $@

lint: $(VENV)/.dev ## run ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## delete the files of all other targets
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A virtual environment with the extras that a target requires. The stamp is written last.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[lab,demo]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[lab,demo,dev]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("training requires Python 3.10 or newer: make PYTHON=python3.11" * (sys.version_info < (3, 10)) or None)'
	$(PYTHON) -m venv $(VENV)
