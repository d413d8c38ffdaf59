# `make help` lists the targets. Everything is installed in .venv; nothing outside this folder is touched.
PYTHON ?= python3.11
BIN := .venv/bin
export DVC_NO_ANALYTICS := 1
# For the tests; stages/__init__.py says why.
export GOMP_SPINCOUNT ?= 1000
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup run ui compare ablation convergence labels smoke test lint format clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

setup: $(BIN)/.done  ## make .venv with every package at its exact version

$(BIN)/.done: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pipeline.offline
	touch $@

run: setup  ## the pipeline (dvc repro), the time of each stage, the table of methods (CALORA_WORKERS=1: one stage at a time)
	@CALORA_WORKERS=$${CALORA_WORKERS:-2} $(BIN)/python -m pipeline repro

ui: setup  ## the Prefect UI, for runs started by hand or by a schedule (PORT=4200)
	@$(BIN)/python -m pipeline ui --port $(or $(PORT),4200)

compare: setup  ## the experiments of this commit side by side; writes results/report.html (EXP="a b")
	@$(BIN)/python -m pipeline compare $(EXP)

ablation: setup  ## the paper's ablation: inherit x recover x distil (TASK=movies RECIPE=q3 SEEDS="0 1 2")
	@$(BIN)/python -m pipeline ablation $(TASK:%=--task %) $(RECIPE:%=--recipe %) $(if $(SEEDS),--seeds $(SEEDS))

convergence: setup  ## validation accuracy against step on compressed models (TASK=movies RECIPES="q4 q3 q2 q8_up")
	@$(BIN)/python -m pipeline convergence $(TASK:%=--task %) $(if $(RECIPES),--recipes $(RECIPES))

labels: setup  ## accuracy against labels and against steps (TASK=movies RECIPE=q3 COUNTS="0 100 400 1600" SEEDS=0)
	@$(BIN)/python -m pipeline labels $(TASK:%=--task %) $(RECIPE:%=--recipe %) $(if $(COUNTS),--counts $(COUNTS)) $(if $(SEEDS),--seeds $(SEEDS))

smoke: setup  ## the same stages and real input on a few hundred texts, in .smoke
	@$(BIN)/python -m pipeline smoke

test: setup  ## all tests, two files at a time, one thread each (JOBS=2)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(or $(JOBS),2) --dist loadfile --no-loadscope-reorder

lint: setup  ## ruff, format, strict types, spelling
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/codespell

format: setup  ## let ruff format and mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove what runs made; own/, .venv and the download cache stay
	rm -rf data/* models/* checkpoints .smoke .t5 results/*/ .mypy_cache .ruff_cache .pytest_cache .dvc/tmp
