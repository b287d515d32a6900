PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart check check-tests test lint docs clean

quickstart: .venv/bench  ## train on real images, with VarCon, SupCon and cross-entropy
	$(BIN)/python -m benchmarks quickstart

check: .venv/all  ## style, types, and the tests that catch most
	@$(MAKE) --no-print-directory -j 2 lint check-tests

check-tests: .venv/all  ## no processes, no compiler, no training
	$(BIN)/python -m pytest -n 2 -q @tests/check.txt

test: .venv/all  ## the whole test suite
	@echo "Five to seven minutes on two quiet cores. The last lines say which tests were skipped, and why:"
	@echo "most often for want of an NVIDIA GPU, or of timm's own train.py (TIMM_TRAIN_PY=its path)."
	$(BIN)/python -m pytest -n 2 -rs

lint: .venv/all  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/docs  ## the documentation site; every warning is an error
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/site
	@echo "open build/site/index.html"

clean:
	rm -rf .venv build dist *.egg-info

# One marker file per set of extras; it is made again when the dependencies change.
.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %s: make PYTHON=python3.x" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
