# make demo and make test are all that a fresh machine needs: each makes .venv and installs what it uses.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Passed on: make demo DEMO_ARGS=--json, make test TEST_ARGS="-x tests/test_strategies.py"
DEMO_ARGS ?=
TEST_ARGS ?=
# Tests wait more than they compute, so there may be more at a time than processors.
TEST_WORKERS ?= 4
# make test-nightly NIGHTLY_ARGS=tests/test_wire.py
NIGHTLY_ARGS ?=
# Properties compute all the time.
NIGHTLY_WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
# make bench BENCH_ARGS="--only sweep"; by default docs/performance.md is written anew.
BENCH_ARGS ?= --markdown
# make soak SOAK_ARGS="--store redis --seconds 60"
SOAK_ARGS ?=

# Debian packages with the programs that tests start; installed by `make test` where it may (root, apt-get).
TEST_SYSTEM_PACKAGES ?= redis-server chromium fonts-dejavu-core openssh-server faketime iproute2 nftables util-linux
# The same for `make bench`.
BENCH_SYSTEM_PACKAGES ?= redis-server

PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-nightly bench bench-full soak lint clean

help:
	@echo "make demo    simulated servers and workers, one of each killed and its GPUs taken back; DEMO_ARGS=--json for programs"
	@echo "make test    the tests; TEST_ARGS goes to pytest"
	@echo "make test-nightly   ten thousand cases of every property, and new random histories; some half an hour with two"
	@echo "             processors, or file by file: NIGHTLY_ARGS=tests/test_wire.py"
	@echo "make lint    ruff, mypy and the import contract"
	@echo "make bench   the benchmarks and their targets, under ten minutes, also into docs/performance.md; BENCH_ARGS goes to them"
	@echo "make bench-full   the same with more rounds, half an hour"
	@echo "make soak    ten minutes of chaos among processes; SOAK_ARGS=\"--store server\" or redis, see --help"
	@echo "             everything at once for an hour: SOAK_ARGS=\"--store all --at-once --full-disk --seconds 3600\""
	@echo "make clean   remove .venv and everything built"
	@echo "PYTHON=$(PYTHON) makes the virtual environment; 3.10 or later"

demo: $(VENV)/.demo-installed
	@$(BIN)/gpupool-sync demo $(DEMO_ARGS)

test: $(VENV)/.dev-installed
	@.ci/system-packages $(TEST_SYSTEM_PACKAGES)
	@$(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

# Of each property how many cases were tried is in the statistics at the end. The longest takes five minutes on a busy
# machine; finding the smallest case of a failure takes five more.
test-nightly: $(VENV)/.dev-installed
	@HYPOTHESIS_PROFILE=nightly $(BIN)/pytest -n $(NIGHTLY_WORKERS) -m hypothesis --timeout 1800 \
		--hypothesis-show-statistics $(NIGHTLY_ARGS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg

bench: $(VENV)/.bench-installed
	@.ci/system-packages $(BENCH_SYSTEM_PACKAGES)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-full: $(VENV)/.bench-installed
	@.ci/system-packages $(BENCH_SYSTEM_PACKAGES)
	@$(BIN)/python -m benchmarks --full $(BENCH_ARGS)

soak: $(VENV)/.bench-installed
	@$(BIN)/python -m benchmarks.soak $(SOAK_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find gpupool_sync tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# The stamps lie inside .venv, so they go when it goes.  The dev install covers the demo's: the second line of its
# recipe says so.
$(VENV)/.made: .ci/make-venv
	@.ci/make-venv "$(PYTHON)" $(VENV)
	@touch $@

$(VENV)/.demo-installed: $(VENV)/.made pyproject.toml
	@echo "installing gpupool-sync[server] into $(VENV)" >&2
	@$(PIP) install --editable '.[server]'
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.made pyproject.toml
	@echo "installing gpupool-sync[dev] into $(VENV)" >&2
	@$(PIP) install --editable '.[dev]'
	@touch $@ $(VENV)/.demo-installed

$(VENV)/.bench-installed: $(VENV)/.dev-installed
	@echo "installing gpupool-sync[bench] into $(VENV)" >&2
	@$(PIP) install --editable '.[dev,bench]'
	@touch $@
