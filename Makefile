# Everything runs in .venv, which is made when it is missing and brought up to date when what it is made from changes.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help venv serve test soak bench docs lint type format clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

venv: $(STAMP) ## make .venv with the exact versions of constraints.txt

# The pip that comes with Python 3.11 does not know dependency groups, so the first step gets one that does.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no python3.11 and no python3 on the PATH: install Python 3.11 or later" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"make: $(PYTHON) is Python {v}: 3.11 or later is needed, name one with make PYTHON=...")'
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable . --group dev
	@touch $@

serve: $(STAMP) ## serve the sample artifacts on this machine
	@echo
	@echo "Serving docs/examples/artifacts. When the line that starts with 'ready' is there, in a second terminal:"
	@echo
	@echo "    $(BIN)/plasm-dht get stable/arm64"
	@echo
	@$(BIN)/plasm-dht serve --artifacts docs/examples/artifacts --host 127.0.0.1 --http-host 127.0.0.1 --state-dir build/serve

# Half of the time of a test run is spent waiting, for a record to end or a process to start: two workers for each core.
test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n "$$($(BIN)/python -c 'import os; print(2 * (os.cpu_count() or 1))')" --dist worksteal

soak: $(STAMP) ## run the long scenarios on the virtual network: minutes
	$(BIN)/python -m pytest -m soak -s

bench: $(STAMP) ## measure beside stock kademlia: minutes (BENCH="--full --write-docs": hours of virtual time, and the docs)
	$(BIN)/python -m tests.bench $(BENCH)

# What builds the site is installed when it is asked for: `make serve` does not wait for it.
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	@touch $@

docs: $(DOCS_STAMP) ## build the site in build/docs; a warning is an error
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --nitpicky --quiet -d build/doctrees docs build/docs
	@echo "the site is build/docs/index.html"

lint: $(STAMP) ## ruff, and whether the format is right
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP) ## mypy --strict
	$(BIN)/mypy --strict

format: $(STAMP) ## let ruff format and sort
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove everything that can be made again, .venv too
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find plasm_dht cli tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
