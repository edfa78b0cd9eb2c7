# Two commands do everything on a fresh machine: `make demo` and `make test`. Each installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: help demo test lint docs figures bench bench-estimators bench-merge clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

# Stale when the declared or pinned packages change, or the sources of the compiled extension. BackPACK is installed without its torchvision, which only its examples
# use and which breaks transformers' import when it does not match the installed torch.
$(STAMP): pyproject.toml constraints.txt setup.py gradmatch/engine/blocks.c estimators/squares.c
	@echo "[gradmatch] installing into $(VENV) (torch and friends: a few minutes on a fresh machine)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e ".[dev,docs,experiments,figures,lm-eval,removal,zoo]"
	$(BIN)/python -m pip install -c constraints.txt --no-deps backpack-for-pytorch
	@touch $@

demo: $(STAMP)  ## the paper's core experiment on a real model and real data
	$(BIN)/python -m experiments demo
	$(BIN)/python -m paper_figures results/demo.jsonl

test: $(STAMP)  ## the test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

lint: $(STAMP)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## the documentation, into site/; a dead link or a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

figures: $(STAMP)  ## redraw every figure and table from records
	$(BIN)/python -m paper_figures

bench: bench-estimators bench-merge  ## both benchmarks: ratios measured in one run

bench-estimators: $(STAMP)  ## time and memory of the estimators against their peers
	$(BIN)/python -m experiments.bench.estimators

bench-merge: $(STAMP)  ## time and memory of merging against plain file copies and mergekit
	$(BIN)/python -m experiments.bench.merge $(if $(MERGEKIT),--mergekit $(MERGEKIT))

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) results build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
