# The whole project by name. `make demo` and `make test` need nothing but Python 3.10 to 3.13: they
# make a virtual environment and install what requirements-dev.txt pins.
#
#   make test PYTHON=python3.12        another interpreter
#   make test PYTHON=python3 VENV=     the interpreter as it is; installs nothing, needs no network

PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements-dev.txt
DEMO_ARGS ?=
BENCH_ARGS ?=
TEST_ARGS ?=

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: help demo test test-fast test-oldest lint docs static-report bench clean

help:
	@echo 'make demo           check the operators here, train on handwritten digits, write a report'
	@echo '                      DEMO_ARGS="--epochs 2 --device cpu"'
	@echo 'make test           every test, the slow ones included; TEST_ARGS="-k mixer"'
	@echo 'make test-fast      the tests without the slow ones'
	@echo 'make test-oldest    the same with the oldest torch and Triton supported (gigabytes)'
	@echo 'make lint           ruff and mypy'
	@echo 'make docs           the pages of docs, in build/docs; warnings are errors, needs no network'
	@echo 'make static-report  registers, spills and instructions of every kernel; needs no GPU'
	@echo 'make bench          what this machine can measure: rows, pictures, tables; minutes'
	@echo '                      BENCH_ARGS=--quick'
	@echo 'make clean          remove what was built, except the virtual environment'
	@echo 'PYTHON=python3.12   another interpreter;  VENV=  use it as it is and install nothing'

# Re-made when the pinned tools or the package's dependencies change.
$(VENV)/.ready: $(REQUIREMENTS) requirements-vision.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and "make: Python 3.10 to 3.13 is needed, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vision.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)
	@$(PY) -m mambavision demo $(DEMO_ARGS)

# Two processes where pytest-xdist is there, one otherwise.
PYTEST = $(PY) -m pytest $$($(PY) -c 'import xdist' 2>/dev/null && printf %s '-n 2 --dist worksteal')

test: $(READY)
	$(PYTEST) $(TEST_ARGS)

test-fast: $(READY)
	$(PYTEST) -m 'not slow' $(TEST_ARGS)

# In an environment of its own; the static budgets hold for the pinned Triton.
test-oldest:
	$(MAKE) test-fast VENV=.venv-oldest REQUIREMENTS=requirements-oldest.txt

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m mypy

docs: $(READY)
	$(PY) -m sphinx --fail-on-warning --keep-going --nitpicky --quiet -b html docs build/docs
	@echo 'build/docs/index.html'

static-report: $(READY)
	$(PY) benchmarks/static_report.py

bench: $(READY)
	@$(PY) benchmarks/run_all.py $(BENCH_ARGS)

clean:
	rm -rf build dist runs *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path './.*' -prune -o -name __pycache__ -type d -print | xargs rm -rf
