# make demo: from nothing to a trained CrossViT. make test: every check. Nothing else is needed but Python and a compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CHROMIUM := apt-get install --yes --no-install-recommends chromium fonts-dejavu-core
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# make docs: the pages of docs/ as a site, in site/: open site/index.html.
# make faults: everything that can go wrong is done to real trainings; docs/reliability.md says what was lost.

# make screenshots: the pictures of pages in docs/figures, made again.

.PHONY: demo docs test test-long browser screenshots faults lint format clean

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

test-long: $(VENV)/tested browser
	$(BIN)/pytest -n 2 -m long

# Pages are tested in the system's Chromium: installed where it is missing and that is possible.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	  command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update -qq && $(CHROMIUM); } || \
	  echo "no chromium, so tests/browser will fail; as root, type: $(CHROMIUM)"

screenshots: $(VENV)/tested browser
	PYTHONPATH=tests $(BIN)/python -m browser.screenshots

faults: $(VENV)/tested
	PYTHONPATH=tests $(BIN)/python -m faults.table

format: $(VENV)/tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site .cache
