# make demo | test | lab are all a newcomer needs; each makes the environment it needs from nothing.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test test-notebooks test-slow test-gpu lab export update bench peers docs readme lint clean

$(READY): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

demo: $(READY)                ## from source code on this machine to a served model
	$(BIN)/aigc demo

test: test-notebooks          ## notebook lessons, then what crosses rooms; under 25 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --reruns 1 -r R --durations=25

test-notebooks: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m aigc._nbx test

test-slow: $(READY)           ## minutes: the real model, 600 items
	$(BIN)/python -m aigc._nbx test-slow
	$(BIN)/python -m pytest -m slow --timeout=3600

test-gpu: $(READY)            ## needs a CUDA device
	$(BIN)/python -m pytest -m gpu

peers: $(READY)               ## the programs our benchmarks compare with, each in an environment of its own
	PYTHON=$(BIN)/python kernels/bench/peers.sh

lab: $(READY)                 ## JupyterLab on nbs/
	$(BIN)/aigc lab

export: $(READY)              ## notebooks → modules, notebooks cleaned, README
	$(BIN)/python -m aigc._nbx export
	$(BIN)/python -m aigc._nbx clean
	$(BIN)/python -m aigc._nbx readme

update: $(READY)              ## edited modules → notebooks
	$(BIN)/python -m aigc._nbx update

docs: $(READY)                ## nbs/ → _docs/
	$(BIN)/python -m aigc._nbx docs

lint: $(READY)
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist _docs _proc *.egg-info
