# Everything here works on a fresh machine with Python 3.11+ and its venv module. The first call of a target creates .venv
# and installs what that target needs; later calls go straight to work. Nothing is installed outside .venv.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/demo

BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable
# One thread per process: the tests run side by side, and tiny matrices are slower on two threads than on one. A file's
# tests stay together, so that what they share is made once.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help demo test test-slow test-nightly lint format clean

help:
	@echo 'make demo       see it all: a dense model becomes a mixture of experts ($(OUT)/report.html)'
	@echo 'make test       the fast tests'
	@echo 'make test-slow  the slow tests: crashes at random points, seeds, the demo itself'
	@echo 'make test-nightly  the longest: a fuzzed interface, a server under load for minutes'
	@echo 'make lint       ruff, mypy, import-linter'
	@echo 'make format     ruff, writing'
	@echo 'make clean      remove .venv and caches'

demo: $(VENV)/.installed-all
	$(BIN)/skymoe demo --out $(OUT) $(ARGS)

test: $(VENV)/.installed-dev
	$(PYTEST) --numprocesses 2 --dist loadfile $(ARGS)

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m 'slow and not nightly' --durations 20 $(ARGS)

test-nightly: $(VENV)/.installed-dev
	$(PYTEST) -m nightly --durations 20 $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find skymoe tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'skymoe needs Python 3.11 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# A stamp per set of extras, renewed when the requirements change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	$(INSTALL) '.[$*]'
	@touch $@

.PRECIOUS: $(VENV)/.installed-%
