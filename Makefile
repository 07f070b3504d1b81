# Development and the demo. `make help` lists the targets; examples/Makefile is the chain to copy for your own data.
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin

.DELETE_ON_ERROR:
.PHONY: help demo test lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

demo: demo/solar-cells ## train, quantize and compare on real images of solar cells (about 7 minutes on 2 cores)
	@$(MAKE) --no-print-directory -f examples/Makefile UADTOOL=$(BIN)/uadtool DATA=demo/solar-cells OUT=demo \
		TRAIN_OPTIONS='--steps 360'

demo/solar-cells: examples/solar_cells.py | $(VENV)/.demo
	mkdir -p demo
	$(BIN)/python examples/solar_cells.py $@

test: $(VENV)/.dev ## run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove what the other targets made
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A virtual environment with the extras that a target needs. The stamp is the last thing made.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[lab,demo]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[lab,demo,dev]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("training needs Python 3.10 or newer: make PYTHON=python3.11" * (sys.version_info < (3, 10)) or None)'
	$(PYTHON) -m venv $(VENV)
