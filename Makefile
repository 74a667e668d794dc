# Two commands are all a new machine needs: `make serve` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := service plugins benchmarks tests examples gunicorn.conf.py

.PHONY: serve test lint types tests clients clean

serve: $(VENV)/.installed
	$(BIN)/moorage model fetch smollm2-135m
	exec $(BIN)/moorage serve

test: lint types tests

lint: $(VENV)/.tested
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.tested
	$(BIN)/mypy

tests: $(VENV)/.tested
	$(BIN)/moorage model fetch smollm2-135m
	$(BIN)/moorage model fetch all-minilm-l6-v2
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not slow" $(PYTEST_ARGS)

# official clients, each in an environment of its own, against a real server: docs/clients.md
clients: $(VENV)/.tested
	$(BIN)/python -m tests.clients.run $(CLIENTS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Moorage needs Python 3.11 or newer; make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# constraints.txt pins what the tests ran with; torch 2.13.0 is a CPU build where one is configured
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache
