# ndkv: everything that is done to this repository is a target here. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check
ENV := $(VENV)/.ndkv-installed
TOOL := $(PY) nbs/_tools/nb.py
MODEL ?= llama
FILE = $(or $(wildcard nbs/*/$(NB).ipynb),nbs/$(NB).ipynb)

.PHONY: help env reproduce report test test-noise test-cpus check nbtest pytest pytest-first pytest-second verify export readme lint compile demo train evaluate paper docs edit save nb-run test-gpu clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(ENV): setup.py settings.ini constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 (apt-get install python3.11 python3.11-venv)"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { echo "cannot make $(VENV): apt-get install python3.11-venv"; exit 1; }
	$(PIP) install -q -c constraints.txt setuptools torch
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

env: $(ENV) ## the pinned environment in .venv (made by every other target when absent)

reproduce: env ## every table and figure from results/, then the live demo
	$(BIN)/ndkv report
	$(BIN)/ndkv demo

report: env ## every table, figure and number of paper/generated from results/
	$(BIN)/ndkv report

test: env check lint compile ## everything that must hold before a commit, in two processes
	$(MAKE) -j2 pytest-first pytest-second
	$(MAKE) nbtest verify

# No test may hang on the last bit of a float sum: add them in another order (tests/noise), and as other processors do.
NOISE := NDKV_NOISE=$(or $(SEED),1) PYTHONPATH=tests/noise OMP_NUM_THREADS=1 TRITON_INTERPRET=1
FLOATS := $(patsubst %,tests/test_%.py,architectures baselines cache codec eviction hub kernels modes parallel profile serving spectral speculation store stress tasks trellis)

test-noise: env ## the tests with all sums in another order (SEED=2 another, SEED=2:5 with noise of 5 last bits)
	$(NOISE) $(PY) -m pytest -q tests
	$(NOISE) $(BIN)/nbdev_test --n_workers 1

test-cpus: env ## the tests of floats with every instruction set of this machine, and with two threads
	for cpu in default avx2 avx512; do for n in 1 2; do echo "$$cpu, $$n threads"; \
	  ATEN_CPU_CAPABILITY=$$cpu OMP_NUM_THREADS=$$n TRITON_INTERPRET=1 $(PY) -m pytest -q $(FLOATS) || exit 1; done; done

check: env # notebooks clean, package and README in sync with them
	$(TOOL) check

lint: env ## pyflakes on the exported code, numbers in the paper's prose; how dense the notebooks are
	$(PY) -m pyflakes ndkv/*.py tests/*.py tests/noise/*.py nbs/_tools/*.py setup.py
	$(TOOL) lint
	$(PY) nbs/_tools/style.py

compile: env ## import every module with warnings as errors, without Triton's interpreter
	env -u TRITON_INTERPRET $(PY) nbs/_tools/compile.py

nbtest: env # run the notebooks as tests, two at a time, Triton kernels interpreted
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/nbdev_test --n_workers 2

pytest: env # property tests and processes
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest -q tests

SECOND := $(patsubst %,tests/test_%.py,architectures cli models modes parallel search serving spectral) # about half of the time

pytest-first: env
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest -q -p no:cacheprovider $(filter-out $(SECOND),$(wildcard tests/test_*.py))

pytest-second: env
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest -q -p no:cacheprovider $(SECOND)

test-gpu: env # the notebooks' cells that need a GPU
	$(BIN)/nbdev_test --flags gpu --n_workers 1

verify: env ## regenerate paper/generated in a temporary folder and compare
	$(BIN)/ndkv verify

export: env ## clean the notebooks, write ndkv/ and README.md from them
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(TOOL) readme

readme: env
	$(TOOL) readme

demo: env ## generate with the ordinary cache and with ndkv, side by side
	$(BIN)/ndkv demo

train: env ## train a model of the zoo from scratch (MODEL=llama; wants a GPU)
	$(BIN)/ndkv train $(MODEL)

evaluate: env ## measure caches on a model of the zoo, rows to results/ (MODEL=llama)
	$(BIN)/ndkv evaluate $(MODEL)

paper: report ## paper/main.pdf (where LaTeX is installed)
	@bash paper/build.sh

docs: env ## linked pages of notebooks, modules, rows and figures in _docs/
	$(TOOL) docs

edit: env ## a notebook as a script: make edit NB=40_cache, edit .cache/40_cache.py, make save NB=40_cache
	@test -n "$(NB)" || { echo "usage: make edit NB=40_cache"; exit 2; }
	@mkdir -p .cache && $(BIN)/jupytext --to py:percent -o .cache/$(NB).py $(FILE)

save: env ## the script back into its notebook: make save NB=40_cache
	@test -n "$(NB)" || { echo "usage: make save NB=40_cache"; exit 2; }
	$(BIN)/jupytext --update --to ipynb -o $(FILE) .cache/$(NB).py
	$(BIN)/nbdev_clean --fname $(FILE)
	$(BIN)/nbdev_export --path $(FILE)

nb-run: env ## execute notebooks and keep their outputs (NB=40_cache, or all)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(TOOL) run $(NB)

clean: ## remove what was built, not the environment
	rm -rf build dist *.egg-info _docs .cache .pytest_cache .hypothesis
	find ndkv nbs tests -name __pycache__ -prune -exec rm -rf {} +
	cd paper && rm -f main.{aux,bbl,blg,fdb_latexmk,fls,log,out,pdf}
