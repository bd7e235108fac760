# make demo | test | checks | bench; each sets up what it needs and does no finished work twice.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
SEEDS ?= 1
READY = $(VENV)/.ready

.PHONY: help setup demo demo-contrast test test-gpu checks bench

help:
	@echo "make demo           the study, small and whole: about a quarter of an hour on two processor cores"
	@echo "make demo SEEDS=3   the same with three seeds;  make demo-contrast: the setting in which entropy rises"
	@echo "make test           all tests;  make test-gpu: those that need a GPU"
	@echo "make checks         formatter, linter, type checker"
	@echo "make bench          timings, as ratios of things run in turn on this machine"
	@echo "make setup          only the virtual environment, in $(VENV)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or later is needed; say make PYTHON=python3.12")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(RUN) -m scripts.demo --seeds $(SEEDS)

demo-contrast: $(READY)
	$(RUN) -m scripts.demo --contrast --seeds $(SEEDS)

test: $(READY)
	$(RUN) -m pytest -m 'not gpu' --numprocesses=auto --maxprocesses=4 --dist=loadfile

test-gpu: $(READY)
	$(RUN) -m pytest -m gpu

checks: $(READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(READY)
	$(RUN) -m scripts.bench
