# Everything runs in .venv, whether or not another environment is active.
# `make setup` costs nothing while pyproject.toml and constraints.txt are unchanged.

PYTHON  ?= python3
WORKERS ?= 2
VENV    := .venv
PY      := $(VENV)/bin/python
READY   := $(VENV)/.ready
OTHERS  := $(VENV)/.others

.DEFAULT_GOAL := help
.PHONY: help setup test lint types demo coverage bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make .venv with the package and what development needs (a minute or two, once)

# The stamp is written last: an interrupted set-up leaves none, and the next one starts from an empty .venv.
$(READY): pyproject.toml constraints.txt $(wildcard perex/kernels/compiled/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "perex needs Python 3.11 or newer: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt pip setuptools
	$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

test: $(READY)  ## run the tests (make test ARGS="-k linear" narrows them, WORKERS=8 spreads them, PEREX_DRAWS=1: all)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) $(ARGS)

lint: $(READY)  ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)  ## check types
	$(PY) -m mypy

demo: $(READY)  ## train on 500 real MNIST images, score 4,500 more, show what the scores are good for
	$(PY) examples/mnist.py $(ARGS)

# The packages whose networks the coverage runs beside transformers. Without what they depend on: torchvision is of it.
$(OTHERS): $(READY) benchmarks/coverage/others.txt
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps -r benchmarks/coverage/others.txt
	@touch $@

coverage: $(OTHERS)  ## run perex, vmap and Opacus on hundreds of architectures, into docs/coverage.md (half an hour)
	$(PY) benchmarks/coverage/run.py $(ARGS)
	$(PY) benchmarks/coverage/table.py $$(ls benchmarks/results/coverage-*.jsonl | tail -n 1)

# BackPACK and what it imports, without what they depend on: another torch might be of it.
$(VENV)/.bench: $(READY)
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps backpack-for-pytorch==1.7.1 einops==0.8.2 unfoldNd==0.2.3
	@touch $@

bench: $(VENV)/.bench  ## time perex, plain training and the peers, into docs/benchmarks.md (half an hour; ARGS=--sweeps: more)
	$(PY) benchmarks/speed/run.py $(ARGS)
	$(PY) benchmarks/speed/page.py $$(ls benchmarks/results/speed-*-cpu.json | tail -n 1)

clean:  ## remove .venv, caches and what the demo wrote
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist out *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
