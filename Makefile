# Two commands are all a new machine needs: `make serve` and `make test`; `make check` while you work.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := service plugins benchmarks tests examples gunicorn.conf.py
# of `make check`: those of the room you work in
TESTS ?= tests/config tests/text

.PHONY: serve test check lint types tests docs reference vendor pictures clients clean

serve: $(VENV)/.installed
	$(BIN)/moorage model fetch smollm2-135m
	exec $(BIN)/moorage serve

test: lint types tests

# a minute: no server, no model to fetch
check: lint types
	$(BIN)/python -m pytest -q tests/test_layers.py tests/test_errors.py tests/docs/test_pages.py $(TESTS)

lint: $(VENV)/.tested
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.tested
	$(BIN)/mypy

tests: $(VENV)/.tested $(VENV)/torchao
	$(BIN)/moorage model fetch smollm2-135m
	$(BIN)/moorage model fetch all-minilm-l6-v2
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not slow" $(PYTEST_ARGS)
	PYTHONPATH=$(VENV)/torchao $(BIN)/python -m pytest tests/strategies/test_examples.py tests/testing/test_contract.py -k torchao

# the documentation as a site, in build/site; tests/docs/test_site.py builds it as strictly
docs: $(VENV)/.tested
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# every page that says which command made it
reference: $(VENV)/.installed
	@grep -rhoP 'Made by `python \K-m [^`]+ > [^`]+' docs | while read -r made; do \
		echo "python $$made" && sh -c "$(BIN)/python $$made" || exit 1; done

# what others wrote for the page, from npm, into service/web/static; for whoever renews it
vendor:
	vendor/build.sh

# pictures of the page in docs/images, of the server at URL
pictures: $(VENV)/.tested
	$(BIN)/python -m tests.browser.screenshots $(or $(URL),http://127.0.0.1:8000) docs/images

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
	$(PIP) install -c constraints.txt -e '.[test,docs]'
	touch $@

# in a folder of its own: transformers imports it in every process that finds it
$(VENV)/torchao: constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt --no-deps --upgrade --target $@ torchao
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache
