# make demo: from nothing to a trained CrossViT. make test: every check. Nothing else is needed but Python and a compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# make docs: the pages of docs/ as a site, in site/: open site/index.html.
# make faults: everything that can go wrong is done to real trainings; docs/reliability.md says what was lost.

.PHONY: demo docs test test-long faults lint format clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(INSTALL) --editable '.[test]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/crosspatch train digits --out runs/demo --overwrite

docs: $(VENV)/tested
	$(BIN)/zensical build --strict --clean

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --warnings

test: lint
	$(BIN)/pytest -n auto --dist worksteal -m 'not long'

test-long: $(VENV)/tested
	$(BIN)/pytest -n 2 -m long

faults: $(VENV)/tested
	PYTHONPATH=tests $(BIN)/python -m faults.table

format: $(VENV)/tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site .cache
