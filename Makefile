# Two commands: `make quickstart` and `make test`. Both set up .venv where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow fuzz lint setup

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("irlign needs Python 3.11 or later: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/irlign run --config recipes/quickstart.yaml
	@echo "The report: $(CURDIR)/runs/quickstart/report.html"

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

# The parsers against TRIES generated inputs a test; `make test` tries 60 of them, the same ones each time.
fuzz: setup
	IRLIGN_FUZZ=$(or $(TRIES),2000) $(BIN)/python -m pytest tests/test_fuzz.py

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_import_law.py
